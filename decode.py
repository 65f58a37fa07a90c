"""
Decoding on a GPU, fast. What a step computes is in matmla.py; nothing here is needed to understand it.

One new token is so little work that what counts is the number of kernels, and how many parts of the chip read the cache
at the same time. So a step is one CUDA graph of compiled blocks (`fast`), with flash decoding through torch's
FlexAttention (`attend_one`); in a latent attention, of fewer and larger matrices (`Joined`).
"""

import functools
import importlib.util
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import matmla
from matmla import MLA, Cache, MatMLA, attend, rope


def attend_one(q, k, v, positions, scale):
    """`attend` for one new token whose position only the GPU knows: keys after it are there, but left out.

    Compiled, it is flash decoding: different parts of the chip read pieces of the keys, and these are joined after. One
    short row of keys, as one sequence has in a latent attention, is left to `attend`: dividing it takes longer.
    """
    B, S, g, w = k.shape
    able = q.dtype == torch.bfloat16 and 16 <= v.shape[-1] <= w <= 256
    if not able or not torch.compiler.is_compiling() or B * g == 1 and S <= 4096:
        return attend(q, k, v, positions, scale)
    q, k, v = (
        q[:, 0].unflatten(1, (g, -1)),
        k.transpose(1, 2),
        v.transpose(1, 2),
    )  # a group's heads: more queries
    used, piece = positions // 128 + 1, torch.arange(-(-S // 128), device=q.device)
    mask = BlockMask.from_kv_blocks(
        used.int().view(1, 1, 1),
        piece.int().view(1, 1, 1, -1),
        BLOCK_SIZE=128,
        seq_lengths=(q.shape[2], S),
        mask_mod=lambda b, h, i, key: key <= positions[0],
        compute_q_blocks=False,
    )
    chip = torch.cuda.get_device_properties()
    tile = 2 * 2 * 64 * (1 << (w - 1).bit_length())  # bytes of 64 keys and values on the chip
    options = dict(
        BLOCK_N=64,
        num_warps=4,
        num_stages=max(1, min(3, chip.shared_memory_per_block_optin // tile)),
    )
    options["SPLIT_KV"] = max(1, min(2 * chip.multi_processor_count // (B * g), S // 64))
    o = flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)
    return o.flatten(1, 2)[:, None]  # [B,1,h,w_v]


def product(x, W_g, eps):
    """x [B, 1, n] -> [B, 1, rows of W_g], W norm(x) for a norm with weight g and W_g = W g.

    W (g x / rms) is (W g) x / rms, so the product need not wait for the norm.
    """
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    y = F.linear(x[:, 0], W_g)[:, None]  # of 3 dimensions, it might be a slower kernel
    return (y * (squares.mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class Joined:
    """A block of MLA or MatMLA for one token and heads (m,): absorbed, and all products of one input are one.

    W_UK is multiplied into W_UQ, which so leads into the latent, and W_UV into W_O; the norms' weights into what reads
    them. (MHA gains nothing from the like.)
    """

    def __init__(self, block):
        a = self.a = block.attention
        W_UQ, W_QR, W_UK, W_UV = (
            W.weight.unflatten(0, (a.n_h, -1)) for W in (a.W_UQ, a.W_QR, a.W_UK, a.W_UV)
        )
        W_Q = torch.cat((torch.einsum("hdc,hdq->hcq", W_UK, W_UQ), W_QR), 1)  # [n_h,d_c+d_R,d_cq]
        W_O = torch.einsum(
            "ohd,hdc->ohc", a.W_O.weight.unflatten(1, (a.n_h, -1)), W_UV
        )  # [d,n_h,d_c]
        self.W_D = (
            torch.cat((a.W_DQ.weight, a.W_DKV.weight, a.W_KR.weight)) * block.norm_attention.weight
        )
        self.W_Q, self.W_O = W_Q.flatten(0, 1) * a.norm_Q.weight, W_O.flatten(1)
        self.W_gate_up = (
            torch.cat((block.W_gate.weight, block.W_up.weight)) * block.norm_feed_forward.weight
        )
        self.W_down, self.eps = block.W_down, a.norm_Q.eps

    def forward(self, x, heads, cache):
        a, position, m = self.a, cache.length, heads[0]
        c_Q, c_KV, k_R = product(x, self.W_D, self.eps).split((self.W_Q.shape[1], a.d_c, a.d_R), -1)
        k_R = rope(k_R.unsqueeze(2), position, a.rope_base).flatten(2)
        row = cache.append(torch.cat((a.norm_KV(c_KV), k_R), -1)).unsqueeze(2)  # [B,S,1,d_c+d_R]
        q = product(c_Q, self.W_Q[: m * (a.d_c + a.d_R)], self.eps).unflatten(-1, (m, -1))
        q_latent, q_R = q.split((a.d_c, a.d_R), -1)
        q = torch.cat((q_latent, rope(q_R, position, a.rope_base)), -1)  # [B,1,m,d_c+d_R]
        o = a.attend(q, row, row, position, a.scale)[..., : a.d_c]
        x = x + F.linear(o.flatten(2), self.W_O[:, : m * a.d_c])
        gate, up = product(x, self.W_gate_up, self.eps).chunk(2, -1)
        return x + self.W_down(F.silu(gate) * up)


def join(block):
    """The block for one token; the block itself if it does not absorb, or has what only pretrained models need."""
    a = block.attention
    return (
        Joined(block)
        if type(a) in (MLA, MatMLA) and a.absorb_below > 1 and hasattr(a.W_DQ, "weight")
        else block
    )


class GraphCache(Cache):
    """A layer's Cache for a graph, which must be right for any length. So the length is a tensor, [1], and all rows are
    returned: `attend` leaves out those that are not in use."""

    def append(self, new):
        self.rows[:, self.length] = new
        return self.rows


@functools.cache
def compiled(forward, lone):
    """The forward of a block, compiled once for all layers; as it is where there is no compiler."""
    if not importlib.util.find_spec("triton"):
        return forward
    options = {
        "combo_kernels": True,
        "force_pointwise_cat": True,
        "realize_opcount_threshold": 100,
    }  # fewer kernels
    options["coordinate_descent_tuning"] = lone  # a lone sequence's products fuse with the rest
    return torch.compile(forward, dynamic=False, options=options)


def record(function, device):
    """A CUDA graph of the function, and the tensor in which every replay leaves its result."""
    with (
        torch.cuda.device(device),
        torch._dynamo.config.patch(recompile_limit=64),
    ):  # budgets, lengths and batches
        function()  # compiles; then record, which runs nothing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, function()


@torch.no_grad()
def fast(model, attend=attend_one):
    """Replace model.step, which generate calls, by one that replays a CUDA graph for one new token after others.

    There is one graph per budget, and per doubling of the length beyond 1024: a graph reads a fixed number of rows. The
    logits are overwritten by the next step. The weights must not change any more.
    """
    ordinary, joined = model.step, [join(block) for block in model.blocks]

    @torch.no_grad()
    def step(tokens, heads, cache):
        batch, capacity, _ = cache[0].rows.shape
        if tokens.shape != (batch, 1) or not 0 < cache.length < min(capacity, model.config.context):
            return ordinary(tokens, heads, cache)
        budgets = tuple(model.layer_heads(heads, batch, cache))
        if not hasattr(cache, "graphs"):  # they read its memory, so they live as long as it
            cache.graphs, cache.token, cache.position = {}, tokens.clone(), tokens.new_zeros(1)
        cache.token.copy_(tokens)
        cache.position.fill_(cache.length)
        S = min(capacity, max(1024, 1 << cache.length.bit_length()))
        if (budgets, S) not in cache.graphs:
            layers = [GraphCache(layer.rows[:, :S]) for layer in cache]
            for layer in layers:
                layer.length = cache.position
            blocks = joined if len(set(budgets)) == 1 else model.blocks

            def logits():
                x = model.embed(cache.token)
                for block, layer in zip(blocks, layers):
                    x = compiled(type(block).forward, batch == 1)(block, x, budgets, layer)
                return model.unembed(model.norm(x))[:, -1]

            with mock.patch(
                "matmla.attend", attend
            ):  # what every attention calls, while it is traced
                cache.graphs[budgets, S] = record(logits, tokens.device)
        graph, result = cache.graphs[budgets, S]
        graph.replay()
        for layer in cache:
            layer.length += 1
        return result

    model.step = step
