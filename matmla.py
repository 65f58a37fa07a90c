"""
MatMLA in one file: MHA, nested MHA, GQA, MLA and MatMLA side by side, to be read next to the papers.

References
  [1] Matryoshka Multi-Head Latent Attention (MatMLA). openreview.net/forum?id=TuHltnpNUo
  [2] DeepSeek-V2, 2024. arXiv:2405.04434. Equation numbers (1)-(8) are its MHA, (37)-(47) its appendix C.
  [3] TransMLA: Multi-head Latent Attention Is All You Need, 2025. arXiv:2502.07864
  [4] RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021. arXiv:2104.09864
  [5] GQA: Training Generalized Multi-Query Transformer Models, 2023. arXiv:2305.13245

Glossary
  code        paper [2]    shape                  meaning
  x           h_t          [B, T, d]              what enters the layer, one vector per token
  q, k, v     q, k, v      [B, T, n_h, d_h]       query, key, value of every head
  c_Q         c^Q          [B, T, d_cq]           latent of the queries (never cached)
  c_KV        c^KV         [B, T, d_c]            latent of keys and values: cached
  q_C, k_C    q^C, k^C     [B, T, n_h, d_h]       the part of q and k without position
  q_R         q^R          [B, T, n_h, d_R]       the part of q that RoPE rotates, "decoupled"
  k_R         k^R          [B, T, d_R]            the part of k that RoPE rotates, one for all heads: cached
  o           o            [B, T, n_h, d_h]       what every head read
  m           -            int, or [B]            heads in use: the budget, 1 <= m <= n_h, of [1]
  memory      -            [B, S, numbers]        one row of numbers per token: what is in the cache

  In comments B is the batch, T the tokens given now, S the tokens seen so far (S = T without a cache), h the
  heads at work: n_h, or the budget m where a variant is nested.
  In einsum b, t, h, d, c are batch, token, head, head width, latent width.

Every attention below has the same beats in the same order, so that `diff` of two neighbours is the idea:
  __init__       the weights, named as in [2]
  numbers        how many numbers one token leaves in the cache
  write          what a token leaves there: the whole point of the latent
  read           how a query uses what all tokens left
  read_absorbed  (latents only) the same result, without ever making keys and values

On a GPU, GPT.stream takes the same steps faster, with decode.py; nothing there is needed to understand this file.
"""

import functools
import itertools
import operator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Sizes of the model. The defaults are for a laptop: 0.97M parameters, trained in about two minutes."""

    attention: str = "matmla"      # one of ATTENTION, at the end of the attentions
    vocab_size: int = 257          # bytes, and one token between documents
    context: int = 256             # longest sequence, in tokens
    n_layer: int = 4
    d: int = 144                   # width of the model
    n_h: int = 12                  # heads
    n_kv: int = 4                  # key/value heads of GQA
    d_h: int = 12                  # width of one head, of its values too
    d_c: int = 40                  # width of the latent of keys and values
    d_cq: int = 72                 # width of the latent of queries; 0: queries come straight from x
    d_R: int = 8                   # width of the decoupled RoPE part
    d_ff: int = 384                # width of the feed-forward layer
    budgets: tuple = (12, 8, 4)    # head budgets that are trained, largest first
    rope_base: float = 10000.0
    rope_width: int = 0            # the frequencies of k_R start anew after this many numbers; 0: never
    tie: bool = True               # input and output embedding are one matrix
    qkv_bias: bool = False         # a bias where x becomes queries, keys, values and latents
    norm_latents: bool = True
    norm_eps: float = 1e-6         # of every norm

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention {self.attention!r} is none of {', '.join(ATTENTION)}")
        for name, value in vars(self).items():
            least = 0 if name in ("d_cq", "rope_width") else 1
            if type(value) is int and value < least:                            # not bool, which is an int too
                raise ValueError(f"{name} is {value}, at least {least} is needed")
            if type(value) is float and not value > 0:
                raise ValueError(f"{name} is {value}, it must be above 0")


# ---------------------------------------------------------------- norm, position, softmax, budget, cache


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with its weight in the dtype of x: under autocast the fused kernel wants them equal."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rope(x, positions, base, width=0):
    """Rotary position embedding [4]: pair i of token t turns by the angle positions[t]·base^(-2i/width).

    x [B, T, ..., n], n even; positions [T]. Pairs are interleaved, (x0,x1), (x2,x3), ..., as in [2] and [4].
    width: n by default; an even part of it makes the frequencies repeat, as for several keys side by side.
    """
    width = width or x.shape[-1]
    x = x.transpose(1, -2)                                                      # tokens next to the pairs
    dtype = torch.promote_types(x.dtype, torch.float32)                         # bfloat16 cannot count past 256
    exponent = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype) % width / width
    angle = positions.to(dtype)[:, None] * base**-exponent                      # [T, width/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x0, x1 = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)
    return turned.transpose(1, -2)


def attend(q, k, v, positions, scale):
    """(7), (46): o = softmax(qᵀk · scale) v, each query over the keys up to its own position.

    q [B, T, n, w], k [B, S, n_kv, w], v [B, S, n_kv, w_v] with n a multiple of n_kv: neighbouring
    query heads share a key head. positions [T] of the queries; a key's position is its place among the S.
    Returns [B, T, n, w_v].
    """
    T, S, group, w_v = q.shape[1], k.shape[1], q.shape[2] // k.shape[2], v.shape[-1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # [B,n,T,w], [B,n_kv,S,·]
    if q.device.type == "cpu":
        v = F.pad(v, (0, q.shape[-1] - w_v))                                    # the CPU's fast kernel wants one width
    if T == S:                                                                  # a whole sequence: this mask has a fast path
        k, v = (t.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:                                                                       # a chunk after a cache
        q = q.unflatten(1, (-1, group)).flatten(2, 3)                           # heads of a group: just more queries
        past = torch.arange(S, device=q.device) <= positions[:, None]           # [T,S]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=past.repeat(group, 1), scale=scale)
        o = o.unflatten(2, (group, -1)).flatten(1, 2)
    return o[..., :w_v].transpose(1, 2)


def slice_width(heads, n_h):
    """How many heads to compute: the budget, or all n_h if `heads` is a tensor of one budget per sequence."""
    return heads if isinstance(heads, int) else n_h


def first_rows(W, x, n):
    """The first n numbers of W(x), without computing the others."""
    if type(W) is not nn.Linear:
        return W(x)[..., :n]                                                    # decode.py has computed them already
    return F.linear(x, W.weight[:n], None if W.bias is None else W.bias[:n])


def mask_heads(o, heads):
    """With one budget per sequence, heads [B], zero what the heads beyond it read. o [B, T, n_h, d_h]."""
    if isinstance(heads, int):
        return o                                                                # they were not even computed
    return o * (torch.arange(o.shape[2], device=o.device) < heads[:, None])[:, None, :, None]


class Cache:
    """What the tokens so far left behind: one row of numbers each, in memory that is allocated once.

    rows [n_layer, B, capacity, numbers] for a model, [B, capacity, numbers] for one layer; `length` rows
    are in use. `heads`: how many heads a row has room for; fewer than all only in nested MHA's ragged cache.
    No gradient flows through a cache.
    """

    def __init__(self, rows, heads, length=0):
        self.rows, self.heads, self.length = rows, heads, length

    @property
    def nbytes(self):
        return self.rows.nbytes

    def layer(self, i):
        return Cache(self.rows[i], self.heads, self.length)

    def positions(self, T):
        """Of the next T tokens, [T]."""
        return torch.arange(self.length, self.length + T, device=self.rows.device)

    @torch.no_grad()
    def append(self, new):
        """Store new rows [B, T, numbers]; return all rows so far, [B, S, numbers]. ValueError if they do not fit."""
        batch, capacity, _ = self.rows.shape
        if new.shape[0] != batch:
            raise ValueError(f"a batch of {new.shape[0]} does not fit a cache for a batch of {batch}")
        if self.length + new.shape[1] > capacity:
            raise ValueError(f"{self.length + new.shape[1]} tokens overfill a cache for {capacity}")
        self.rows[:, self.length : self.length + new.shape[1]] = new
        self.length += new.shape[1]
        return self.rows[:, : self.length]


# ---------------------------------------------------------------- the five attentions


class Attention(nn.Module):
    """What the variants share: tokens write rows, then read the rows of all tokens so far. Not in any paper.

    A variant defines numbers(heads) -> int, write(x, positions, heads) -> rows [B, T, numbers], and
    read(x, memory, positions, heads) -> [B, T, d]; `heads` says how many to write or read.
    """

    nested = False    # True: the first m heads alone are a working attention, for every m
    short = 0         # fewer new tokens than this, read from a cache, are read absorbed
    attend = staticmethod(attend)    # decode.py has a faster one for one new token on a GPU

    def forward(self, x, heads=None, cache=None):
        """x [B, T, d] -> [B, T, d]. heads: the budget, all heads if None; or one budget per sequence or part of the batch.

        int                one budget for all: the weights are sliced, so that compute shrinks
        LongTensor [B]     one per sequence: all heads are computed, and a mask drops some
        tuple              one per equal part of the batch: every part is sliced; for training, so without a cache
        cache: a Cache of this layer, to which the T tokens are appended. ValueError for a budget outside 1..n_h,
        for one other than n_h without nesting, for parts that are not equal, and for a cache that is too small.
        """
        if isinstance(heads, tuple):
            if cache is not None or not heads or len(x) % len(heads):
                raise ValueError(f"{len(x)} sequences are not {len(heads)} equal parts without a cache")
            runs = [(m, len(list(same))) for m, same in itertools.groupby(heads)]   # (12, 12, 4) is two slices, not three
            parts = x.split([n * len(x) // len(heads) for _, n in runs])
            return torch.cat([self(part, m) for part, (m, _) in zip(parts, runs)])
        heads = self.check(heads, x.shape[0])
        if cache is None:
            positions = torch.arange(x.shape[1], device=x.device)
            return self.read(x, self.write(x, positions, heads), positions, heads)
        positions = cache.positions(x.shape[1])
        memory = cache.append(self.write(x, positions, cache.heads))
        read = self.read_absorbed if x.shape[1] < self.short else self.read
        return read(x, memory, positions, heads)

    def check(self, heads, batch):
        """`heads` if this attention can use it, all heads if None, else a ValueError that names both numbers."""
        if heads is None:
            return self.n_h
        if isinstance(heads, torch.Tensor):
            if heads.shape != (batch,):
                raise ValueError(f"heads has shape {list(heads.shape)}, but there are {batch} sequences")
            if torch.compiler.is_compiling() or heads.device.type != "cpu" and self.nested:
                return heads                                                    # to look at it would stall the GPU
            budgets = heads.tolist()
        else:
            budgets = [heads := operator.index(heads)]
        least, works_with = (1, f"1 to {self.n_h}") if self.nested else (self.n_h, self.n_h)
        for m in budgets:
            if not least <= m <= self.n_h:
                raise ValueError(f"{m} heads asked, but {type(self).__name__} works with {works_with}")
        return heads


class MHA(Attention):
    """Multi-head attention: every head caches its own key and value."""

    def __init__(self, c):
        super().__init__()
        self.n_h, self.d_h, self.rope_base = c.n_h, c.d_h, c.rope_base
        even("d_h", c.d_h)
        self.W_Q = nn.Linear(c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_K = nn.Linear(c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_V = nn.Linear(c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def numbers(self, heads):
        return 2 * self.n_h * self.d_h

    def write(self, x, positions, heads):
        k = self.W_K(x).unflatten(-1, (-1, self.d_h))                           # (2) (5) [B,T,h,d_h]
        v = self.W_V(x).unflatten(-1, (-1, self.d_h))                           # (3) (6)
        k = rope(k, positions, self.rope_base)
        return torch.cat((k, v), -1).flatten(2)                                 # [B,T,h·2·d_h]: head by head, k then v

    def read(self, x, memory, positions, heads):
        k, v = memory.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1)            # [B,S,h,d_h] each
        q = self.W_Q(x).unflatten(-1, (-1, self.d_h))                           # (1) (4)
        q = rope(q, positions, self.rope_base)
        o = self.attend(q, k, v, positions, self.d_h**-0.5)                     # (7)
        return self.W_O(o.flatten(2))                                           # (8)


class NestedMHA(Attention):
    """Nested MHA, the cautionary tale: a budget m uses the first m heads, so it changes what a token writes.

    A token written with 4 heads has left nothing for heads 5 to 12 of a later token. Two ways out, both bad:
      full     (default)  always compute and store all heads: small budgets save no cache
      ragged   (new_cache(..., heads=m))  store m heads: smaller, but no later budget can exceed m
    """

    nested = True

    def __init__(self, c):
        super().__init__()
        self.n_h, self.d_h, self.rope_base = c.n_h, c.d_h, c.rope_base
        even("d_h", c.d_h)
        self.W_Q = nn.Linear(c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_K = nn.Linear(c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_V = nn.Linear(c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def numbers(self, heads):
        return 2 * heads * self.d_h

    def write(self, x, positions, heads):
        m = slice_width(heads, self.n_h)
        k = first_rows(self.W_K, x, m * self.d_h).unflatten(-1, (-1, self.d_h))  # (2) (5)
        v = first_rows(self.W_V, x, m * self.d_h).unflatten(-1, (-1, self.d_h))  # (3) (6)
        k = rope(k, positions, self.rope_base)
        return torch.cat((k, v), -1).flatten(2)                                 # [B,T,h·2·d_h]: head by head, k then v

    def read(self, x, memory, positions, heads):
        m = slice_width(heads, self.n_h)
        k, v = memory.unflatten(-1, (-1, 2 * self.d_h))[:, :, :m].chunk(2, -1)  # [B,S,h,d_h] each
        if k.shape[2] < m:
            raise ValueError(f"{m} heads asked, but the tokens so far left keys and values for {k.shape[2]}")
        q = first_rows(self.W_Q, x, m * self.d_h).unflatten(-1, (-1, self.d_h))  # (1) (4)
        q = rope(q, positions, self.rope_base)
        o = mask_heads(self.attend(q, k, v, positions, self.d_h**-0.5), heads)  # (7)
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])       # (8)


class GQA(Attention):
    """Grouped-query attention [5]: n_kv keys and values, each shared by n_h / n_kv neighbouring query heads."""

    def __init__(self, c):
        super().__init__()
        self.n_h, self.d_h, self.rope_base = c.n_h, c.d_h, c.rope_base
        even("d_h", c.d_h)
        if c.n_h % c.n_kv:
            raise ValueError(f"{c.n_h} heads cannot share {c.n_kv} key/value heads evenly")
        self.n_kv = c.n_kv
        self.W_Q = nn.Linear(c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_K = nn.Linear(c.d, c.n_kv * c.d_h, bias=c.qkv_bias)
        self.W_V = nn.Linear(c.d, c.n_kv * c.d_h, bias=c.qkv_bias)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def numbers(self, heads):
        return 2 * self.n_kv * self.d_h

    def write(self, x, positions, heads):
        k = self.W_K(x).unflatten(-1, (-1, self.d_h))                           # [B,T,n_kv,d_h]
        v = self.W_V(x).unflatten(-1, (-1, self.d_h))
        k = rope(k, positions, self.rope_base)
        return torch.cat((k, v), -1).flatten(2)                                 # [B,T,n_kv·2·d_h]: head by head, k then v

    def read(self, x, memory, positions, heads):
        k, v = memory.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1)            # [B,S,n_kv,d_h] each
        q = self.W_Q(x).unflatten(-1, (-1, self.d_h))
        q = rope(q, positions, self.rope_base)
        o = self.attend(q, k, v, positions, self.d_h**-0.5)                     # head h reads k, v of h // (n_h / n_kv)
        return self.W_O(o.flatten(2))


class MLA(Attention):
    """Multi-head latent attention [2]: all heads read one cached latent, and one cached key for position.

    There is no norm on q and k: between W_UK and the score it would forbid absorption. The latents are normed.
    """

    def __init__(self, c):
        super().__init__()
        self.n_h, self.d_h, self.d_c, self.d_R, self.rope_base = c.n_h, c.d_h, c.d_c, c.d_R, c.rope_base
        self.rope_width = c.rope_width or c.d_R
        even("d_R", c.d_R)
        even("rope_width", self.rope_width)
        self.scale = (c.d_h + c.d_R) ** -0.5
        self.short = absorb_below(c.d_c, c.d_h)
        self.W_DQ = nn.Linear(c.d, c.d_cq, bias=False) if c.d_cq else nn.Identity()
        self.norm_Q = RMSNorm(c.d_cq, eps=c.norm_eps) if c.d_cq and c.norm_latents else nn.Identity()
        self.W_UQ = nn.Linear(c.d_cq or c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_QR = nn.Linear(c.d_cq or c.d, c.n_h * c.d_R, bias=c.qkv_bias)
        self.W_DKV = nn.Linear(c.d, c.d_c, bias=c.qkv_bias)
        self.norm_KV = RMSNorm(c.d_c, eps=c.norm_eps) if c.norm_latents else nn.Identity()
        self.W_KR = nn.Linear(c.d, c.d_R, bias=c.qkv_bias)
        self.W_UK = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_UV = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def numbers(self, heads):
        return self.d_c + self.d_R

    def write(self, x, positions, heads):
        c_KV = self.norm_KV(self.W_DKV(x))                                      # (41) [B,T,d_c]
        k_R = rope(self.W_KR(x), positions, self.rope_base, self.rope_width)    # (43) [B,T,d_R]
        return torch.cat((c_KV, k_R), -1)                                       # [B,T,d_c+d_R]: the whole cache row

    def queries(self, x, positions, heads):
        c_Q = self.norm_Q(self.W_DQ(x))                                         # (37) [B,T,d_cq]
        q_C = self.W_UQ(c_Q).unflatten(-1, (-1, self.d_h))                      # (38) [B,T,h,d_h]
        q_R = self.W_QR(c_Q).unflatten(-1, (-1, self.d_R))                      # (39) [B,T,h,d_R]
        return q_C, rope(q_R, positions, self.rope_base, self.rope_width)

    def read(self, x, memory, positions, heads):
        c_KV, k_R = memory.split((self.d_c, self.d_R), -1)
        k_C = self.W_UK(c_KV).unflatten(-1, (-1, self.d_h))                     # (42) [B,S,h,d_h]
        v_C = self.W_UV(c_KV).unflatten(-1, (-1, self.d_h))                     # (45) [B,S,h,d_h]
        k_R = k_R.unsqueeze(2).expand(-1, -1, k_C.shape[2], -1)                 # one key for all heads
        k = torch.cat((k_C, k_R), -1)                                           # (44) [B,S,h,d_h+d_R]
        q = torch.cat(self.queries(x, positions, heads), -1)                    # (40) [B,T,h,d_h+d_R]
        o = self.attend(q, k, v_C, positions, self.scale)                       # (46) [B,T,h,d_h]
        return self.W_O(o.flatten(2))                                           # (47)

    def read_absorbed(self, x, memory, positions, heads):
        W_UK = self.W_UK.weight.unflatten(0, (-1, self.d_h))                    # [h,d_h,d_c]
        W_UV = self.W_UV.weight.unflatten(0, (-1, self.d_h))
        q_C, q_R = self.queries(x, positions, heads)
        q_latent = torch.einsum("bthd,hdc->bthc", q_C, W_UK)                    # q_Cᵀ(W_UK c) = (W_UKᵀ q_C)ᵀc
        q = torch.cat((q_latent, q_R), -1)                                      # [B,T,h,d_c+d_R], as wide as a row:
        row = memory.unsqueeze(2)                                               # the row is key and value of all heads
        o_latent = self.attend(q, row, row, positions, self.scale)[..., : self.d_c]  # (46), in the latent [B,T,h,d_c]
        o = torch.einsum("bthc,hdc->bthd", o_latent, W_UV)                      # Σ p (W_UV c) = W_UV Σ p c
        return self.W_O(o.flatten(2))                                           # (47)


class MatMLA(Attention):
    """Matryoshka MLA [1]: a budget m uses the first m heads of MLA. `write` knows no heads, so the cache stays as it is.

    One set of weights and one cache of one shape; m may change from token to token, in both directions.
    """

    nested = True

    def __init__(self, c):
        super().__init__()
        self.n_h, self.d_h, self.d_c, self.d_R, self.rope_base = c.n_h, c.d_h, c.d_c, c.d_R, c.rope_base
        self.rope_width = c.rope_width or c.d_R
        even("d_R", c.d_R)
        even("rope_width", self.rope_width)
        self.scale = (c.d_h + c.d_R) ** -0.5
        self.short = absorb_below(c.d_c, c.d_h)
        self.W_DQ = nn.Linear(c.d, c.d_cq, bias=False) if c.d_cq else nn.Identity()
        self.norm_Q = RMSNorm(c.d_cq, eps=c.norm_eps) if c.d_cq and c.norm_latents else nn.Identity()
        self.W_UQ = nn.Linear(c.d_cq or c.d, c.n_h * c.d_h, bias=c.qkv_bias)
        self.W_QR = nn.Linear(c.d_cq or c.d, c.n_h * c.d_R, bias=c.qkv_bias)
        self.W_DKV = nn.Linear(c.d, c.d_c, bias=c.qkv_bias)
        self.norm_KV = RMSNorm(c.d_c, eps=c.norm_eps) if c.norm_latents else nn.Identity()
        self.W_KR = nn.Linear(c.d, c.d_R, bias=c.qkv_bias)
        self.W_UK = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_UV = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def numbers(self, heads):
        return self.d_c + self.d_R

    def write(self, x, positions, heads):
        c_KV = self.norm_KV(self.W_DKV(x))                                      # (41) [B,T,d_c]
        k_R = rope(self.W_KR(x), positions, self.rope_base, self.rope_width)    # (43) [B,T,d_R]
        return torch.cat((c_KV, k_R), -1)                                       # [B,T,d_c+d_R]: the whole cache row

    def queries(self, x, positions, heads):
        m = slice_width(heads, self.n_h)
        c_Q = self.norm_Q(self.W_DQ(x))                                         # (37) [B,T,d_cq]
        q_C = first_rows(self.W_UQ, c_Q, m * self.d_h).unflatten(-1, (-1, self.d_h))  # (38)
        q_R = first_rows(self.W_QR, c_Q, m * self.d_R).unflatten(-1, (-1, self.d_R))  # (39)
        return q_C, rope(q_R, positions, self.rope_base, self.rope_width)

    def read(self, x, memory, positions, heads):
        m = slice_width(heads, self.n_h)
        c_KV, k_R = memory.split((self.d_c, self.d_R), -1)
        k_C = first_rows(self.W_UK, c_KV, m * self.d_h).unflatten(-1, (-1, self.d_h))  # (42)
        v_C = first_rows(self.W_UV, c_KV, m * self.d_h).unflatten(-1, (-1, self.d_h))  # (45)
        k_R = k_R.unsqueeze(2).expand(-1, -1, k_C.shape[2], -1)                 # one key for all heads
        k = torch.cat((k_C, k_R), -1)                                           # (44) [B,S,h,d_h+d_R]
        q = torch.cat(self.queries(x, positions, heads), -1)                    # (40) [B,T,h,d_h+d_R]
        o = mask_heads(self.attend(q, k, v_C, positions, self.scale), heads)    # (46)
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])       # (47)

    def read_absorbed(self, x, memory, positions, heads):
        m = slice_width(heads, self.n_h)
        W_UK = self.W_UK.weight[: m * self.d_h].unflatten(0, (-1, self.d_h))    # [h,d_h,d_c]
        W_UV = self.W_UV.weight[: m * self.d_h].unflatten(0, (-1, self.d_h))
        q_C, q_R = self.queries(x, positions, heads)
        q_latent = torch.einsum("bthd,hdc->bthc", q_C, W_UK)                    # q_Cᵀ(W_UK c) = (W_UKᵀ q_C)ᵀc
        q = torch.cat((q_latent, q_R), -1)                                      # [B,T,h,d_c+d_R], as wide as a row:
        row = memory.unsqueeze(2)                                               # the row is key and value of all heads
        o_latent = self.attend(q, row, row, positions, self.scale)[..., : self.d_c]  # (46), in the latent [B,T,h,d_c]
        o = mask_heads(torch.einsum("bthc,hdc->bthd", o_latent, W_UV), heads)   # Σ p (W_UV c) = W_UV Σ p c
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])       # (47)


ATTENTION = {"mha": MHA, "nested_mha": NestedMHA, "gqa": GQA, "mla": MLA, "matmla": MatMLA}


def even(name, width):
    if width % 2:
        raise ValueError(f"RoPE rotates pairs: {name} = {width} is not 2, 4, 6, ...; try {width + 1}")


def absorb_below(d_c, d_h):
    """The number of new tokens T below which absorption costs fewer multiplications, for many cached tokens S.

    Per head and cached token: naive makes k_C and v_C, 2·d_c·d_h, then scores and sums, T·2·d_h; absorbed
    only scores and sums, but in the latent, T·2·d_c. Equal at T = d_c·d_h / (d_c - d_h). Not in paper.
    """
    return d_c * d_h / (d_c - d_h) if d_c > d_h else float("inf")


# ---------------------------------------------------------------- the model around it


class FeedForward(nn.Module):
    """SwiGLU, arXiv:2002.05202."""

    def __init__(self, c):
        super().__init__()
        self.W_gate = nn.Linear(c.d, c.d_ff, bias=False)
        self.W_up = nn.Linear(c.d, c.d_ff, bias=False)
        self.W_down = nn.Linear(c.d_ff, c.d, bias=False)

    def forward(self, x):
        return self.W_down(F.silu(self.W_gate(x)) * self.W_up(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm_attention = RMSNorm(c.d, eps=c.norm_eps)
        self.attention = ATTENTION[c.attention](c)
        self.norm_feed_forward = RMSNorm(c.d, eps=c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x, heads, cache):
        x = x + self.attention(self.norm_attention(x), heads, cache)
        return x + self.feed_forward(self.norm_feed_forward(x))


class GPT(nn.Module):
    """A Llama-style language model around one of the attentions. GPT(config)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d, eps=config.norm_eps)
        self.unembed = nn.Linear(config.d, config.vocab_size, bias=False)
        if config.tie:
            self.unembed.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:                                                    # smaller where a layer adds to the residual
                into_residual = name.endswith(("W_O.weight", "W_down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, targets=None, heads=None, cache=None):
        """tokens [B, T] -> logits [B, T, vocab_size] and, if targets [B, T], the next tokens, are given, the mean loss in nats.

        With targets the gradient flows through the loss only.

        heads: as in Attention.forward. cache: from new_cache; the tokens are appended and see all before them.
        ValueError for a token outside the vocabulary (on the CPU), more tokens than the context or the cache
        holds, or a budget the attention does not have; the cache is then as it was.
        """
        logits = self.unembed(self.hidden(tokens, heads, cache))
        return (logits, None) if targets is None else (logits.detach(), self.loss(logits, targets))

    def loss(self, logits, targets):
        """logits [B, T, vocab_size], targets [B, T] -> mean loss in nats."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))     # bfloat16 is too coarse for a sum of exp
        return F.cross_entropy(exact.flatten(0, 1), targets.flatten())

    def hidden(self, tokens, heads=None, cache=None, blocks=None):
        """What the last layer leaves, normed, [B, T, d]: `forward` without the vocabulary. blocks: to run instead."""
        c = self.config
        length = tokens.shape[1] + (cache.length if cache else 0)
        if length > c.context:
            raise ValueError(f"{length} tokens exceed the context of {c.context}")
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = tokens.aminmax()
            if low < 0 or high >= c.vocab_size:
                raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {c.vocab_size}")
        x = self.embed(tokens)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))                   # the residual stream: half the traffic
        for i, block in enumerate(blocks or self.blocks):
            x = block(x, heads, cache and cache.layer(i))
        if cache:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def new_cache(self, batch, capacity, heads=None):
        """An empty Cache for `batch` sequences of up to `capacity` tokens, in the weights' dtype and device.

        Its size is the attention's numbers(heads) per token and layer. Only nested MHA's depends on heads:
        by default the full one; with heads=m the ragged one, smaller, which no budget above m can read.
        """
        attention = self.blocks[0].attention
        heads = slice_width(attention.check(heads, batch), self.config.n_h)
        shape = len(self.blocks), batch, capacity, attention.numbers(heads)
        return Cache(self.embed.weight.new_zeros(shape), heads)

    @torch.no_grad()
    def stream(self, tokens, n, heads=None, temperature=1.0, top_k=None, top_p=1.0, generator=None):
        """Yield n new tokens, each [B], after tokens [B, T], T >= 1. After the prompt, a step computes one token.

        heads: one budget for all, as in forward, or a list of n budgets, one per new token (the prompt is read
        at the first). temperature 0 is greedy; top_k and top_p keep the most likely tokens, so many or of so much
        probability together. Past the context the older half of the text is forgotten.
        """
        if tokens.shape[1] == 0:
            raise ValueError("the prompt has 0 tokens, at least 1 is needed")
        if not temperature >= 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} is below 0, top_k {top_k} below 1, or top_p {top_p} not in 0..1")
        heads = heads.to(tokens.device) if isinstance(heads, torch.Tensor) else heads
        budgets = heads if isinstance(heads, (list, tuple)) else [heads] * n
        if len(budgets) != n:
            raise ValueError(f"{len(budgets)} budgets given for {n} new tokens")
        for m in budgets:
            self.blocks[0].attention.check(m, len(tokens))                      # now, not in the middle of a text
        choose = functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        context, capacity = self.config.context, tokens.shape[1] + n
        if tokens.is_cuda:
            import decode                                                       # the same steps, each of them one CUDA graph

            capacity = decode.graph_rows(capacity)
        cache = self.new_cache(len(tokens), min(capacity, context))
        step = decode.Step(self, cache, choose, generator) if tokens.is_cuda else None
        new = tokens = tokens[:, -context:]
        for m in budgets:
            if cache.length == context:
                new, cache.length = tokens[:, -max(context // 2, 1) :], 0
            if step and cache.length:
                new = step(new, m).clone()
            else:
                new = choose(self.unembed(self.hidden(new, m, cache)[:, -1]))
            tokens = torch.cat((tokens, new), 1)[:, -context:]
            yield new[:, 0]

    def generate(self, tokens, n, *arguments, **keywords):
        """tokens [B, T] -> [B, T + n]: the prompt and n new tokens. Arguments as in `stream`."""
        new = [token[:, None] for token in self.stream(tokens, n, *arguments, **keywords)]
        return torch.cat((tokens, *new), 1)


def sample(logits, temperature, top_k, top_p, generator=None):
    """logits [B, vocab_size] -> tokens [B, 1]. Arguments as in GPT.stream."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = logits.float().sort(descending=True, stable=True)
    p = ((logits - logits[:, :1]) / max(temperature, 1e-30))[:, :top_k].softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)                                          # the fewest that together reach top_p
    race = p / torch.empty_like(p).exponential_(generator=generator)            # its winner is a sample of p: no host needed
    return order.gather(-1, race.argmax(-1, keepdim=True))
