"""
Decoding on a GPU, fast. What a step computes stands in matmla.py; nothing here is needed to
understand it.

One new token is little work. Its time goes into starting many small kernels, and into a cache that
only a few parts of the chip read. So a step is one CUDA graph of compiled blocks (`fast`). There
all parts of the chip read the cache, by flash decoding with torch's FlexAttention (`attend_one`),
and a latent attention has fewer and larger matrices (`Joined`).
"""

import functools
import importlib.util
import weakref

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from matmla import MLA, Cache, MatMLA, attend, rope


def attend_one(q, k, v, positions, scale):
    """`attend` for one new token whose position only the GPU knows: later keys are left out.

    Compiled, it is flash decoding: parts of the chip read different pieces of the keys, and what
    they found is put together. Everything else is left to `attend`. So is one short row of keys,
    which one sequence has in a latent attention: there, dividing it takes longer than it saves. And
    so are keys wider than 256, for which it is faster at few sizes only (assets/wide_rows.py).
    """
    B, S, g, w = k.shape
    possible = q.shape[1] == 1 and q.dtype == torch.bfloat16 and 16 <= v.shape[-1] <= w <= 256
    if not torch.compiler.is_compiling() or not possible or (B * g == 1 and S <= 4096):
        return attend(q, k, v, positions, scale)

    # The chip has room for some tiles of 64 keys and their values, of which it loads up to three
    # ahead. Each of its multiprocessors gets two pieces of the keys, of at least one tile.
    chip = torch.cuda.get_device_properties()
    tile = 2 * 2 * 64 * (1 << (w - 1).bit_length())  # bytes
    return flash(
        q,
        k,
        v,
        positions,
        scale,
        options={
            "BLOCK_N": 64,
            "num_warps": 4,
            "num_stages": max(1, min(3, chip.shared_memory_per_block_optin // tile)),
            "SPLIT_KV": max(1, min(2 * chip.multi_processor_count // (B * g), S // 64)),
        },
    )


def flash(q, k, v, positions, scale, options):
    """`attend_one` by FlexAttention, with these options for its kernel."""
    _, S, g, _ = k.shape
    mask = BlockMask.from_kv_blocks(  # blocks of 128 keys, up to that in which the token stands
        (positions // 128 + 1).int().view(1, 1, 1),
        torch.arange((S + 127) // 128, device=q.device).int().view(1, 1, 1, -1),
        BLOCK_SIZE=128,
        seq_lengths=(q.shape[2] // g, S),
        mask_mod=lambda b, h, i, key: key <= positions[0],
        compute_q_blocks=False,
    )
    return flex_attention(
        q[:, 0].unflatten(1, (g, -1)),  # [B,g,h/g,w]: heads that share keys, in place of tokens
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        scale=scale,
        kernel_options=options,
    ).flatten(1, 2)[:, None]  # [B,1,h,w_v]


def normed_linear(x, W_g, eps):
    """x [B, 1, n] -> W norm(x), [B, 1, rows of W]. The norm's weight g is in W_g = W diag(g).

    W (g x / rms) is (W g) x / rms, so that the product need not wait for the norm.
    """
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    y = F.linear(x[:, 0], W_g)[:, None]  # of three dimensions, it might be a slower kernel
    return (y * (squares.mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class Joined:
    """A block of MLA or MatMLA for one token, absorbed, with all products of one input as one.

    W_UK is multiplied into W_UQ, which so leads into the latent, and W_UV into W_O. The weights of
    norms are multiplied into what reads them. (MHA gains nothing from the like.)
    """

    def __init__(self, block):
        a = self.attention = block.attention

        def per_head(linear):
            return linear.weight.unflatten(0, (a.n_h, -1))

        W_D = torch.cat((a.W_DQ.weight, a.W_DKV.weight, a.W_KR.weight))  # [d_cq+d_c+d_R,d]
        W_Q = torch.einsum("hdc,hdq->hcq", per_head(a.W_UK), per_head(a.W_UQ))
        W_Q = torch.cat((W_Q, per_head(a.W_QR)), 1)  # [n_h,d_c+d_R,d_cq]

        self.W_D = W_D * block.norm_attention.weight
        self.W_Q = W_Q.flatten(0, 1) * a.norm_Q.weight
        self.W_O = torch.einsum(
            "ohd,hdc->ohc", a.W_O.weight.unflatten(1, (a.n_h, -1)), per_head(a.W_UV)
        ).flatten(1)  # [d,n_h·d_c]
        self.W_gate_up = (  # [2·d_ff,d]
            torch.cat((block.W_gate.weight, block.W_up.weight)) * block.norm_feed_forward.weight
        )
        self.W_down = block.W_down

    def forward(self, x, heads, cache):
        """As the block's. heads: a tuple of equal numbers; cache: a GraphCache."""
        a = self.attention
        position = cache.length
        m = heads[0]

        c_Q, c_KV, k_R = normed_linear(x, self.W_D, a.norm_Q.eps).split(
            (self.W_Q.shape[1], a.d_c, a.d_R), -1
        )
        k_R = rope(k_R.unsqueeze(2), position, a.rope_base).flatten(2)
        k = cache.append(torch.cat((a.norm_KV(c_KV), k_R), -1)).unsqueeze(2)  # [B,S,1,d_c+d_R]

        q = normed_linear(c_Q, self.W_Q[: m * (a.d_c + a.d_R)], a.norm_Q.eps)
        q_latent, q_R = q.unflatten(-1, (m, -1)).split((a.d_c, a.d_R), -1)
        q = torch.cat((q_latent, rope(q_R, position, a.rope_base)), -1)  # [B,1,m,d_c+d_R]
        o = a.attend(q, k, k, position, a.scale)[..., : a.d_c]
        x = x + F.linear(o.flatten(2), self.W_O[:, : m * a.d_c])

        gate, up = normed_linear(x, self.W_gate_up, a.norm_Q.eps).chunk(2, -1)
        return x + self.W_down(F.silu(gate) * up)


def join(block):
    """The block as `Joined`, where that is possible and saves time; else the block itself."""
    a = block.attention
    if type(a) not in (MLA, MatMLA) or a.absorb_below <= 1 or not hasattr(a.W_DQ, "weight"):
        return block
    # Joined, W_O has d_c numbers for each d_h. Beyond some size they take longer to read, at
    # several TB/s, than the kernels that are saved: here, 32 MB.
    return Joined(block) if len(a.W_O.weight) * a.n_h * a.d_c <= 2**24 else block


class GraphCache(Cache):
    """A layer's Cache for a graph, which must be right for any length.

    So the length is a tensor, [1], and all rows are returned: `attend` leaves out the later ones.
    """

    def append(self, new):
        self.rows[:, self.length] = new
        return self.rows


@functools.cache
def compiled(forward, one_sequence):
    """A block's forward, compiled once for all layers; as it is where there is no compiler."""
    if not importlib.util.find_spec("triton"):
        return forward
    return torch.compile(
        forward,
        dynamic=False,
        options={
            "combo_kernels": True,  # this and the next two: fewer kernels
            "force_pointwise_cat": True,
            "realize_opcount_threshold": 100,
            "coordinate_descent_tuning": one_sequence,  # its products become part of other kernels
        },
    )


def capture_graph(function, device):
    """A CUDA graph of the function, and the tensor in which every replay leaves its result."""
    # The limit is on how many choices of heads, numbers of rows and batches are compiled.
    with torch.cuda.device(device), torch._dynamo.config.patch(recompile_limit=64):
        function()  # compiles, which cannot be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
    return graph, result


def step_graph(model, blocks, heads, layers, tokens, length):
    """A CUDA graph of one step: (its tokens, its length, the graph, the logits that it leaves).

    blocks, heads and layers: of each layer its block or `Joined`, its heads and its GraphCache.
    """
    tokens = tokens.clone()
    length = torch.tensor([length], device=tokens.device)
    for layer in layers:
        layer.length = length

    def logits():
        x = model.embed(tokens)
        for block, budgets, layer in zip(blocks, heads, layers):
            forward = compiled(type(block).forward, len(tokens) == 1)
            x = forward(block, x, budgets, layer)
        return model.unembed(model.norm(x))[:, -1]

    return tokens, length, *capture_graph(logits, tokens.device)


@torch.no_grad()
def fast(model):
    """Replace model.step by one that replays a CUDA graph wherever one new token follows others.

    The prompt is read as before. There is a graph for each choice of heads and for each number of
    rows that are read: a power of two from 1,024 on, or all. The logits of a step are overwritten
    by the next. The weights must not change any more.
    """
    for block in model.blocks:
        block.attention.attend = attend_one
    joined = [join(block) for block in model.blocks]
    ordinary = model.step
    graphs = weakref.WeakKeyDictionary()  # of a cache while it lives: its first layer is the key

    @torch.no_grad()
    def step(tokens, heads, cache):
        batch, capacity, _ = cache[0].rows.shape
        if tokens.shape != (batch, 1) or not 0 < cache.length < min(capacity, model.config.context):
            return ordinary(tokens, heads, cache)

        known = graphs.setdefault(cache[0], {})
        if repr(heads) not in known:  # to check them at every step would let the GPU wait
            known[repr(heads)] = tuple(model.layer_heads(heads, batch, cache))
        heads = known[repr(heads)]
        S = min(capacity, max(1024, 1 << cache.length.bit_length()))
        if (heads, S) not in known:
            one_each = all(len(set(budgets)) == 1 for budgets in heads)  # for the whole batch
            blocks = joined if one_each else model.blocks
            layers = [GraphCache(layer.rows[:, :S]) for layer in cache]
            known[heads, S] = step_graph(model, blocks, heads, layers, tokens, cache.length)

        graph_tokens, graph_length, graph, logits = known[heads, S]
        graph_tokens.copy_(tokens)
        graph_length.fill_(cache.length)
        graph.replay()
        for layer in cache:
            layer.length += 1
        return logits

    model.step = step
