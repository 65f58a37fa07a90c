"""
MatMLA in one file: MHA, nested MHA, GQA, MLA and MatMLA one under the other, to be read next to the papers.

  [1] Matryoshka Multi-Head Latent Attention (MatMLA). openreview.net/forum?id=TuHltnpNUo
  [2] DeepSeek-V2, 2024. arXiv:2405.04434. (1)-(8): MHA (we add RoPE); (37)-(47): its appendix C (and norms).
  [3] RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021. arXiv:2104.09864
  [4] GQA: Training Generalized Multi-Query Transformer Models, 2023. arXiv:2305.13245

  code        paper [2]    shape               meaning
  x           h_t          [B, T, d]           what enters the layer, one vector per token
  q, k, v     q, k, v      [B, T, n_h, d_h]    query, key, value of every head
  c_Q         c^Q          [B, T, d_cq]        latent of the queries (never cached)
  c_KV        c^KV         [B, T, d_c]         latent of keys and values: cached
  q_C, k_C    q^C, k^C     [B, T, n_h, d_h]    the part of q and k without position
  q_R         q^R          [B, T, n_h, d_R]    the part of q that RoPE rotates, "decoupled"
  k_R         k^R          [B, T, d_R]         the part of k that RoPE rotates, one for all heads: cached
  o           o            [B, T, n_h, d_h]    what every head read
  m           -            int                 heads at work: all n_h, or the budget of [1], 1 <= m <= n_h
  rows        -            [B, S, numbers]     what the tokens left, one row of numbers each: the cache

B is the batch, T the tokens given now, S the tokens so far (S = T without a cache). W_D.. lead down to a
latent, W_U.. up from it. In einsum, b t s h are batch, token, token so far, head; d c w are widths.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Sizes of the model. The defaults are for a laptop: 0.97M parameters, trained in three minutes."""

    attention: str = "matmla"  # one of ATTENTION, below
    vocab_size: int = 257  # bytes, and one token between documents
    context: int = 256  # longest sequence, in tokens
    n_layer: int = 4
    d: int = 144  # width of the model
    n_h: int = 12  # heads
    n_kv: int = 4  # key/value heads of GQA
    d_h: int = 12  # width of one head, of its values too
    d_c: int = 40  # width of the latent of keys and values
    d_cq: int = 72  # width of the latent of queries; 0: queries come straight from x
    d_R: int = 8  # width of the decoupled RoPE part
    d_ff: int = 384  # width of the feed-forward layer
    budgets: tuple = (12, 8, 4)  # head budgets that are trained, largest first
    rope_base: float = 10000.0
    norm_eps: float = 1e-6  # of every norm
    tie: bool = True  # input and output embedding are one matrix

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention {self.attention!r} is none of {', '.join(ATTENTION)}")
        for name, value in vars(self).items():
            if type(value) is int and value < (0 if name == "d_cq" else 1):
                raise ValueError(f"{name} is {value}, which is too small")
        rotated = "d_R" if "mla" in self.attention else "d_h"
        if getattr(self, rotated) % 2:
            raise ValueError(
                f"RoPE rotates pairs, so {rotated} = {getattr(self, rotated)} must be even"
            )


def rope(x, positions, base):
    """Rotary position embedding [3]: pair i of token t turns by the angle positions[t]·base^(-2i/n).

    x [B, T, h, n], n even; positions [T]. Pairs are neighbours, (x0,x1), (x2,x3), ..., as in [2].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot count beyond 256
    i = torch.arange(x.shape[-1] // 2, device=x.device, dtype=dtype)
    angle = positions[:, None, None] * base ** (-2 * i / x.shape[-1])  # [T,1,n/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)


def attend(q, k, v, positions, scale):
    """(7), (46): o_t = Σ_s softmax_s(q_tᵀ k_s · scale) v_s, over the tokens s up to t.

    q [B, T, h, w], k [B, S, g, w], v [B, S, g, w_v]; where g < h, neighbouring heads share a key and value.
    positions [T]: where the queries are among the S tokens, the last T of them. Returns [B, T, h, w_v].
    """
    T, S, w_v = q.shape[1], k.shape[1], v.shape[-1]
    visible = torch.arange(S, device=q.device) <= positions[:, None]  # [T,S]
    if k.shape[2] == 1 and T < S:  # after a cache, one key for all heads
        scores = torch.einsum("bthw,bsw->bhts", q, k[:, :, 0]) * scale
        p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bsw->bthw", p, v[:, :, 0])
    # Else one kernel, which never stores p; is_causal means T = S. A CPU has a fast one if v is as wide as q.
    v = F.pad(v, (0, q.shape[-1] - w_v)) if q.device.type == "cpu" else v
    q, k, v, mask = (
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        (visible if T < S else None),
    )
    o = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return o.transpose(1, 2)[..., :w_v]


def to_heads(W, x, m, width):
    """x [B, T, n] -> [B, T, m, width]: x through the first m heads of W, which are its first m·width rows."""
    return F.linear(x, W.weight[: m * width]).unflatten(-1, (m, width))


class Attention(nn.Module):
    """What all have in common: tokens write rows, then each token reads the rows of all tokens up to itself.

    A variant has its weights and, for m heads, these methods:
      numbers(m)                     how many numbers one token leaves in the cache
      write(x, positions, m)         these numbers, [B, T, numbers]: the difference between the variants
      read(x, rows, positions, m)    what tokens x find in the rows of all tokens so far, [B, T, d]
      read_absorbed                  (MLA) the same result, without ever making keys and values
    """

    nested = False  # True: the first m heads are a working attention by themselves, for every m
    short = (
        0  # fewer new tokens T than this are read absorbed: for a head and a cached token, T·2·d_c
    )
    # multiplications are fewer than 2·d_c·d_h, to make k_C and v_C, + T·2·d_h, to use them

    def __init__(self, c):
        super().__init__()
        self.n_h, self.n_kv, self.d_h, self.d_c, self.d_R = c.n_h, c.n_kv, c.d_h, c.d_c, c.d_R
        self.rope_base = c.rope_base

    def forward(self, x, heads=None, cache=None):
        """x [B, T, d] -> [B, T, d]. heads: how many work, all if None; a tuple has one for each equal part of
        the batch. cache: the Cache of this layer; the T tokens are appended, and see all before them.
        ValueError for heads that there are not, parts that are not equal, or a cache that is too small.
        """
        most = cache.heads if cache else self.n_h  # heads that a row has room for
        budgets = self.check(heads, len(x), most)
        positions = (cache.length if cache else 0) + torch.arange(x.shape[1], device=x.device)
        rows = self.write(x, positions, most if cache else max(budgets))
        rows = cache.append(rows) if cache else rows
        read = self.read_absorbed if cache and x.shape[1] < self.short else self.read
        parts, start = [], 0
        for m, same in itertools.groupby(budgets):  # (12, 12, 4): two thirds at 12, one at 4
            stop = start + len(list(same)) * (len(x) // len(budgets))
            parts.append(read(x[start:stop], rows[start:stop], positions, m))
            start = stop
        return torch.cat(parts)

    def check(self, heads, batch, most):
        """`heads` as a tuple. ValueError, with both numbers, if this attention or batch cannot do them."""
        budgets = heads if isinstance(heads, tuple) else (self.n_h if heads is None else heads,)
        if not budgets or batch % len(budgets):
            raise ValueError(f"{batch} sequences cannot be divided into {len(budgets)} equal parts")
        least = 1 if self.nested else self.n_h
        for m in budgets:
            if not least <= m <= most:
                raise ValueError(
                    f"{m} heads asked, but {type(self).__name__} takes {least}..{most} here"
                )
        return budgets


class MHA(Attention):
    """Multi-head attention: every head caches its own key and value.

    q_h = RoPE(W_Q,h x)    k_h = RoPE(W_K,h x)    v_h = W_V,h x                        (1)-(6)
    o_h = Σ_s softmax_s(q_hᵀ k_h,s / √d_h) v_h,s    y = W_O (o_1; ...; o_m)            (7) (8)
    """

    def __init__(self, c):
        super().__init__(c)
        self.W_Q = nn.Linear(c.d, c.n_h * c.d_h, bias=False)
        self.W_K = nn.Linear(c.d, c.n_h * c.d_h, bias=False)
        self.W_V = nn.Linear(c.d, c.n_h * c.d_h, bias=False)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def numbers(self, m):
        return m * 2 * self.d_h

    def write(self, x, positions, m):
        k = rope(
            to_heads(self.W_K, x, m, self.d_h), positions, self.rope_base
        )  # (2) (5) [B,T,m,d_h]
        v = to_heads(self.W_V, x, m, self.d_h)  # (3) (6) [B,T,m,d_h]
        return torch.cat((k, v), -1).flatten(2)  # [B,T,m·2·d_h]: head by head, k then v

    def read(self, x, rows, positions, m):
        q = rope(
            to_heads(self.W_Q, x, m, self.d_h), positions, self.rope_base
        )  # (1) (4) [B,T,m,d_h]
        rows = rows[..., : self.numbers(m)]  # a row may hold more than m heads
        k, v = rows.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1)  # [B,S,m,d_h] each
        o = attend(q, k, v, positions, self.d_h**-0.5)  # (7)
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])  # (8)


class Cache:
    """What the tokens so far left in one layer: one row of numbers each, in memory that is allocated once.

    rows [B, capacity, numbers], of which the first `length` are in use. heads: how many heads a row has room
    for; fewer than all only in nested MHA's ragged cache. No gradient flows through a cache.
    """

    def __init__(self, rows, heads):
        self.rows, self.heads, self.length = rows, heads, 0

    @torch.no_grad()
    def append(self, new):
        """Store rows [B, T, numbers]; return all so far, [B, S, numbers]. ValueError if they do not fit."""
        batch, capacity, _ = self.rows.shape
        stop = self.length + new.shape[1]
        if len(new) != batch or stop > capacity:
            raise ValueError(
                f"{len(new)} x {stop} tokens do not fit a cache for {batch} x {capacity}"
            )
        self.rows[:, self.length : stop] = new
        self.length = stop
        return self.rows[:, :stop]


class ModelCache(list):
    """One Cache for every layer, all of one length."""

    nbytes = property(lambda self: sum(layer.rows.nbytes for layer in self))
    length = property(lambda self: self[0].length)


class NestedMHA(MHA):
    """Nested MHA, the cautionary tale: MHA written *and* read by its first m heads: see where m is in MHA.

    A token written with 4 heads left nothing that a later token's heads 5 to 12 could read. Two bad ways out:
      full    (default)  always compute and store all heads: small budgets save no cache
      ragged  (new_cache(..., heads=m))  store m heads: smaller, but no later budget can exceed m
    """

    nested = True


class GQA(MHA):
    """Grouped-query attention [4]: n_kv keys and values, each shared by n_h / n_kv neighbouring heads.

    o_h = Σ_s softmax_s(q_hᵀ k_g,s / √d_h) v_g,s    with g = h // (n_h / n_kv)
    """

    def __init__(self, c):
        super().__init__(c)
        if c.n_h % c.n_kv:
            raise ValueError(f"{c.n_h} heads cannot share {c.n_kv} key/value heads evenly")
        self.W_K = nn.Linear(c.d, c.n_kv * c.d_h, bias=False)
        self.W_V = nn.Linear(c.d, c.n_kv * c.d_h, bias=False)

    def numbers(self, m):
        return self.n_kv * 2 * self.d_h

    def write(self, x, positions, m):
        return super().write(x, positions, self.n_kv)


class Latent(Attention):
    """What a token leaves in MLA [2]: one latent for all keys and values, and one key for position. No heads.

    c_KV = norm(W_DKV x)  (41)    k_R = RoPE(W_KR x)  (43)

    Why RoPE stands aside in k_R, "decoupled": inside k_C it would turn the key of token s, seen from token t,
    by R(s-t). The score would be q_Cᵀ R(s-t) W_UK c_s, and what the query has to carry into the latent,
    W_UKᵀ R(t-s) q_C, would differ for every s: nothing to absorb. (A norm of keys, QK-norm, forbids it, too.)
    """

    def __init__(self, c):
        super().__init__(c)
        self.W_DKV = nn.Linear(c.d, c.d_c, bias=False)
        self.norm_KV = RMSNorm(c.d_c, eps=c.norm_eps)
        self.W_KR = nn.Linear(c.d, c.d_R, bias=False)

    def numbers(self, m):
        return self.d_c + self.d_R

    def write(self, x, positions, m):
        c_KV = self.norm_KV(self.W_DKV(x))  # (41) [B,T,d_c]
        k_R = to_heads(self.W_KR, x, 1, self.d_R)  # one for all heads
        k_R = rope(k_R, positions, self.rope_base).flatten(2)  # (43) [B,T,d_R]
        return torch.cat((c_KV, k_R), -1)  # the whole row, whatever m


class MLA(Latent):
    """Multi-head latent attention [2]: all heads read one cached latent, and one cached key for position.

    c_Q = norm(W_DQ x)          q_h = (W_UQ,h c_Q; RoPE(W_QR,h c_Q))                        (37)-(40)
    k_h = (W_UK,h c_KV; k_R)    v_h = W_UV,h c_KV                                           (42) (44) (45)
    o_h = Σ_s softmax_s(q_hᵀ k_h,s / √(d_h + d_R)) v_h,s    y = W_O (o_1; ...; o_m)         (46) (47)
    absorbed: q_Cᵀ (W_UK c) = (W_UKᵀ q_C)ᵀ c    Σ_s p_s (W_UV c_s) = W_UV (Σ_s p_s c_s)
    """

    def __init__(self, c):
        super().__init__(c)
        self.scale = (c.d_h + c.d_R) ** -0.5
        self.short = c.d_c * c.d_h / (c.d_c - c.d_h) if c.d_c > c.d_h else torch.inf
        self.W_DQ = nn.Linear(c.d, c.d_cq, bias=False) if c.d_cq else nn.Identity()
        self.norm_Q = RMSNorm(c.d_cq, eps=c.norm_eps) if c.d_cq else nn.Identity()
        self.W_UQ = nn.Linear(c.d_cq or c.d, c.n_h * c.d_h, bias=False)
        self.W_QR = nn.Linear(c.d_cq or c.d, c.n_h * c.d_R, bias=False)
        self.W_UK = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_UV = nn.Linear(c.d_c, c.n_h * c.d_h, bias=False)
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def queries(self, x, positions, m):
        c_Q = self.norm_Q(self.W_DQ(x))  # (37) [B,T,d_cq]
        q_C = to_heads(self.W_UQ, c_Q, m, self.d_h)  # (38) [B,T,m,d_h]
        q_R = to_heads(self.W_QR, c_Q, m, self.d_R)  # (39) [B,T,m,d_R]
        return q_C, rope(q_R, positions, self.rope_base)

    def read(self, x, rows, positions, m):
        c_KV, k_R = rows.split((self.d_c, self.d_R), -1)
        k_C = to_heads(self.W_UK, c_KV, m, self.d_h)  # (42) [B,S,m,d_h]
        v_C = to_heads(self.W_UV, c_KV, m, self.d_h)  # (45) [B,S,m,d_h]
        k_R = k_R.unsqueeze(2).expand(-1, -1, m, -1)  # one key for all heads
        k = torch.cat((k_C, k_R), -1)  # (44) [B,S,m,d_h+d_R]
        q = torch.cat(self.queries(x, positions, m), -1)  # (40) [B,T,m,d_h+d_R]
        o = attend(q, k, v_C, positions, self.scale)  # (46) [B,T,m,d_h]
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])  # (47)

    def read_absorbed(self, x, rows, positions, m):
        q_C, q_R = self.queries(x, positions, m)
        W_UK, W_UV = (W.weight.unflatten(0, (-1, self.d_h))[:m] for W in (self.W_UK, self.W_UV))
        q_latent = torch.einsum(
            "bthd,hdc->bthc", q_C, W_UK
        )  # W_UKᵀ q_C: the query enters the latent
        q, row = (
            torch.cat((q_latent, q_R), -1),
            rows.unsqueeze(2),
        )  # the row is the key, its c_KV the value
        o = attend(q, row, row[..., : self.d_c], positions, self.scale)  # (46) [B,T,m,d_c]
        o = torch.einsum("bthc,hdc->bthd", o, W_UV)  # W_UV Σ p c: back to the width of a head
        return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])  # (47)


class MatMLA(MLA):
    """Matryoshka MLA [1]: MLA read by its first m heads. That is all, because its `write` makes no use of m.

    So one set of weights has one cache of one shape, and m may change from token to token, both ways.
    """

    nested = True


ATTENTION = {"mha": MHA, "nested_mha": NestedMHA, "gqa": GQA, "mla": MLA, "matmla": MatMLA}


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight. The result has the dtype of x, whatever the weight's."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    """Attention, then a feed-forward layer (SwiGLU, arXiv:2002.05202), each added to the residual stream."""

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
            if p.dim() == 2:  # smaller where it adds to the residual
                into_residual = name.endswith(("W_O.weight", "W_down.weight"))
                nn.init.normal_(
                    p, std=0.02 / (2 * config.n_layer) ** 0.5 if into_residual else 0.02
                )

    def forward(self, tokens, targets=None, heads=None, cache=None):
        """tokens [B, T] -> logits [B, T, vocab_size], and the mean loss in nats if targets [B, T] are given.
        heads: as in Attention.forward. The tokens are appended to the cache, if given. ValueError for heads
        that there are not, or more tokens than there is room for; the cache then stays as it was.
        """
        logits = self.unembed(self.hidden(tokens, heads, cache))
        return logits, None if targets is None else self.loss(logits, targets)

    def hidden(self, tokens, heads=None, cache=None):
        """What the last layer leaves, normed: [B, T, d]."""
        length = tokens.shape[1] + (cache.length if cache else 0)
        if length > self.config.context:
            raise ValueError(f"{length} tokens exceed the context of {self.config.context}")
        x = self.embed(tokens)
        for block, layer in zip(self.blocks, cache or [None] * len(self.blocks)):
            x = block(x, heads, layer)
        return self.norm(x)

    def loss(self, logits, targets):
        """logits [B, T, vocab_size], targets [B, T] -> mean cross-entropy in nats, in float32 at least."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(exact.flatten(0, 1), targets.flatten())

    def new_cache(self, batch, capacity, heads=None):
        """An empty cache for `batch` sequences of up to `capacity` tokens, in the weights' dtype and device.
        Only nested MHA's depends on heads: the full one by default; with heads=m the ragged one, of m heads.
        """
        attention = self.blocks[0].attention
        heads = max(attention.check(heads, batch, attention.n_h))
        shape = len(self.blocks), batch, capacity, attention.numbers(heads)
        heads = (
            heads if isinstance(attention, NestedMHA) else attention.n_h
        )  # of others, rows fit all
        return ModelCache(Cache(rows, heads) for rows in self.embed.weight.new_zeros(shape))

    def step(self, tokens, heads, cache):
        """Logits [B, vocab_size] of what comes after tokens [B, T], which are appended to the cache."""
        return self.unembed(self.hidden(tokens, heads, cache)[:, -1])

    @torch.no_grad()
    def stream(self, tokens, n, heads=None, temperature=1.0, top_k=None, top_p=1.0, generator=None):
        """Yield n new tokens, each [B], after tokens [B, T]. After the prompt, a step computes one token.
        heads: as in forward, or a list of n such, one per new token (the prompt is read with the first).
        temperature, top_k, top_p: as in `sample`. Of a prompt longer than the context the end counts; when
        the context is full, its older half is forgotten. ValueError, before any token, for wrong heads.
        """
        budgets, context = heads if isinstance(heads, list) else [heads] * n, self.config.context
        if tokens.shape[1] == 0 or len(budgets) != n:
            raise ValueError(
                f"{tokens.shape[1]} tokens to continue, {len(budgets)} budgets for {n} new ones"
            )
        for m in budgets:
            self.blocks[0].attention.check(m, len(tokens), self.config.n_h)
        new = tokens = tokens[:, -context:]
        cache = self.new_cache(len(tokens), min(context, tokens.shape[1] + n))
        for m in budgets:
            if cache.length == context:
                new, cache = (
                    tokens[:, -max(context // 2, 1) :],
                    self.new_cache(len(tokens), context),
                )
            new = sample(self.step(new, m, cache), temperature, top_k, top_p, generator)
            tokens = torch.cat((tokens, new), 1)
            yield new[:, 0]

    def generate(self, tokens, n, *arguments, **keywords):
        """tokens [B, T] -> [B, T + n]: the prompt and n new tokens. Arguments as in `stream`."""
        return torch.stack((*tokens.T, *self.stream(tokens, n, *arguments, **keywords)), 1)


def sample(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """logits [B, vocab_size] -> tokens [B, 1], at temperature 0 the most likely ones. Else logits are divided
    by it; then the top_k most likely tokens stay; then the fewest of these that together have top_p.
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k} too low, or top_p {top_p} not in 0..1"
        )
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, tokens = logits.float().sort(descending=True, stable=True)
    p = ((logits - logits[:, :1]) / max(temperature, 1e-30))[:, :top_k].softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)
    ends = p.cumsum(-1)  # every token has a stretch of 0..ends[-1]
    u = torch.rand(len(p), 1, device=p.device, generator=generator) * ends[:, -1:]
    return tokens.gather(
        -1, (ends <= u).sum(-1, keepdim=True)
    )  # the one whose stretch u falls into
