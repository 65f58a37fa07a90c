"""
MatMLA in one file: MHA, nested MHA, GQA, nested GQA, MLA and MatMLA, one under the other, to be
read next to the papers. First read sections 2.1.1 to 2.1.3 of [2], then section 3 of [1].

  [1] MatMLA: Matryoshka Multi-Head Latent Attention. openreview.net/forum?id=TuHltnpNUo
  [2] DeepSeek-V2, 2024. arXiv:2405.04434. Its section 2.1.1 has (1)-(8), MHA, to which we add RoPE;
      appendix C has (37)-(47), MLA, to which we add its norms. [1](4) is an equation of [1].
  [3] RoFormer (RoPE), 2021. arXiv:2104.09864    [4] GQA, 2023. arXiv:2305.13245

  size    [1]        [2]     transformers          meaning
  d       d          d       hidden_size           width of the model
  n_h     h          n_h     num_attention_heads   heads
  d_h     d_h - r    d_h     qk_nope_head_dim      width of a head's query and key without position
  d_h     d_h        d_h     v_head_dim            width of a head's value; in [1] that is r wider
  d_R     r          d_h^R   qk_rope_head_dim      width of the part of query and key with position
  d_c     c          d_c     kv_lora_rank          width of the latent of keys and values
  d_cq    c_q        d_c'    q_lora_rank           width of the latent of queries
  m       h_i                                      heads at work, 1 <= m <= n_h: a budget
  heads   g                                        the budgets of all layers

  tensor  [1]        [2]     shape                 meaning
  q k v   Q K V      q k v   [B, T, n_h, d_h]      query, key and value of every head
  c_Q     C^Q        c^Q     [B, T, d_cq]          latent of the queries, never cached
  c_KV    C^KV       c^KV    [B, T, d_c]           latent of keys and values: cached
  q_C k_C            q^C k^C [B, T, n_h, d_h]      the parts of q and k without position
  q_R                q^R     [B, T, n_h, d_R]      the part of q that RoPE turns, "decoupled"
  k_R                k^R     [B, T, d_R]           the same of k, one for all heads: cached
  o       Attn(...)  o       [B, T, n_h, d_h]      what every head read
  rows                       [B, S, width]         the cache: what each token left, in one row

B sequences, T tokens given now, S tokens so far (S = T without a cache). W_D... leads down to a
latent, W_U... up from it. In einsum b t s h are sequence, token, token so far, head; d c w: widths.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# None: all heads; a number; a tuple, a number per equal part of the batch; a list, one per layer.
Heads = int | tuple | list | None


@dataclass
class Config:
    """Sizes of the model. The defaults are for a laptop. ValueError for sizes that do not fit."""

    attention: str = "matmla"  # one of ATTENTION, below
    vocab_size: int = 257  # bytes, and one token between documents
    context: int = 256  # longest sequence, in tokens
    n_layer: int = 5
    d: int = 144  # width of the model
    n_h: int = 12  # heads
    n_kv: int = 2  # groups of GQA, each with a key and a value
    d_h: int = 20  # width of a head, and of its value
    d_c: int = 64  # width of the latent of keys and values
    d_cq: int = 88  # width of the latent of queries; 0: queries come straight from x
    d_R: int = 16  # width of the decoupled RoPE part
    d_ff: int = 352  # width of the feed-forward layer
    budgets: tuple = (12, 8, 4)  # numbers of heads that are trained, largest first
    rope_base: float = 10000.0
    norm_eps: float = 1e-6  # of every norm
    tie: bool = True  # input and output embedding are one matrix

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention {self.attention!r} is none of {', '.join(ATTENTION)}")
        for name, value in vars(self).items():
            least = 0 if name in ("d_cq", "norm_eps") else 1
            if type(value) in (int, float) and not value >= least:
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        kind = ATTENTION[self.attention]
        turned = "d_R" if issubclass(kind, Latent) else "d_h"
        if getattr(self, turned) % 2:
            raise ValueError(
                f"RoPE turns pairs, but {turned} = {getattr(self, turned)} is not even"
            )
        if issubclass(kind, GQA) and self.n_h % self.n_kv:
            raise ValueError(f"{self.n_h} heads cannot share {self.n_kv} keys and values evenly")


def rope(x, positions, base):
    """Rotary position embedding [3]: pair i of token t turns by positions[t]·base^(-2i/n).

    x [B, T, h, n], n even; positions [T]. Pairs are neighbours, (x0,x1), (x2,x3), ..., as in [2].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot count beyond 256
    i = torch.arange(x.shape[-1] // 2, device=x.device, dtype=dtype)
    angle = positions[:, None, None] * base ** (-2 * i / x.shape[-1])  # [T,1,n/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)


def attend(q, k, v, positions, scale):
    """Softmax attention: o_t = Σ_s softmax_s(q_tᵀ k_s · scale) v_s, over tokens s <= t. (7), (46)

    q [B, T, h, w], k [B, S, g, w], v [B, S, g, w_v]. Where g < h, h/g neighbouring heads share a
    key and value. positions [T]: where the queries stand, the last T of S. Returns [B, T, h, w_v].
    """
    T, S, w_v = q.shape[1], k.shape[1], v.shape[-1]
    visible = torch.arange(S, device=q.device) <= positions[:, None]  # [T,S]

    # Absorbed MLA: new tokens, and all heads read one key. The formula as it stands:
    if k.shape[2] == 1 and T < S:
        scores = torch.einsum("bthw,bsw->bhts", q, k[:, :, 0]) * scale
        p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bsw->bthw", p, v[:, :, 0])

    # The same in one kernel, which never stores p [B,h,T,S]; for a long prompt it would be huge.
    # On a CPU the fast kernel needs v as wide as k. is_causal is the mask for T = S.
    if q.device.type not in ("cuda", "meta"):
        v = F.pad(v, (0, q.shape[-1] - w_v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o = F.scaled_dot_product_attention(
        q, k, v, visible if T < S else None, is_causal=T == S, scale=scale, enable_gqa=True
    )
    return o.transpose(1, 2)[..., :w_v]


def to_heads(W, x, m, width):
    """x [B, T, n] -> [B, T, m, width], by the first m heads of W: its first m·width rows. [1](4)"""
    return F.linear(x, W.weight[: m * width]).unflatten(-1, (m, width))


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight, in the dtype of x, whatever that of the weight is."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """What all have in common: tokens write rows, then each token reads the rows up to its own.

    A variant has its weights and, for m heads, these methods:
      row_width(m)                   how many numbers one token leaves in the cache
      write(x, positions, m)         these numbers, [B, T, row_width]: here the variants differ
      read(x, rows, positions, m)    what tokens x find in the rows of all so far, [B, T, d]
      read_absorbed                  (MLA) the same result, without making keys and values
    """

    nested = False  # True: the first m heads work by themselves
    absorb_below = 0  # fewer new tokens than this are read absorbed, after a cache: see MLA
    attend = staticmethod(attend)  # a layer may be given another way to compute it

    def __init__(self, c):
        super().__init__()
        self.n_h, self.d_h, self.rope_base = c.n_h, c.d_h, c.rope_base
        self.unit = 1 if self.nested else c.n_h  # heads work in multiples of it

    def forward(self, x, heads=None, cache=None):
        """x [B, T, d] -> [B, T, d]. heads: how many work, all if None; a tuple has a number for
        each equal part of the batch. cache: this layer's; the T tokens are appended and see it all.
        ValueError for heads that layer or cache do not allow, and for tokens that do not fit.
        """
        budgets = self.checked_heads(heads, len(x), cache)
        positions = (cache.length if cache else 0) + torch.arange(x.shape[1], device=x.device)
        rows = self.write(x, positions, self.room(cache) if cache else max(budgets))
        rows = cache.append(rows) if cache else rows
        read = self.read_absorbed if cache and x.shape[1] < self.absorb_below else self.read

        # Neighbours with one number are read together: (12, 12, 4) in two thirds and one third.
        parts, first = [], 0
        for m, equal in itertools.groupby(budgets):
            last = first + len(list(equal)) * (len(x) // len(budgets))
            parts.append(read(x[first:last], rows[first:last], positions, m))
            first = last
        return torch.cat(parts)

    def checked_heads(self, heads, batch, cache=None):
        """`heads` as a tuple of numbers. ValueError if layer, batch or cache do not allow them."""
        budgets = heads if isinstance(heads, tuple) else (self.n_h if heads is None else heads,)
        if not budgets or batch % len(budgets):
            raise ValueError(f"{batch} sequences cannot be cut into {len(budgets)} equal parts")
        allowed = range(self.unit, self.room(cache) + 1, self.unit)
        for m in budgets:
            if type(m) is not int or m not in allowed:
                raise ValueError(f"{m!r} heads asked, but {type(self).__name__} takes {[*allowed]}")
        return budgets

    def room(self, cache=None):
        """How many heads can read a row: all; of a cache with a third of MHA's numbers, 4 of 12."""
        full_width = self.row_width(self.n_h)
        return self.n_h * (cache.rows.shape[-1] if cache else full_width) // full_width


class MHA(Attention):
    """Multi-head attention: every head caches its own key and value.

    q_h = RoPE(W_Q,h x)    k_h = RoPE(W_K,h x)    v_h = W_V,h x                   (1)-(6)
    o_h = Σ_s softmax_s(q_hᵀ k_h,s / √d_h) v_h,s    y = W_O (o_1; ...; o_m)       (7) (8)
    """

    def __init__(self, c, n_kv=None):
        super().__init__(c)
        self.n_kv = n_kv or c.n_h
        self.W_Q = nn.Linear(c.d, c.n_h * c.d_h, bias=False)
        self.W_K = nn.Linear(c.d, self.n_kv * c.d_h, bias=False)
        self.W_V = nn.Linear(c.d, self.n_kv * c.d_h, bias=False)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def row_width(self, m):
        return m * 2 * self.d_h

    def write(self, x, positions, m):
        k = rope(to_heads(self.W_K, x, m, self.d_h), positions, self.rope_base)  # (2) [B,T,m,d_h]
        v = to_heads(self.W_V, x, m, self.d_h)  # (3) [B,T,m,d_h]
        return torch.cat((k, v), -1).flatten(2)  # [B,T,m·2·d_h]: head by head, k then v

    def read(self, x, rows, positions, m):
        q = rope(to_heads(self.W_Q, x, m, self.d_h), positions, self.rope_base)  # (1) [B,T,m,d_h]
        rows = rows[..., : self.row_width(m)]  # a row may hold more than m heads
        k, v = rows.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1)  # [B,S,m,d_h] each
        o = self.attend(q, k, v, positions, self.d_h**-0.5)  # (7) [B,T,m,d_h]
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])  # (8)


class Cache:
    """What tokens left in one layer: rows [B, capacity, width], of which `length` are in use."""

    def __init__(self, rows):
        self.rows = rows
        self.length = 0

    @torch.no_grad()
    def append(self, new):
        """Store rows [B, T, width], without gradients; return all so far, [B, S, width]."""
        batch, capacity, _ = self.rows.shape
        stop = self.length + new.shape[1]
        if len(new) != batch or stop > capacity:
            raise ValueError(f"{len(new)} x {stop} tokens do not fit into {batch} x {capacity}")
        self.rows[:, self.length : stop] = new
        self.length = stop
        return self.rows[:, :stop]


class ModelCache(list):
    """One Cache for every layer, all of one length (in tokens). nbytes: the memory they take."""

    length = property(lambda self: self[0].length)
    nbytes = property(lambda self: sum(layer.rows.nbytes for layer in self))

    def rewind(self, length):
        """Forget all but the first `length` tokens. ValueError if there are not so many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a cache of {self.length} tokens to {length}")
        for layer in self:
            layer.length = length


class NestedMHA(MHA):
    """Nested MHA, the cautionary tale: MHA read by its first m heads, which need their own parts.

    A token written with 4 heads left nothing for a later token's heads 5 to 12. Two bad ways out:
      full    (default)  always compute and store all heads: small budgets save no cache
      ragged  (new_cache(..., heads=m))  store m heads: smaller, but no later budget can exceed m
    """

    nested = True


class GQA(MHA):
    """Grouped-query attention [4]: n_kv keys and values, each for n_h / n_kv neighbouring heads.

    o_h = Σ_s softmax_s(q_hᵀ k_g,s / √d_h) v_g,s    with g = h // (n_h / n_kv)
    """

    def __init__(self, c):
        super().__init__(c, c.n_kv)

    def row_width(self, m):
        return self.n_kv * 2 * self.d_h

    def write(self, x, positions, m):
        return super().write(x, positions, self.n_kv)  # the whole row, whatever m


class NestedGQA(GQA):
    """Nested GQA, not in the papers: GQA read by its first m heads. No head writes here either.

    Head h reads group h mod n_kv, so that the first m use all: m is a multiple of n_kv.
    """

    nested = True

    def __init__(self, c):
        super().__init__(c)
        self.unit = c.n_kv

    def read(self, x, rows, positions, m):
        q = rope(to_heads(self.W_Q, x, m, self.d_h), positions, self.rope_base)  # [B,T,m,d_h]
        q = q.unflatten(2, (-1, self.n_kv)).transpose(2, 3).flatten(2, 3)  # group by group
        k, v = rows.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1)  # [B,S,n_kv,d_h] each
        o = self.attend(q, k, v, positions, self.d_h**-0.5)
        o = o.unflatten(2, (self.n_kv, -1)).transpose(2, 3)  # head by head, as W_O wants them
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])


class Latent(Attention):
    """What a token leaves in MLA: a latent for all keys and values, and one key for position.

    c_KV = norm(W_DKV x)  (41), [1](1)    k_R = RoPE(W_KR x)  (43)

    Why position has a key of its own, "decoupled": RoPE inside k_C would turn the key of token s,
    seen from token t, by R(s-t). The score would be q_Cᵀ R(s-t) W_UK c_s, and the query would carry
    W_UKᵀ R(s-t)ᵀ q_C into the latent, another vector for every s: nothing to absorb once for all.
    (A norm of every key, QK-norm, forbids it too. So the latents are normed, as in [2].)
    """

    def __init__(self, c):
        super().__init__(c)
        self.d_c, self.d_R = c.d_c, c.d_R
        self.W_DKV = nn.Linear(c.d, c.d_c, bias=False)
        self.norm_KV = RMSNorm(c.d_c, eps=c.norm_eps)
        self.W_KR = nn.Linear(c.d, c.d_R, bias=False)

    def row_width(self, m):
        return self.d_c + self.d_R

    def write(self, x, positions, m):
        c_KV = self.norm_KV(self.W_DKV(x))  # (41) [B,T,d_c]
        k_R = to_heads(self.W_KR, x, 1, self.d_R)  # [B,T,1,d_R]: one for all heads
        k_R = rope(k_R, positions, self.rope_base).flatten(2)  # (43) [B,T,d_R]
        return torch.cat((c_KV, k_R), -1)  # the whole row, whatever m


class MLA(Latent):
    """Multi-head latent attention [2]: all heads read one cached latent and one key for position.

    c_Q = norm(W_DQ x)          q_h = (W_UQ,h c_Q; RoPE(W_QR,h c_Q))          (37)-(40), [1](3)
    k_h = (W_UK,h c_KV; k_R)    v_h = W_UV,h c_KV                             (42)-(45), [1](2)
    o_h = Σ_s softmax_s(q_hᵀ k_h,s / √(d_h + d_R)) v_h,s                      (46)
    y = W_O (o_1; ...; o_m)                                                   (47), [1](5)
    absorbed: q_Cᵀ (W_UK c) = (W_UKᵀ q_C)ᵀ c    Σ_s p_s (W_UV c_s) = W_UV (Σ_s p_s c_s)
    """

    def __init__(self, c):
        super().__init__(c)
        self.scale = (c.d_h + c.d_R) ** -0.5
        self.W_DQ = nn.Linear(c.d, c.d_cq, bias=False) if c.d_cq else nn.Identity()
        self.norm_Q = RMSNorm(c.d_cq, eps=c.norm_eps) if c.d_cq else nn.Identity()
        self.W_UQ = nn.Linear(c.d_cq or c.d, c.n_h * c.d_h, bias=False)
        self.W_QR = nn.Linear(c.d_cq or c.d, c.n_h * c.d_R, bias=False)
        self.W_UK = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_UV = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)
        # A head reads a cached token for T new ones: absorbed in T·2·d_c multiplications; expanded
        # in 2·d_c·d_h, to make k_C and v_C, and T·2·d_h, to use them. At this T they are equal.
        self.absorb_below = c.d_c * c.d_h / (c.d_c - c.d_h) if c.d_c > c.d_h else torch.inf

    def queries(self, x, positions, m):
        c_Q = self.norm_Q(self.W_DQ(x))  # (37) [B,T,d_cq]
        q_C = to_heads(self.W_UQ, c_Q, m, self.d_h)  # (38) [B,T,m,d_h]
        q_R = to_heads(self.W_QR, c_Q, m, self.d_R)  # (39) [B,T,m,d_R]
        return q_C, rope(q_R, positions, self.rope_base)

    def read(self, x, rows, positions, m):
        c_KV, k_R = rows.split((self.d_c, self.d_R), -1)  # [B,S,d_c], [B,S,d_R]
        k_C = to_heads(self.W_UK, c_KV, m, self.d_h)  # (42) [B,S,m,d_h]
        v_C = to_heads(self.W_UV, c_KV, m, self.d_h)  # (45) [B,S,m,d_h]
        k_R = k_R.unsqueeze(2).expand(-1, -1, m, -1)  # [B,S,m,d_R]: the same for every head
        k = torch.cat((k_C, k_R), -1)  # (44) [B,S,m,d_h+d_R]
        q = torch.cat(self.queries(x, positions, m), -1)  # (40) [B,T,m,d_h+d_R]
        o = self.attend(q, k, v_C, positions, self.scale)  # (46) [B,T,m,d_h]
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])  # (47)

    def read_absorbed(self, x, rows, positions, m):
        q_C, q_R = self.queries(x, positions, m)
        W_UK = self.W_UK.weight.unflatten(0, (-1, self.d_h))[:m]  # [m,d_h,d_c]
        W_UV = self.W_UV.weight.unflatten(0, (-1, self.d_h))[:m]  # [m,d_h,d_c]
        # The query enters the latent: W_UKᵀ q_C. There the row is the key, and its c_KV the value.
        q_latent = torch.einsum("bthd,hdc->bthc", q_C, W_UK)  # [B,T,m,d_c]
        q = torch.cat((q_latent, q_R), -1)  # [B,T,m,d_c+d_R]
        k = rows.unsqueeze(2)  # [B,S,1,d_c+d_R]
        o = self.attend(q, k, k[..., : self.d_c], positions, self.scale)  # (46) Σ p c [B,T,m,d_c]
        o = torch.einsum("bthc,hdc->bthd", o, W_UV)  # W_UV Σ p c, [B,T,m,d_h]
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])  # (47)


class MatMLA(MLA):
    """Matryoshka MLA [1]: MLA read by its first m heads. The rest is training: see train.py.

    `write` makes no use of m, so there is one cache of one shape, and m may change at any token.
    A budget cuts rows of W_UQ, W_QR, W_UK and W_UV, and columns of W_O. [1](4) (5)
    """

    nested = True


ATTENTION = {"mha": MHA, "nested_mha": NestedMHA, "gqa": GQA, "nested_gqa": NestedGQA}
ATTENTION |= {"mla": MLA, "matmla": MatMLA}


class Block(nn.Module):
    """Attention, then a feed-forward layer (SwiGLU, arXiv:2002.05202), each added to its input."""

    def __init__(self, c):
        super().__init__()
        self.norm_attention = RMSNorm(c.d, eps=c.norm_eps)
        self.attention = ATTENTION[c.attention](c)
        self.norm_feed_forward = RMSNorm(c.d, eps=c.norm_eps)
        self.W_gate = nn.Linear(c.d, c.d_ff, bias=False)
        self.W_up = nn.Linear(c.d, c.d_ff, bias=False)
        self.W_down = nn.Linear(c.d_ff, c.d, bias=False)

    def forward(self, x, heads=None, cache=None):
        x = x + self.attention(self.norm_attention(x), heads, cache)
        y = self.norm_feed_forward(x)
        return x + self.W_down(F.silu(self.W_gate(y)) * self.W_up(y))


class GPT(nn.Module):
    """A Llama-style language model around one of the attentions. GPT(config)."""

    residual_dtype = None  # dtype of the residual stream; None: that of the weights

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d, eps=config.norm_eps)
        self.unembed = nn.Linear(config.d, config.vocab_size, bias=False)
        if config.tie:
            self.unembed.weight = self.embed.weight
        # What adds to the residual stream starts smaller, as in GPT-2: the sum must not grow.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                adds = name.endswith(("W_O.weight", "W_down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if adds else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor = None, heads: Heads = None, cache=None):
        """tokens [B, T] -> logits [B, T, vocab_size], and the mean loss in nats for targets [B,T].

        heads: as in Attention.forward, or a list with one of these for each layer. The tokens are
        appended to the ModelCache, if given. ValueError for heads that are not allowed, for tokens
        that do not fit or, on a CPU, are not in the vocabulary; the cache then stays as it was.
        """
        logits = self.unembed(self.hidden(tokens, heads, cache))
        return logits, None if targets is None else self.loss(logits, targets)

    def hidden(self, tokens: Tensor, heads: Heads = None, cache=None) -> Tensor:
        """What the last layer leaves, normed: [B, T, d]."""
        before, context = cache.length if cache else 0, self.config.context
        if tokens.dim() != 2 or before + tokens.shape[1] > context:
            raise ValueError(f"{before} + {[*tokens.shape]} tokens do not fit [B, {context}]")
        layers = self.layer_heads(heads, len(tokens), cache)
        try:
            x = self.embed(tokens).to(self.residual_dtype or self.embed.weight.dtype)
        except IndexError:
            raise ValueError(f"a token is outside of 0..{self.config.vocab_size - 1}") from None
        for block, budgets, layer in zip(self.blocks, layers, cache or [None] * len(layers)):
            x = block(x, budgets, layer)
        return self.norm(x)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [B, T, vocab_size], targets [B, T] -> mean loss in nats, in float32 at least."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(exact.flatten(0, 1), targets.flatten())

    def layer_heads(self, heads: Heads, batch: int, cache=None) -> list:
        """`heads` as a list of tuples, one for each layer. ValueError if they are not allowed."""
        n = len(self.blocks)
        heads = heads if isinstance(heads, list) else [heads] * n
        if len(heads) != n:
            raise ValueError(f"heads for {len(heads)} layers, but the model has {n}")
        return [
            block.attention.checked_heads(m, batch, layer)
            for block, m, layer in zip(self.blocks, heads, cache or [None] * n)
        ]

    def new_cache(self, batch: int, capacity: int, heads: Heads = None) -> ModelCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens, of the weights' dtype.

        Only nested MHA's depends on heads: by default it is full; heads=m makes the ragged one.
        """
        if batch < 0 or capacity < 0:
            raise ValueError(f"there is no cache for {batch} sequences of {capacity} tokens")
        rows = [
            self.embed.weight.new_zeros(batch, capacity, block.attention.row_width(max(budgets)))
            for block, budgets in zip(self.blocks, self.layer_heads(heads, batch))
        ]
        return ModelCache(map(Cache, rows))

    def step(self, tokens: Tensor, heads: Heads, cache: ModelCache) -> Tensor:
        """Logits [B, vocab_size] of what comes after tokens [B, T], which the cache takes in."""
        return self.unembed(self.hidden(tokens, heads, cache)[:, -1])

    @torch.no_grad()
    def stream(self, tokens: Tensor, n: int, heads: Heads = None, schedule=None, **sampling):
        """Yield n new tokens, each [B], after tokens [B, T], as `sample` draws them (**sampling).

        heads: as in forward. schedule: instead, a list with the heads of every new token; the
        prompt is read with the first. Of a long prompt the last `context` tokens are read. When the
        context is full, its older half is forgotten. ValueError for heads that are not allowed.
        """
        if schedule is not None and (heads is not None or len(schedule) != n):
            raise ValueError(f"a schedule of {len(schedule)}, not {n}, or with heads {heads}, too")
        for entry, _ in itertools.groupby([heads] if schedule is None else schedule):
            self.layer_heads(entry, len(tokens))
        if tokens.shape[1] == 0:
            raise ValueError("0 tokens to continue")
        context = self.config.context
        new = tokens = tokens[:, -context:]
        cache = self.new_cache(len(tokens), min(context, tokens.shape[1] + n))
        for i in range(n):
            if cache.length == context:
                new = tokens[:, -max(context // 2, 1) :]
                cache.rewind(0)
            new = sample(self.step(new, schedule[i] if schedule else heads, cache), **sampling)
            tokens = torch.cat((tokens, new), 1)[:, -context:]
            yield new[:, 0]

    def generate(self, tokens: Tensor, n: int, heads: Heads = None, **keywords) -> Tensor:
        """tokens [B, T] -> [B, T + n]: the prompt and n new tokens. Keywords as in `stream`."""
        return torch.stack((*tokens.T, *self.stream(tokens, n, heads, **keywords)), 1)


def sample(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """logits [B, vocab_size] -> tokens [B, 1], at temperature 0 the most likely ones.

    Else logits are divided by the temperature, then the top_k most likely tokens stay, then the
    fewest of these that together have the probability top_p. ValueError for what is out of range.
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise ValueError(f"out of range: temperature {temperature}, top_k {top_k} or top_p {top_p}")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, tokens = logits.float().sort(descending=True, stable=True)
    logits = (logits - logits[:, :1]) / max(temperature, 1e-30)
    p = logits[:, :top_k].softmax(-1)
    p = p * (p.cumsum(-1) - p < max(top_p, 1e-30))  # till the more likely ones have top_p
    i = torch.multinomial(p, 1, generator=generator)

    last = (p > 0).sum(-1, keepdim=True) - 1  # those that stay are the first; take no other
    return tokens.gather(-1, i.minimum(last))
