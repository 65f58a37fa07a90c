"""
Decoding on a GPU, fast: one CUDA graph per step. What it computes is in matmla.py; nothing here is needed to understand it.

GPT.stream takes this instead of its own step where there is CUDA. One new token is so little work that the number of kernels
counts, and how many parts of the chip read the cache at the same time:

  attend_one   `attend` for one new token: flash decoding, through torch's FlexAttention
  join         a copy of a block with fewer, larger matrices, of the same weights
  Step         the blocks compiled, and a step recorded once per budget, so that the host starts it with one call
"""

import copy
import functools
import importlib.util

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from matmla import Block, Cache, mask_heads


def attend_one(q, k, v, positions, scale):
    """`attend` for one new token on a GPU, where the number of keys is known to the device only.

    Compiled, it is flash decoding: pieces of the keys are read by different parts of the chip and joined after. A single
    short row of keys, as one sequence has in a latent attention, is read by plain products: dividing it would take longer.
    """
    B, S, n_kv, w = k.shape
    q, k, v = q[:, 0].unflatten(1, (n_kv, -1)), k.transpose(1, 2), v.transpose(1, 2)    # heads of a group: just more queries
    if torch.compiler.is_compiling() and (B * n_kv > 1 or S > 4096) and 16 <= v.shape[-1] <= w <= 256:    # what the kernel can do
        used, piece = positions // 128 + 1, torch.arange(-(-S // 128), device=q.device)
        mask = BlockMask.from_kv_blocks(
            used.int().view(1, 1, 1), piece.int().view(1, 1, 1, -1), BLOCK_SIZE=128, seq_lengths=(q.shape[2], S),
            mask_mod=lambda b, h, i, key: key <= positions[0], compute_q_blocks=False,
        )
        tile = 2 * 2 * 64 * (1 << (w - 1).bit_length())                         # bytes of 64 keys and values on the chip
        chip = torch.cuda.get_device_properties()
        options = dict(BLOCK_N=64, num_warps=4, num_stages=max(1, min(3, chip.shared_memory_per_block_optin // tile)))
        options["SPLIT_KV"] = max(1, min(2 * chip.multi_processor_count // (B * n_kv), S // 64))
        o = flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)
    else:
        scores = (q * scale @ k.mT).float()                                     # [B,n_kv,group,S]
        p = scores.masked_fill(torch.arange(S, device=q.device) > positions, -torch.inf).softmax(-1)
        o = p.to(v.dtype) @ v
    return o.flatten(1, 2)[:, None]


def graph_rows(tokens):
    """How many rows a graph reads for so many tokens: a power of two, so that few sizes are compiled."""
    return max(1024, 1 << (tokens - 1).bit_length())


@functools.cache
def compiled_block(lone):
    """Block.forward, compiled once for all layers; as it is where there is no compiler."""
    if not importlib.util.find_spec("triton"):
        return Block.forward
    tuned = {
        "coordinate_descent_tuning": lone,                                      # a lone sequence's products fuse with the rest
        "combo_kernels": True,                                                  # what does not wait for each other is one kernel
        "force_pointwise_cat": True, "realize_opcount_threshold": 100,          # no kernel of its own for RoPE, nor for joining
    }
    return torch.compile(Block.forward, dynamic=False, fullgraph=True, options=tuned)


class GraphCache(Cache):
    """A Cache for a CUDA graph, which is recorded once and must be right for any length: a tensor says where the next row goes.

    position [1]. All rows are returned, also those not in use, which `attend` leaves out.
    """

    def __init__(self, rows, heads, position):
        super().__init__(rows, heads)
        self.position = position

    def layer(self, i):
        return GraphCache(self.rows[i], self.heads, self.position)

    def positions(self, T):
        return self.position

    @torch.no_grad()
    def append(self, new):
        self.rows[:, self.position] = new.to(self.rows.dtype)
        return self.rows


class Part(nn.Module):
    """In place of a Linear: its numbers, out of a product that was made before."""

    def __init__(self, start, stop):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x):
        return x[..., self.start : self.stop]


def linear(weight):
    """A Linear without bias that has this weight."""
    W = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    W.weight = nn.Parameter(weight)
    return W


class NormLinear(nn.Module):
    """RMSNorm and the product after it: W (g x / rms) is (W g) x / rms, and so neither waits for the other."""

    def __init__(self, norm, weight):
        super().__init__()
        self.eps, self.product = norm.eps, linear(weight * norm.weight.to(weight.dtype))

    def forward(self, x):
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        return (self.product(x) * (squares.mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


def read_folded(self, x, memory, positions, heads):
    """`read_absorbed` of a latent attention whose W_UQ leads into the latent and whose W_O leads out of it."""
    q = torch.cat(self.queries(x, positions, heads), -1)
    row = memory.unsqueeze(2)
    o_latent = mask_heads(self.attend(q, row, row, positions, self.scale)[..., : self.d_c], heads).flatten(2)
    return F.linear(o_latent, self.W_O.weight[:, : o_latent.shape[-1]])


def join(block):
    """A copy of a block to decode with: matrices that multiply the same vector are one, with the norm that made it."""
    block = copy.deepcopy(block, {id(p): p for p in block.parameters()})        # of the modules, not of their weights
    attention, feed_forward = block.attention, block.feed_forward
    if attention.W_O.weight.dtype == torch.bfloat16:                            # what its kernel is made for
        attention.attend = attend_one
    if attention.short > 1 and attention.W_UQ.bias is None:                     # into the latent and out of it in one product each
        W_UQ, W_UK, W_UV = (W.weight.unflatten(0, (-1, attention.d_h)) for W in (attention.W_UQ, attention.W_UK, attention.W_UV))
        W_O = attention.W_O.weight.unflatten(1, (-1, attention.d_h))
        attention.W_UQ = linear(torch.einsum("hdc,hdq->hcq", W_UK, W_UQ).flatten(0, 1))
        attention.W_O = linear(torch.einsum("ohd,hdc->ohc", W_O, W_UV).flatten(1))
        attention.d_h = attention.d_c                                           # as wide as heads now are
        attention.read_absorbed = functools.partial(read_folded, attention)
    for owner, norm, module, names in (
        (block, "norm_attention", attention, ("W_Q", "W_K", "W_V")),
        (block, "norm_attention", attention, ("W_DQ", "W_DKV", "W_KR")),
        (attention, "norm_Q", attention, ("W_UQ", "W_QR")),
        (block, "norm_feed_forward", feed_forward, ("W_gate", "W_up")),
    ):
        matrices = [getattr(module, name, None) for name in names]
        if all(isinstance(W, nn.Linear) and W.bias is None for W in matrices):
            before, joined, stop = getattr(owner, norm), torch.cat([W.weight for W in matrices]), 0
            first = isinstance(before, nn.Identity) or joined.dtype == torch.float16    # would overflow before the norm
            setattr(owner, norm, nn.Sequential(before, linear(joined)) if first else NormLinear(before, joined))
            for name, W in zip(names, matrices):
                start, stop = stop, stop + W.out_features
                setattr(module, name, Part(start, stop))
    return block


class Step:
    """One decoding step on a GPU as a CUDA graph: the host starts it with one call, and never waits.

    There is one graph per budget, and per doubling of the length beyond 1024: a graph reads a fixed number of rows.
    """

    def __init__(self, model, cache, choose, generator=None):
        self.model, self.cache, self.choose, self.generator = model, cache, choose, generator
        self.token = torch.zeros(cache.rows.shape[1], 1, dtype=torch.long, device=cache.rows.device)
        self.position = torch.zeros(1, dtype=torch.long, device=cache.rows.device)
        self.blocks = [functools.partial(compiled_block(len(self.token) == 1), join(block)) for block in model.blocks]
        self.graphs = {}

    @torch.no_grad()
    def __call__(self, token, m):
        """The token after token [B, 1], [B, 1], which the next call overwrites. m: the budget, as `heads` in GPT.forward."""
        S = min(self.cache.rows.shape[2], graph_rows(self.cache.length + 1))
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        if (m, S) not in self.graphs:
            view = GraphCache(self.cache.rows[:, :, :S], self.cache.heads, self.position)

            def logits():
                return self.model.unembed(self.model.hidden(self.token, m, view, self.blocks)[:, -1])

            with torch._dynamo.config.patch(recompile_limit=64):                # budgets, lengths and batches
                logits()                                                        # compiles; then record, which runs nothing
            with torch.cuda.device(token.device):
                graph = torch.cuda.CUDAGraph()
                if self.generator:
                    graph.register_generator_state(self.generator)
                with torch.cuda.graph(graph):
                    new = self.choose(logits())
            self.graphs[m, S] = graph, new
        graph, new = self.graphs[m, S]
        graph.replay()
        self.cache.length += 1
        return new
