"""
Tests of matmla.py against an oracle that shares nothing with it: loops over heads and positions in float64,
written from the equations of DeepSeek-V2 (arXiv:2405.04434) and RoFormer (arXiv:2104.09864).

    python -m pytest
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import json
import linecache
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import bench_cache
import decode
import matmla
import train
from matmla import ATTENTION, GPT, Cache, Config, attend, rope, sample

torch.set_num_threads(1)    # the tensors are tiny: threads would only wait for each other
HERE = Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": str(HERE), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}    # of scripts that tests run
NESTED, LATENT = ["nested_mha", "matmla"], ["mla", "matmla"]
TIGHT = 1e-10    # float64: rounding only
LOOSE = 1e-5     # float32

# All sizes differ, so that a swapped axis cannot go unseen.
SIZES = dict(
    vocab_size=37, context=64, n_layer=2, d=40, n_h=6, n_kv=3, d_h=10, d_c=14, d_cq=22, d_R=8, d_ff=36, budgets=(6, 4, 1)
)
B, T = 2, 13


def make(attention, seed=0, dtype=torch.float64, lab=None, **sizes):
    """A model with weights large enough that attention is far from uniform, and norms that are not all ones."""
    torch.manual_seed(seed)
    lab = lab or matmla
    model = lab.GPT(lab.Config(attention=attention, **SIZES | sizes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 1))
    return model


def some_tokens(batch=B, length=T, seed=1):
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def budgets_of(attention):
    return (6, 5, 4, 1) if attention in NESTED else (6,)


every_variant = pytest.mark.parametrize("attention", ATTENTION)
every_nested = pytest.mark.parametrize("attention", NESTED)
every_latent = pytest.mark.parametrize("attention", LATENT)

# ---------------------------------------------------------------- the oracle


def oracle_rope(v, t, base):
    """v [width] at position t: every pair (v0, v1), (v2, v3), ... times a 2×2 rotation. RoFormer (15)."""
    out = []
    for i in range(len(v) // 2):
        angle = t * base ** (-2 * i / len(v))
        out.append(math.cos(angle) * v[2 * i] - math.sin(angle) * v[2 * i + 1])
        out.append(math.sin(angle) * v[2 * i] + math.cos(angle) * v[2 * i + 1])
    return torch.stack(out)


def oracle_rmsnorm(v, norm):
    return v / math.sqrt((v @ v).item() / len(v) + norm.eps) * norm.weight


def part(W, i, width):
    """The rows of W that belong to head i."""
    return W.weight[i * width : (i + 1) * width]


def oracle_attention(a, c, h, m):
    """One layer. h: list of T vectors [d]; m: the budget of every one of the T queries. Returns T vectors [d]."""
    u = [torch.zeros(c.d, dtype=torch.float64) for _ in h]
    latent = c.attention in LATENT
    if latent:
        c_Q = [oracle_rmsnorm(a.W_DQ.weight @ x, a.norm_Q) if c.d_cq else x for x in h]            # (37)
        c_KV = [oracle_rmsnorm(a.W_DKV.weight @ x, a.norm_KV) for x in h]                          # (41)
        k_R = [oracle_rope(a.W_KR.weight @ x, t, c.rope_base) for t, x in enumerate(h)]            # (43)
    for i in range(c.n_h):
        if latent:
            q = [
                torch.cat((part(a.W_UQ, i, c.d_h) @ x, oracle_rope(part(a.W_QR, i, c.d_R) @ x, t, c.rope_base)))
                for t, x in enumerate(c_Q)                                                         # (38)-(40)
            ]
            k = [torch.cat((part(a.W_UK, i, c.d_h) @ x, k_R[s])) for s, x in enumerate(c_KV)]      # (42) (44)
            v = [part(a.W_UV, i, c.d_h) @ x for x in c_KV]                                         # (45)
        else:
            j = i // (c.n_h // c.n_kv) if c.attention == "gqa" else i
            q = [oracle_rope(part(a.W_Q, i, c.d_h) @ x, t, c.rope_base) for t, x in enumerate(h)]  # (1) (4)
            k = [oracle_rope(part(a.W_K, j, c.d_h) @ x, t, c.rope_base) for t, x in enumerate(h)]  # (2) (5)
            v = [part(a.W_V, j, c.d_h) @ x for x in h]                                             # (3) (6)
        for t in range(len(h)):
            if i < m[t]:
                scores = torch.stack([q[t] @ k[s] / math.sqrt(len(q[t])) for s in range(t + 1)])
                p = scores.exp() / scores.exp().sum()
                o = sum(p[s] * v[s] for s in range(t + 1))                                         # (7) (46)
                u[t] = u[t] + a.W_O.weight[:, i * c.d_h : (i + 1) * c.d_h] @ o                     # (8) (47)
    return u


@torch.no_grad()
def oracle(model, tokens, budgets=None):
    """Logits [T, vocab_size] of one sequence [T], budgets: one for each of its tokens."""
    c = model.config
    budgets = [c.n_h] * len(tokens) if budgets is None else budgets
    x = [model.embed.weight[t] for t in tokens]
    for block in model.blocks:
        u = oracle_attention(block.attention, c, [oracle_rmsnorm(v, block.norm_attention) for v in x], budgets)
        x = [v + w for v, w in zip(x, u)]
        f = block.feed_forward
        for t, v in enumerate(x):
            v = oracle_rmsnorm(v, block.norm_feed_forward)
            g = f.W_gate.weight @ v
            x[t] = x[t] + f.W_down.weight @ (g / (1 + (-g).exp()) * (f.W_up.weight @ v))
    return torch.stack([model.unembed.weight @ oracle_rmsnorm(v, model.norm) for v in x])


def chunked(model, tokens, lengths, heads):
    """Logits of tokens [B, T] fed through a cache in chunks, each at its own budget; and the cache."""
    cache = model.new_cache(len(tokens), tokens.shape[1])
    chunks = tokens.split(lengths, 1)
    logits = [model(chunk, heads=m, cache=cache)[0] for chunk, m in zip(chunks, heads)]
    assert cache.length == tokens.shape[1]
    return torch.cat(logits, 1), cache


# ---------------------------------------------------------------- equal to the oracle


@every_variant
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, TIGHT), (torch.float32, LOOSE)])
def test_logits_equal_oracle_at_every_budget(attention, dtype, tolerance):
    for d_cq in (SIZES["d_cq"], 0):
        model, tokens = make(attention, d_cq=d_cq), some_tokens()
        for m in budgets_of(attention):
            expected = torch.stack([oracle(model.double(), sequence, [m] * T) for sequence in tokens])
            assert error(model.to(dtype)(tokens, heads=m)[0], expected) < tolerance


def test_softmax_scale_is_one_over_root_of_whole_query_width():
    """1/√(d_h + d_R), not 1/√d_h: with one key far ahead of the others, the two differ by much."""
    for attention, width in (("mla", 18), ("matmla", 18), ("mha", 10), ("nested_mha", 10), ("gqa", 10)):
        scales = []
        model = make(attention)
        for block in model.blocks:
            block.attention.attend = lambda *given: (scales.append(given[-1]), attend(*given))[1]
        model(some_tokens())
        assert scales == [width**-0.5] * SIZES["n_layer"], attention


def test_rope_turns_interleaved_pairs_by_position():
    x, positions = torch.randn(B, T, 3, 8, dtype=torch.float64), torch.arange(5, 5 + T)
    expected = [[[oracle_rope(x[b, t, n], 5 + t, 100.0) for n in range(3)] for t in range(T)] for b in range(B)]
    expected = torch.stack([torch.stack([torch.stack(n) for n in b]) for b in expected])
    assert error(rope(x, positions, 100.0), expected) < TIGHT
    assert error(rope(x[:, :, 0], positions, 100.0), expected[:, :, 0]) < TIGHT                   # one key for all heads


def test_attend_returns_values_at_their_own_width():
    q, k, v = torch.randn(B, T, 6, 10), torch.randn(B, T, 3, 10), torch.randn(B, T, 3, 7)
    for queries in (T, 5, 1):
        assert attend(q[:, -queries:], k, v, torch.arange(T - queries, T), 1.0).shape == (B, queries, 6, 7)


def test_gqa_with_as_many_kv_heads_is_mha():
    for bias in (False, True):
        mha, gqa = make("mha", qkv_bias=bias), make("gqa", n_kv=6, qkv_bias=bias)
        gqa.load_state_dict(mha.state_dict())
        assert error(gqa(some_tokens())[0], mha(some_tokens())[0]) < TIGHT


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("attention, short", [*((a, 0) for a in ATTENTION), *((a, math.inf) for a in LATENT)])
@pytest.mark.parametrize("lengths", [[1] * 13, [7, 1, 5], [13]], ids=["1+1+...", "7+1+5", "whole"])
def test_any_chunking_equals_uncached(attention, short, lengths):
    model, tokens = make(attention), some_tokens()
    for block in model.blocks:
        block.attention.short = short                                                              # naive, or absorbed
    for m in budgets_of(attention):
        logits, _ = chunked(model, tokens, lengths, [m] * len(lengths))
        assert error(logits, model(tokens, heads=m)[0]) < TIGHT


@every_variant
def test_decoding_continues_rope_positions(attention):
    """With RoPE from position 0 for every new token, the last key would be no farther than the first."""
    model, tokens = make(attention, n_layer=1), some_tokens(1)
    for short in (0, math.inf) if attention in LATENT else (0,):
        model.blocks[0].attention.short = short
        logits, cache = chunked(model, tokens, [12, 1], [6, 6])
        assert error(logits[0], oracle(model, tokens[0])) < TIGHT
    whole = model.new_cache(1, T)
    model(tokens, cache=whole)
    assert error(cache.rows, whole.rows) < TIGHT                                                   # keys too


@every_variant
def test_chunk_after_a_cache_is_causal(attention):
    """A token must not change what an earlier token of its own chunk sees, and must change what it sees itself."""
    model, tokens = make(attention), some_tokens()
    for short in (0, math.inf) if attention in LATENT else (0,):
        for block in model.blocks:
            block.attention.short = short
        before, _ = chunked(model, tokens, [8, 5], [6, 6])
        for t in range(8, T):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % SIZES["vocab_size"]
            after, _ = chunked(model, changed, [8, 5], [6, 6])
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t], before[:, t])
            if t + 1 < T:
                assert not torch.allclose(after[:, t + 1], before[:, t + 1])


@every_latent
def test_cache_holds_the_normed_latent_and_the_rotated_key(attention):
    model, tokens = make(attention, n_layer=1), some_tokens(1)
    a, c = model.blocks[0].attention, model.config
    cache = model.new_cache(1, T)
    for chunk in tokens.split([4, 9], 1):
        model(chunk, cache=cache)
    for t, token in enumerate(tokens[0]):
        x = oracle_rmsnorm(model.embed.weight[token], model.blocks[0].norm_attention)
        c_KV, k_R = cache.rows[0, 0, t].split((c.d_c, c.d_R))
        assert error(c_KV, oracle_rmsnorm(a.W_DKV.weight @ x, a.norm_KV)) < TIGHT, "c_KV is cached after its norm"
        assert error(k_R, oracle_rope(a.W_KR.weight @ x, t, c.rope_base)) < TIGHT, "k_R is cached after RoPE"


@every_variant
def test_cache_bytes_are_numbers_per_token_times_everything(attention):
    numbers = {"mha": 2 * 6 * 10, "nested_mha": 2 * 6 * 10, "gqa": 2 * 3 * 10, "mla": 14 + 8, "matmla": 14 + 8}[attention]
    for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)):
        cache = make(attention, dtype=dtype).new_cache(3, 17)
        assert cache.nbytes == numbers * SIZES["n_layer"] * size * 17 * 3
        assert cache.nbytes == cache.rows.untyped_storage().nbytes()
        assert cache.length == 0


# ---------------------------------------------------------------- the budget


def first_heads(model, m):
    """A separate fixed-head model that holds only the first m heads' weights."""
    c = model.config
    fixed = {"nested_mha": "mha", "matmla": "mla"}[c.attention]
    small = GPT(dataclasses.replace(c, attention=fixed, n_h=m)).double()
    state = model.state_dict()
    for name, p in small.state_dict().items():
        p.copy_(state[name][tuple(slice(0, n) for n in p.shape)])
    return small


@every_nested
def test_budget_m_is_a_separate_model_of_the_first_m_heads(attention):
    for bias in (False, True):
        model, tokens = make(attention, qkv_bias=bias), some_tokens()
        for m in range(1, 7):
            assert error(model(tokens, heads=m)[0], first_heads(model, m)(tokens)[0]) < TIGHT


@every_nested
def test_head_slice_ends_exactly_at_m(attention):
    """Poison all that belongs to heads m, m+1, ... with NaN: nothing changes. Poison head m-1: everything does."""
    tokens = some_tokens()
    for m in (1, 4):
        clean = make(attention)(tokens, heads=m)[0]
        for first, survives in ((m, True), (m - 1, False)):
            model = make(attention)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith(("W_Q.weight", "W_K.weight", "W_V.weight", "W_UQ.weight", "W_UK.weight", "W_UV.weight")):
                        p[first * 10 :] = math.nan
                    if name.endswith("W_QR.weight"):
                        p[first * 8 :] = math.nan
                    if name.endswith("W_O.weight"):
                        p[:, first * 10 :] = math.nan
            assert torch.equal(model(tokens, heads=m)[0], clean) == survives
            for lengths in ([7, 6], [12, 1]):
                logits, _ = chunked(model, tokens, lengths, [m, m])
                assert (error(logits, clean) < TIGHT) == survives


@every_nested
def test_W_O_is_sliced_by_input_columns(attention):
    model = make(attention)
    model(some_tokens(), some_tokens(), heads=4)[1].backward()
    for block in model.blocks:
        used = block.attention.W_O.weight.grad != 0                                                # [d, n_h·d_h]
        assert used[:, : 4 * 10].all() and not used[:, 4 * 10 :].any()


@every_nested
def test_gradients_of_sliced_masked_and_divided_batches_agree(attention):
    tokens, targets = some_tokens(6), some_tokens(6, seed=2)
    for heads in (4, 6, 1), (6, 6, 4):
        sliced, masked, divided = make(attention), make(attention), make(attention)
        for part, target, m in zip(tokens.split(2), targets.split(2), heads):
            (sliced(part, target, heads=m)[1] / 3).backward()
        masked(tokens, targets, heads=torch.tensor(heads).repeat_interleave(2))[1].backward()
        divided(tokens, targets, heads=heads)[1].backward()
        for (name, p), q, r in zip(sliced.named_parameters(), masked.parameters(), divided.parameters()):
            assert error(q.grad, p.grad) < TIGHT and error(r.grad, p.grad) < TIGHT, name


@every_nested
@pytest.mark.parametrize("lengths", [[1] * 13, [7, 1, 5], [13]], ids=["1+1+...", "7+1+5", "whole"])
def test_one_cache_serves_sequences_at_different_budgets(attention, lengths):
    model, tokens = make(attention), some_tokens(3)
    heads = torch.tensor([4, 6, 1])
    logits, _ = chunked(model, tokens, lengths, [heads] * len(lengths))
    for i, m in enumerate(heads.tolist()):
        assert error(logits[i], model(tokens[i : i + 1], heads=m)[0][0]) < TIGHT


@every_nested
def test_budget_changes_within_a_sequence_equal_oracle(attention):
    """Written at all heads, continued at few, then at all again, on one cache."""
    model, tokens = make(attention), some_tokens(1)
    for lengths, heads in (([5, 4, 4], [6, 2, 6]), ([1] * 13, [1, 6, 3] * 4 + [5]), ([2, 10, 1], [1, 4, 6])):
        logits, _ = chunked(model, tokens, lengths, heads)
        per_token = [m for length, m in zip(lengths, heads) for _ in range(length)]
        assert error(logits[0], oracle(model, tokens[0], per_token)) < TIGHT


def test_matmla_cache_has_one_size_for_all_budgets():
    model = make("matmla")
    assert {model.new_cache(1, 9, heads=m).nbytes for m in range(1, 7)} == {model.new_cache(1, 9).nbytes}


def test_nested_mha_ragged_cache_is_smaller_and_cannot_grow():
    model, tokens = make("nested_mha"), some_tokens()
    full, ragged = model.new_cache(B, T), model.new_cache(B, T, heads=4)
    assert ragged.nbytes * 6 == full.nbytes * 4
    logits = model(tokens[:, :9], heads=4, cache=ragged)[0]
    assert error(logits, model(tokens[:, :9], heads=4)[0]) < TIGHT
    with pytest.raises(ValueError, match="6 heads asked.* 4"):
        model(tokens[:, 9:], heads=6, cache=ragged)
    smaller = model(tokens[:, 9:], heads=2, cache=ragged)[0]                                       # down is possible
    again = torch.cat((model(tokens[:, :9], heads=4, cache=full)[0], model(tokens[:, 9:], heads=2, cache=full)[0]), 1)
    assert error(torch.cat((logits, smaller), 1), again) < TIGHT


def test_nested_mha_full_cache_computes_and_stores_all_heads_at_any_budget():
    model, tokens = make("nested_mha", n_layer=1), some_tokens()
    at_4, at_6 = model.new_cache(B, T), model.new_cache(B, T)
    model(tokens, heads=4, cache=at_4)
    model(tokens, heads=6, cache=at_6)
    assert torch.equal(at_4.rows, at_6.rows) and at_4.rows.all()


# ---------------------------------------------------------------- training


@every_variant
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_backward_reaches_every_weight_compiled_or_not(attention, amp):
    model, tokens, targets = make(attention, dtype=torch.float32), some_tokens(), some_tokens(seed=2)
    compiled = torch.compile(model, backend="aot_eager")
    losses = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses.append(run(tokens, targets)[1])
        losses[-1].backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all() and p.grad.any(), name
    assert abs(losses[0] - losses[1]) < (0.1 if amp else 1e-4)


def gradients(model, run, tokens, targets, heads):
    """Of the weights of `model` after a pass through `run`, which is the model or has its weights."""
    model.zero_grad()
    run(tokens, targets, heads=heads)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@every_nested
@pytest.mark.parametrize("divided", [False, True], ids=["masked", "divided"])
def test_compiled_blocks_are_one_graph_for_all_steps_and_the_same_model(attention, divided, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(attention, dtype=torch.float32)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = train.compiled(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(5):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            heads = (6, 1) if divided else torch.tensor([[6, 4], [1, 6], [4, 1]][step % 3])
            batch = some_tokens(seed=step), some_tokens(seed=step + 1)
            eager = gradients(model, model, *batch, heads)
            same = gradients(model, compiled, *batch, heads)
        for name, grad in eager.items():
            torch.testing.assert_close(same[name], grad, atol=1e-5, rtol=1e-4, msg=name)
        optimizer.step()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2, f"{graphs} graphs, instead of one for all blocks and one for the loss"


@pytest.mark.parametrize("flags, n, wrong, where", [
    ("--batch 6", 6, "W_Q", lambda x, heads: True),
    ("--batch 8", 8, "W_Q", lambda x, heads: True),                                               # masked
    ("--attention nested_mha --batch 6", 6, "W_Q", lambda x, heads: True),
    ("--batch 6", 6, "its input", lambda x, heads: True),
    ("--batch 10 --micro-batch 4", 3, "W_Q", lambda x, heads: len(x) == 3),                       # of passes of 4, 3 and 3
    ("--batch 6 --objective sum", 6, "W_Q", lambda x, heads: heads == 8),
    ("--batch 6 --objective sample", 6, "W_Q", lambda x, heads: heads == 4),
])
def test_wrong_gradients_of_a_compiled_block_are_noticed(flags, n, wrong, where, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    flags += " --d 24 --d-ff 16 --n-layer 2 --context 16"
    _, args, config = train.settings(flags.split())
    model = GPT(config)
    run = train.compiled(model)
    train.check_gradients(model, run, args, config)
    right = run.blocks[0].forward

    class Wrong(torch.autograd.Function):                                                          # only backward, and only of one part
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.cat((grad[:-1], 9 * grad[-1:]))

    def forward(x, heads, cache):
        if not where(x, heads):
            return right(x, heads, cache)
        return right(Wrong.apply(x), heads, cache) if wrong == "its input" else Wrong.apply(right(x, heads, cache))

    run.blocks[0].forward = forward
    run.blocks[0]._compiled_call_impl = None
    with pytest.raises(ValueError, match=f"wrong gradient of .* {n} sequences .*--no-compile"):
        train.check_gradients(model, run, args, config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_gradients_of_a_large_batch_on_a_gpu_are_the_eager_ones():
    """At 98,304 tokens and these widths a fusion of torch's compiler lost them, see train.compiled."""
    parser, args, config = train.settings("--preset paper --n-layer 5 --vocab-size 512".split())
    torch.manual_seed(0)
    model = GPT(config).cuda()
    tokens = torch.randint(512, (96, 1025), device="cuda")
    batch = tokens[:, :-1], tokens[:, 1:]
    with torch.autocast("cuda", torch.bfloat16):
        eager = gradients(model, model, *batch, config.budgets)
        same = gradients(model, train.compiled(model), *batch, config.budgets)
    for name, grad in eager.items():
        assert error(same[name], grad) < 0.05, name


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize("attention, heads, numbers", [
    ("matmla", 0, ("0", "6")), ("matmla", 7, ("7", "6")), ("matmla", -1, ("-1", "6")), ("nested_mha", 7, ("7", "6")),
    ("mha", 4, ("4", "6")), ("gqa", 4, ("4", "6")), ("mla", 4, ("4", "6")),
    ("matmla", (3, 7), ("7", "6")), ("matmla", (3, 4, 5), ("3", "2")), ("mla", torch.tensor([4, 6]), ("4", "6")),
    ("matmla", torch.tensor([3, 7]), ("7", "6")), ("matmla", torch.tensor([3, 4, 5]), ("3", "2")),
])
def test_wrong_budget_is_refused_with_both_numbers(attention, heads, numbers):
    with pytest.raises(ValueError) as info:
        make(attention)(some_tokens(), heads=heads)
    assert all(n in str(info.value) for n in numbers)


@every_variant
def test_overfull_cache_is_refused_and_stays_usable(attention):
    model, tokens = make(attention), some_tokens()
    cache = model.new_cache(B, 12)
    before = model(tokens[:, :9], cache=cache)[0]
    with pytest.raises(ValueError, match="13 .* 12"):
        model(tokens[:, 9:], cache=cache)
    assert cache.length == 9
    after = model(tokens[:, 9:12], cache=cache)[0]
    assert error(torch.cat((before, after), 1), model(tokens[:, :12])[0]) < TIGHT
    with pytest.raises(ValueError, match="3 .* 2"):
        model(some_tokens(3), cache=model.new_cache(2, T))


@pytest.mark.parametrize("sizes, call, numbers", [
    ({}, lambda model: model(some_tokens(length=65)), ("65", "64")),
    ({}, lambda model: (model(some_tokens(length=60), cache=(c := model.new_cache(B, 99))), model(some_tokens(), cache=c)), ("73", "64")),
    ({}, lambda model: model(some_tokens() + 30), ("37",)),
    ({}, lambda model: model(some_tokens() - 40), ("-40", "37")),
    ({}, lambda model: model.generate(some_tokens(length=0), 3), ("0", "1")),
    ({}, lambda model: model.generate(some_tokens(), 3, heads=[6, 4]), ("2", "3")),
    ({"attention": "gqa", "n_kv": 4}, None, ("6", "4")),
    ({"attention": "mla", "d_R": 7}, None, ("7", "8")),
    ({"attention": "matmla", "d_R": 7}, None, ("7", "8")),
    ({"attention": "mha", "d_h": 9}, None, ("9", "10")),
    ({"attention": "mhla"}, None, ("mhla", "matmla")),
])
def test_wrong_use_is_refused_with_both_numbers(sizes, call, numbers):
    with pytest.raises(ValueError) as info:
        call(make("matmla")) if call else make(**{"attention": "matmla"} | sizes)
    assert all(n in str(info.value) for n in numbers), info.value


# ---------------------------------------------------------------- generating


@every_variant
def test_greedy_generation_equals_recomputing_the_prefix(attention):
    """The prompt is read at the first budget, new token i is predicted at budget i: one oracle pass checks them all."""
    model, tokens, n = make(attention), some_tokens(), 12
    for heads in ([6, 4, 1, 6] * 3, [1, 6] * 6) if attention in NESTED else (None,):
        text = model.generate(tokens, n, heads=heads, temperature=0)
        assert torch.equal(text[:, :T], tokens) and text.shape == (B, T + n)
        assert torch.equal(model.generate(tokens, n, heads=heads, top_k=1), text)
        per_token = heads and [heads[0]] * T + heads[1:]
        for sequence in text:
            predicted = oracle(model, sequence[:-1], per_token).argmax(-1)
            assert torch.equal(predicted[T - 1 :], sequence[T:])


@every_variant
def test_greedy_decoding_equals_uncached_over_200_tokens_in_float32(attention):
    model, tokens, n = make(attention, dtype=torch.float32, context=256), some_tokens(3), 200
    budgets = budgets_of(attention)[0], budgets_of(attention)[-1]
    for heads in (*budgets, torch.tensor([*budgets, budgets[0]])) if attention in NESTED else budgets[:1]:
        text = model.generate(tokens, n, heads=heads, temperature=0)
        predicted = model(text[:, :-1], heads=heads)[0].argmax(-1)                                 # one pass, no cache
        assert torch.equal(predicted[:, T - 1 :], text[:, T:])


@every_nested
def test_greedy_schedule_equals_oracle_over_200_tokens(attention):
    model, n = make(attention, dtype=torch.float32, context=256, n_layer=1), 200
    schedule = [6] * 70 + [1] * 60 + [4] * 70
    text = model.generate(some_tokens(1), n, heads=schedule, temperature=0)[0]
    predicted = oracle(model.double(), text[:-1], [6] * T + schedule[1:]).argmax(-1)
    assert torch.equal(predicted[T - 1 :], text[T:])


TRANSMLA = dict(qkv_bias=True, d_cq=0, norm_latents=False, d_c=30, d_R=30, rope_width=10)    # as transmla.py makes them


@every_variant
@pytest.mark.parametrize("sizes", [{}, dict(qkv_bias=True), dict(d_cq=0), dict(norm_latents=False), TRANSMLA], ids=lambda sizes: "-".join(sizes))
@torch.no_grad()
def test_decoding_by_position_equals_decoding_by_length(attention, sizes):
    """What a CUDA graph runs: joined matrices, a fixed number of rows of which the last are unused, a position only a tensor knows."""
    model, tokens = make(attention, **sizes), some_tokens()
    cache, other = model.new_cache(B, 20), model.new_cache(B, 20)
    other.rows.fill_(7.0)                                                                          # nothing unused may be read
    for c in (cache, other):
        model(tokens[:, :9], cache=c)
    blocks = [decode.join(block) for block in model.blocks]
    position = torch.tensor([8])
    view = decode.GraphCache(other.rows[:, :, :16], other.heads, position)
    budgets = [6, torch.tensor([6, 2]), 4, 1] if attention in NESTED else [6] * 4
    for m, token in zip(budgets, tokens[:, 9:].split(1, 1)):
        position += 1
        assert error(model.unembed(model.hidden(token, m, view, blocks)), model(token, heads=m, cache=cache)[0]) < TIGHT
    assert error(other.rows[:, :, :T], cache.rows[:, :, :T]) < TIGHT


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("B, n_kv, S, position", [(2, 1, 20, 13), (2, 2, 128, 127), (1, 6, 300, 127), (2, 1, 300, 128), (2, 2, 300, 299), (1, 1, 4200, 4150)])
def test_attend_one_equals_attend(B, n_kv, S, position, compiling, monkeypatch):
    chip = types.SimpleNamespace(shared_memory_per_block_optin=232448, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: chip)
    q, rows = torch.randn(B, 1, 6, 16), torch.randn(B, S, n_kv, 16)
    expected = attend(q, rows[:, : position + 1], rows[:, : position + 1], torch.tensor([position]), 0.3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert error(decode.attend_one(q, rows, rows, torch.tensor([position]), 0.3), expected) < LOOSE


@pytest.mark.parametrize("B, n_kv, w, w_v", [(1, 1, 16, 16), (2, 6, 20, 12), (2, 1, 288, 288)])
def test_attend_one_leaves_what_the_kernel_is_bad_at_to_products(B, n_kv, w, w_v, monkeypatch):
    q, k, v, position = torch.randn(B, 1, 6, w), torch.randn(B, 20, n_kv, w), torch.randn(B, 20, n_kv, w_v), torch.tensor([13])
    expected = attend(q, k[:, :14], v[:, :14], position, 0.3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(decode, "flex_attention", lambda *a, **k: pytest.fail("the kernel was called"))
    assert error(decode.attend_one(q, k, v, position, 0.3), expected) < LOOSE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_variant
@pytest.mark.parametrize("batch", [1, 40])
def test_cuda_graphs_decode_like_the_cpu_with_one_graph_per_budget(attention, batch, monkeypatch):
    model, tokens = make(attention, dtype=torch.float32, d_h=16, d_c=24, d_R=8), some_tokens(batch)
    budgets = budgets_of(attention)
    heads = [m for m in budgets for _ in range(8)] * 2
    steps = []
    real = decode.Step.__init__
    monkeypatch.setattr(decode.Step, "__init__", lambda self, *a: (steps.append(self), real(self, *a))[1])
    expected = model.generate(tokens, len(heads), heads=heads, temperature=0)
    assert torch.equal(model.cuda().generate(tokens.cuda(), len(heads), heads=heads, temperature=0).cpu(), expected)
    assert len(steps[0].graphs) == len(budgets)
    half = model.bfloat16()
    logits = []
    for device in ("cpu", "cuda"):                                                                 # the kernels for bfloat16
        cache = half.to(device).new_cache(batch, 20)
        half.hidden(tokens.to(device), None, cache)
        step = decode.Step(half, cache, lambda x: x) if device == "cuda" else None
        with torch.no_grad():
            token = tokens[:, :1].to(device)
            logits.append(step(token, budgets[-1]) if step else half(token, heads=budgets[-1], cache=cache)[0][:, -1])
    assert error(logits[1].cpu().double(), logits[0].double()) < 0.05


def test_temperature_0_and_top_k_1_and_a_tiny_top_p_are_greedy():
    logits = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).round(decimals=1)     # with ties
    greedy = sample(logits, 0, None, 1.0)
    assert torch.equal(greedy[:, 0], torch.from_numpy(logits.numpy().argmax(-1)))                  # the first of them
    assert torch.equal(sample(logits, 1.0, 1, 1.0), greedy) and torch.equal(sample(logits, 0.7, None, 1e-6), greedy)
    top = logits.topk(5).values[:, -1:]                                                            # of 5, at any temperature
    for temperature in (1e-300, 1e-30, 1e39, math.inf):
        assert (logits.gather(1, sample(logits, temperature, 5, 1.0)) >= top).all()
    assert torch.equal(logits.gather(1, sample(logits, 1e-300, None, 1.0)), logits.gather(1, greedy))


def test_sampling_follows_the_distribution_that_top_k_and_top_p_leave():
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    draw = torch.Generator().manual_seed(0)
    for top_k, top_p, left in ((None, 1.0, [0, 1, 2, 3, 4]), (3, 1.0, [1, 3, 4]), (None, 0.6, [1, 3]), (None, 0.66, [1, 3, 4]), (2, 0.3, [1])):
        tokens = sample(p.log().expand(20000, 5), 1.0, top_k, top_p, draw)
        expected = torch.zeros(5).index_copy(0, torch.tensor(left), p[left] / p[left].sum())
        found = torch.bincount(tokens[:, 0], minlength=5) / 20000
        assert (found - expected).abs().max() < 0.015, (top_k, top_p)
    colder = sample(p.log().expand(20000, 5), 0.5, None, 1.0, draw)
    assert (torch.bincount(colder[:, 0], minlength=5) / 20000 - p**2 / (p**2).sum()).abs().max() < 0.015


def test_generation_goes_on_past_the_context_and_repeats_with_its_seed():
    model = make("matmla")
    for length in (1, 63, 64, 65, 200):
        a, b = (model.generate(some_tokens(length=length), 80, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert a.shape == (B, length + 80) and torch.equal(a, b) and torch.equal(a[:, :length], some_tokens(length=length))
    text = model.generate(some_tokens(length=64), 2, temperature=0)                                # the second after 32 tokens
    assert torch.equal(model(text[:, -33:-1])[0][:, -1].argmax(-1), text[:, -1])


# ---------------------------------------------------------------- exercises: write parts of matmla.py yourself

LAB = os.environ.get("MATMLA", "matmla").removesuffix(".py")    # whose answers are graded
GQA_AS_MLA = '''

def gqa_as_mla(gqa, mla):
    """Fill the weights of an MLA layer so that it is a GQA layer, for every x, and leaves as many numbers in the cache [3].

    mla has d_cq = 0, latents without norm, d_c = d_R = n_kv·d_h, and RoPE frequencies that start anew after every d_h numbers.
    """
    n_h, n_kv, d_h = gqa.n_h, gqa.n_kv, gqa.d_h
    own = F.one_hot(torch.arange(n_h) // (n_h // n_kv), n_kv).to(gqa.W_Q.weight.dtype)    # [n_h, n_kv]: 1 at a head's own group
    with torch.no_grad():
        mla.W_KR.weight.copy_(gqa.W_K.weight)                                   # k_R: the keys, side by side
        mla.W_DKV.weight.copy_(gqa.W_V.weight)                                  # c_KV: the values, side by side
        q = gqa.W_Q.weight.unflatten(0, (n_h, d_h)) * ((d_h + mla.d_R) / d_h) ** 0.5
        mla.W_QR.weight.copy_(torch.einsum("hg,hdi->hgdi", own, q).flatten(0, 2))
        mla.W_UK.weight.zero_()                                                 # and so W_UQ says nothing
        mla.W_UV.weight.copy_(torch.kron(own, torch.eye(d_h, dtype=own.dtype)))
        mla.W_O.weight.copy_(gqa.W_O.weight)
'''
REFERENCE = Path(matmla.__file__).read_text("utf-8") + GQA_AS_MLA
EXERCISES = {}    # number: (title, functions to write, hint, grade)


def exercise(title, functions, hint):
    number = len(EXERCISES) + 1
    return lambda grade: EXERCISES.setdefault(number, (title, functions.split(), f"exercise {number}: {hint}", grade))


def definitions(text):
    """Every function, method and class of a file by its name: "rope", "MHA", "MHA.write". Values are nodes of its syntax tree."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
            found |= {f"{node.name}.{inner.name}": inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def blank(text):
    """The text, in which the functions of the exercises keep their signature and docstring, but not their body."""
    lines, nodes = text.splitlines(), definitions(text)
    edits = [(nodes[name], hint) for _, names, hint, _ in EXERCISES.values() for name in names]
    for node, hint in sorted(edits, key=lambda edit: -edit[0].lineno):
        documented = len(node.body) > 1 and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        body = node.body[1 if documented else 0]
        lines[body.lineno - 1 : node.end_lineno] = [" " * body.col_offset + f"raise NotImplementedError({hint!r})"]
    return "\n".join(lines) + "\n"


def graft(text, answers, names):
    """The text, with functions `names` as `answers` has them, and with what `answers` defines or imports besides."""
    lines, nodes, theirs, source = text.splitlines(), definitions(text), definitions(answers), answers.splitlines()

    def lines_of(node):
        return source[min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1 : node.end_lineno]

    for name in names:
        assert name in theirs, f"{name} is gone from the answers"
    methods = {name: node for name, node in theirs.items() if "." in name and name not in nodes and name.split(".")[0] in nodes}
    edits = [(nodes[name].lineno - 1, nodes[name].end_lineno, lines_of(theirs[name])) for name in names]
    edits += [(end := nodes[name.split(".")[0]].end_lineno, end, ["", *lines_of(node)]) for name, node in methods.items()]
    for first, last, new in sorted(edits, key=lambda edit: -edit[0]):
        lines[first:last] = new
    known = {ast.dump(node) for node in ast.parse(text).body}
    for node in ast.parse(answers).body:                                                           # constants, imports, helpers
        if ast.dump(node) not in known and getattr(node, "name", "") not in nodes and getattr(node, "module", "") != "__future__":
            lines += lines_of(node)
    return "\n".join(lines) + "\n"


def load_text(text):
    module = types.ModuleType("lab")
    linecache.cache["lab.py"] = len(text), None, text.splitlines(keepends=True), "lab.py"         # for tracebacks
    exec(compile(text, "lab.py", "exec"), module.__dict__)
    return module


def grade(number, answers):
    """All but this exercise is the reference, so that each is graded for itself; not attempted is a skip."""
    _, names, _, check = EXERCISES[number]
    try:
        check(load_text(graft(REFERENCE, answers, names)))
    except NotImplementedError as missing:
        if not str(missing).startswith("exercise "):
            raise                                                                                  # torch raises them too
        pytest.skip(str(missing))


def same(found, expected, what):
    if found.shape != expected.shape:
        pytest.fail(f"{what}: the shape is {list(found.shape)}, it should be {list(expected.shape)}")
    if not (off := error(found, expected)) < TIGHT:
        pytest.fail(f"{what}: off by {off:.1e}")


def equal_to_oracle(lab, attention, budgets, short=None):
    """Whole sequences without a cache, and in chunks through one, give the logits of the oracle at every budget."""
    for d_cq in (22, 0) if attention in LATENT else (22,):
        model, tokens = make(attention, lab=lab, d_cq=d_cq), some_tokens()
        for block in model.blocks:
            block.attention.short = block.attention.short if short is None else short
        for m in budgets:
            expected = torch.stack([oracle(model, sequence, [m] * T) for sequence in tokens])
            same(model(tokens, heads=m)[0], expected, f"{attention} at {m} heads")
            same(chunked(model, tokens, [8, 1, 4], [m] * 3)[0], expected, f"{attention} at {m} heads, through the cache")


@exercise("RoPE", "rope", "turn every pair (x0,x1), (x2,x3), ... by its angle, computed in the dtype of x but at least float32; width: after so many numbers the frequencies start anew")
def _(lab):
    def turned_by_oracle(x, positions):
        return torch.stack([torch.stack([torch.stack([oracle_rope(x[b, t, n], positions[t], 100.0) for n in range(3)])
                                         for t in range(4)]) for b in range(B)])

    x = torch.randn(B, 4, 3, 8, dtype=torch.float64)
    for start in (0, 5):
        positions = torch.arange(start, start + 4)
        expected, found = turned_by_oracle(x, positions.tolist()), lab.rope(x, positions, 100.0)
        halves = turned_by_oracle(x.unflatten(-1, (2, -1)).mT.flatten(-2), positions.tolist()).unflatten(-1, (-1, 2)).mT.flatten(-2)
        for slip, wrong in (("pairs are (x0,x1), (x2,x3), ..., not (x0,x4), (x1,x5), ...", halves),
                            ("the pairs turn backwards", turned_by_oracle(x, (-positions).tolist()))):
            assert found.shape != wrong.shape or not torch.allclose(found, wrong), slip
        same(found, expected, f"RoPE from position {start}")
        same(lab.rope(x[:, :, 0], positions, 100.0), expected[:, :, 0], f"RoPE of one key for all heads, from position {start}")
        turned = lab.rope(torch.cat((x, x, x), -1), positions, 100.0, 8)
        same(turned, torch.cat((expected, expected, expected), -1), "RoPE whose frequencies start anew after 8")
    x, late = torch.ones(1, 2, 8, dtype=torch.bfloat16), torch.tensor([1000, 1001])
    off = error(lab.rope(x, late, 1e4).double(), lab.rope(x.double(), late, 1e4))
    assert off < 1e-2, "in bfloat16, which cannot count past 256, late positions are not told apart"


@exercise("softmax attention", "attend", "o = softmax(qᵀk · scale) v over the keys up to each query's own position; return [B,T,n,w_v]")
def _(lab):
    q, k, v = (torch.randn(B, T, n, w, dtype=torch.float64) for n, w in ((6, 10), (3, 10), (3, 7)))
    for queries in (T, 4, 1):
        o = torch.zeros(B, queries, 6, 7, dtype=torch.float64)
        for b, t, n in itertools.product(range(B), range(queries), range(6)):
            s = T - queries + t + 1                                                                # so many keys are seen
            o[b, t, n] = (k[b, :s, n // 2] @ q[b, T - queries + t, n] * 0.3).softmax(0) @ v[b, :s, n // 2]
        same(lab.attend(q[:, T - queries :], k, v, torch.arange(T - queries, T), 0.3), o, f"the last {queries} of {T} queries")
        more = torch.cat((k, k), 1), torch.cat((v, v), 1)
        same(lab.attend(q[:, T - queries :], *more, torch.arange(T - queries, T), 0.3), o, "with keys after all of the queries")


@exercise("multi-head attention", "MHA.write MHA.read", "(1)-(8): what a token leaves, and how a query uses it")
def _(lab):
    model, x = make("mha", lab=lab), torch.randn(B, T, 40, dtype=torch.float64)
    row = model.blocks[0].attention.write(x, torch.arange(T), 6)
    assert row.shape == (B, T, 2 * 6 * 10), f"a token should leave 120 numbers, a key and a value for 6 heads: {list(row.shape)}"
    equal_to_oracle(lab, "mha", [6])


@exercise("the cache", "Cache.append", "store new rows, count them, return all rows so far; a ValueError if they do not fit")
def _(lab):
    memory, rows = torch.zeros(B, 5, 7), torch.randn(B, 6, 7)
    cache = lab.Cache(memory, 6)
    for first, last in ((0, 2), (2, 3), (3, 5)):
        so_far = cache.append(rows[:, first:last])
        assert cache.length == last, f"after {last} rows the cache says it has {cache.length}"
        assert so_far.shape == (B, last, 7), f"after {last} rows it returns {list(so_far.shape)}"
        assert torch.equal(so_far, rows[:, :last]), "it returns other rows than it was given"
        assert cache.rows is memory and so_far.data_ptr() == memory.data_ptr(), "the rows must lie in the memory there is, not in new memory"
    for new in (rows[:, 5:], torch.zeros(B + 1, 0, 7)):
        with pytest.raises(ValueError):
            cache.append(new)
    assert cache.length == 5 and torch.equal(cache.rows, rows[:, :5]), "what was refused has changed the cache"


@exercise("nested heads", "NestedMHA.write NestedMHA.read", "the first m heads alone: slice the weights, so that compute shrinks; heads may be a tensor [B], see mask_heads; a ValueError beyond a ragged cache")
def _(lab):
    equal_to_oracle(lab, "nested_mha", [6, 4, 1])
    model, x = make("nested_mha", lab=lab), torch.randn(B, T, 40, dtype=torch.float64)
    assert model.blocks[0].attention.write(x, torch.arange(T), 4).shape == (B, T, 2 * 4 * 10), "at 4 heads a token should leave 80 numbers"
    shrinks(model, [6, 4, 1])
    budgets_and_biases(lab, "nested_mha")
    tokens, ragged = some_tokens(), model.new_cache(B, T, heads=4)
    model(tokens[:, :9], heads=4, cache=ragged)
    with pytest.raises(ValueError):
        model(tokens[:, 9:], heads=6, cache=ragged)                                                # two heads would find nothing


def flops(model, tokens, m, cache=None):
    with FlopCounterMode(display=False) as counter:
        model(tokens, heads=m, cache=cache)
    return counter.get_total_flops()


def shrinks(model, budgets):
    for m in budgets:
        cost, enough = (flops(x, some_tokens(), m) for x in (model, make(model.config.attention)))
        assert cost <= enough, f"{m} heads cost {cost} operations, {enough} are enough: what is not used need not be computed"


def budgets_and_biases(lab, attention):
    """A budget for each sequence of a batch, and with the biases that some pretrained models have."""
    for bias in (False, True):
        model, tokens = make(attention, lab=lab, qkv_bias=bias), some_tokens()
        mixed, reference = model(tokens, heads=torch.tensor([6, 2]))[0], make(attention, qkv_bias=bias)
        for i, m in enumerate((6, 2)):
            what = f"a sequence at {m} heads beside one at another budget{', with biases' * bias}"
            same(mixed[i : i + 1], reference(tokens[i : i + 1], heads=m)[0], what)


@exercise("grouped queries", "GQA.write GQA.read", "n_kv keys and values; neighbouring heads share one")
def _(lab):
    x = torch.randn(B, T, 40, dtype=torch.float64)
    row = make("gqa", lab=lab).blocks[0].attention.write(x, torch.arange(T), 6)
    assert row.shape == (B, T, 2 * 3 * 10), f"a token should leave 60 numbers, a key and a value for 3 groups: {list(row.shape)}"
    equal_to_oracle(lab, "gqa", [6])


@exercise("the latent and the decoupled key", "MLA.write MatMLA.write", "(41) c_KV after its norm, then (43) k_R after RoPE")
def _(lab):
    for attention in LATENT:
        a, x = make(attention, lab=lab).blocks[0].attention, torch.randn(1, 4, 40, dtype=torch.float64)
        row = a.write(x, torch.arange(5, 9), 6)
        assert row.shape == (1, 4, 14 + 8), f"a token should leave d_c + d_R = 14 + 8 numbers: {list(row.shape)}"
        for t in range(4):
            same(row[0, t, :14], oracle_rmsnorm(a.W_DKV.weight @ x[0, t], a.norm_KV), "c_KV, after its norm")
            same(row[0, t, 14:], oracle_rope(a.W_KR.weight @ x[0, t], 5 + t, 10000.0), "k_R, after RoPE at the token's position")


@exercise("latent attention", "MLA.queries MLA.read", "(37)-(40), (42)-(47): queries, keys and values from the latents")
def _(lab):
    equal_to_oracle(lab, "mla", [6], short=0)


@exercise("absorption", "MLA.read_absorbed", "the same result, but never make keys or values: carry q_C into the latent, read, come back")
def _(lab):
    equal_to_oracle(lab, "mla", [6], short=math.inf)
    costs = []
    for short in (0, math.inf):
        model = make("mla", lab=lab)
        for block in model.blocks:
            block.attention.short = short
        cache = model.new_cache(B, 64)
        model(some_tokens(length=60), cache=cache)
        costs.append(flops(model, some_tokens(length=1), 6, cache))
    assert costs[1] < costs[0] / 2, f"one token after 60 costs {costs[1]} operations, and {costs[0]} if keys and values are made"


@exercise("MatMLA", "MatMLA.queries MatMLA.read MatMLA.read_absorbed", "MLA's first m heads: slice W_UQ, W_QR, W_UK, W_UV by rows, W_O by columns")
def _(lab):
    for short in (0, math.inf):
        equal_to_oracle(lab, "matmla", [6, 4, 1], short)
    shrinks(make("matmla", lab=lab), [6, 4, 1])
    budgets_and_biases(lab, "matmla")
    model, tokens = make("matmla", lab=lab), some_tokens(1)
    changing, _ = chunked(model, tokens, [5, 4, 4], [6, 2, 6])
    same(changing[0], oracle(model, tokens[0], [6] * 5 + [2] * 4 + [6] * 4), "6, then 2, then 6 heads on one cache")


@exercise("the mixed objective", "mask_heads", "one pass, a budget per sequence: zero what heads beyond its budget read")
def _(lab):
    o = torch.randn(3, T, 6, 10)
    assert torch.equal(lab.mask_heads(o, 6), o), "with one budget for all, nothing is left to mask"
    before = o.clone()
    masked = lab.mask_heads(o, torch.tensor([6, 1, 4]))
    assert torch.equal(o, before), "o itself has changed, but training needs it as it was"
    for i, m in enumerate((6, 1, 4)):
        assert torch.equal(masked[i, :, :m], o[i, :, :m]), f"a head within the budget of {m} has changed"
        assert not masked[i, :, m:].any(), f"a head beyond the budget of {m} is left"


@exercise("cache arithmetic", "MHA.numbers NestedMHA.numbers GQA.numbers MLA.numbers MatMLA.numbers", "how many numbers a token leaves in one layer")
def _(lab):
    for attention, m, expected in (("mha", 6, 120), ("nested_mha", 6, 120), ("nested_mha", 4, 80), ("gqa", 6, 60),
                                   ("mla", 6, 22), ("matmla", 6, 22), ("matmla", 1, 22)):
        found = make(attention, lab=lab).blocks[0].attention.numbers(m)
        assert found == expected, f"{attention} at {m} heads: {found} numbers, {expected} are right (sizes: {SIZES})"


@exercise("where absorption stops paying", "absorb_below", "the T at which naive, 2·d_c·d_h + T·2·d_h, costs as much as absorbed, T·2·d_c")
def _(lab):
    for d_c, d_h in ((512, 128), (14, 10), (40, 12)):
        limit = lab.absorb_below(d_c, d_h)
        cheaper = [T for T in range(1, 400) if T * 2 * d_c < 2 * d_c * d_h + T * 2 * d_h]
        assert [T for T in range(1, 400) if T < limit] == cheaper, f"d_c = {d_c}, d_h = {d_h}: absorbed is cheaper up to T = {cheaper[-1]}, not {limit}"
    assert min(lab.absorb_below(8, 10), lab.absorb_below(10, 10)) > 1e9, "with a latent no wider than a head, absorbed is always cheaper"


@exercise("GQA as MLA", "gqa_as_mla", "k_R holds all keys, c_KV all values; every head finds its own; the softmax scale stays as it was")
def _(lab):
    gqa = make("gqa", lab=lab).blocks[0].attention
    sizes = dict(d_cq=0, d_c=30, d_R=30, rope_width=10, norm_latents=False)
    mla, x = make("mla", lab=lab, seed=1, **sizes).blocks[0].attention, torch.randn(B, T, 40, dtype=torch.float64)
    before = gqa(x)
    lab.gqa_as_mla(gqa, mla)
    same(mla(x), before, "what the layer returns")
    assert torch.equal(gqa(x), before), "the GQA layer itself has changed"


@pytest.mark.parametrize("number", EXERCISES, ids=[f"{n}-{title.replace(' ', '-')}" for n, (title, *_) in EXERCISES.items()])
def test_exercise(number):
    grade(number, Path(f"{LAB}.py").read_text("utf-8-sig") if LAB != "matmla" else REFERENCE)


def test_blanked_copy_is_skipped_and_each_body_put_back_passes():
    empty = blank(REFERENCE)
    for number, (_, names, hint, _) in EXERCISES.items():
        with pytest.raises(pytest.skip.Exception, match=re.escape(hint)):
            grade(number, empty)
        grade(number, graft(empty, REFERENCE, names))


def test_an_answer_by_another_road_and_with_a_helper_of_its_own_passes():
    other = REFERENCE.replace("    return torch.cat((k, v), -1).flatten(2) ", "    return torch.cat(flat(k, v), -1) ")    # all keys, then all values
    other = other.replace("k, v = memory.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1) ",
                          "k, v = (t.unflatten(-1, (-1, self.d_h)) for t in memory.chunk(2, -1)) ")
    assert other.count("flat(k, v)") == 3
    other = "from __future__ import annotations\n" + other + """
WIDTH = 2

@functools.lru_cache
def width():
    return WIDTH

flat = lambda *parts: [part.flatten(width()) for part in parts]
"""
    other = other.replace("class MHA(Attention):", "class MHA(Attention):\n    def both(self, *parts):\n        return torch.cat(flat(*parts), -1)\n")
    grade(3, other.replace("torch.cat(flat(k, v), -1)", "self.both(k, v)", 1))


# ---------------------------------------------------------------- tests of the tests: break matmla.py, see a named test fail

MUTANTS = [    # what, exercise it is a wrong answer to, test that must fail and its arguments, text, what to put there
    ("RoPE turns halves, not neighbours", 1, "rope_turns_interleaved_pairs_by_position", (), "x0, x1 = x[..., 0::2], x[..., 1::2]", "x0, x1 = x.chunk(2, -1)"),
    ("RoPE counts in bfloat16", 1, None, (), "dtype = torch.promote_types(x.dtype, torch.float32)", "dtype = x.dtype"),
    ("RoPE turns backwards", 1, "rope_turns_interleaved_pairs_by_position", (), "x0 * cos - x1 * sin, x0 * sin + x1 * cos", "x0 * cos + x1 * sin, x1 * cos - x0 * sin"),
    ("a query sees the token after it", 2, "chunk_after_a_cache_is_causal", ("mla",), "device=q.device) <= positions[:, None]", "device=q.device) <= positions[:, None] + 1"),
    ("a query does not see itself", 2, "any_chunking_equals_uncached", ("mha", 0, [7, 1, 5]), "device=q.device) <= positions[:, None]", "device=q.device) < positions[:, None].clamp(min=1)"),
    ("values are padded and not cut", 2, "attend_returns_values_at_their_own_width", (), "return o[..., :w_v].transpose(1, 2)", "return o.transpose(1, 2)"),
    ("keys are cached before RoPE", 3, "logits_equal_oracle_at_every_budget", ("mha", torch.float64, TIGHT), "k = rope(k, positions, self.rope_base)", "k = k * 1"),
    ("RoPE starts at 0 with every chunk", None, "decoding_continues_rope_positions", ("gqa",), "return torch.arange(self.length, self.length + T,", "return torch.arange(0, T,"),
    ("the cache does not count", 4, "any_chunking_equals_uncached", ("mla", 0, [7, 1, 5]), "self.length += new.shape[1]\n        return", "return"),
    ("a full cache is written with m heads only", None, "nested_mha_full_cache_computes_and_stores_all_heads_at_any_budget", (), "slice_width(heads, self.n_h)\n        k = first_rows(self.W_K", "2\n        k = first_rows(self.W_K"),
    ("nested MHA reads the first head twice", 5, "budget_m_is_a_separate_model_of_the_first_m_heads", ("nested_mha",), "[:, :, :m].chunk(2, -1)", "[:, :, [*range(m - 1), 0]].chunk(2, -1)"),
    ("GQA's heads take keys in turn", 6, "logits_equal_oracle_at_every_budget", ("gqa", torch.float64, TIGHT), "o = self.attend(q, k, v, positions, self.d_h**-0.5)                     # head h", "o = self.attend(q.unflatten(2, (-1, self.n_kv)).transpose(2, 3).flatten(2, 3), k, v, positions, self.d_h**-0.5)  # head h"),
    ("the latent is cached before its norm", 7, "cache_holds_the_normed_latent_and_the_rotated_key", ("mla",), "c_KV = self.norm_KV(self.W_DKV(x)) ", "c_KV = self.W_DKV(x) "),
    ("k_R is cached before RoPE", 7, "cache_holds_the_normed_latent_and_the_rotated_key", ("matmla",), "k_R = rope(self.W_KR(x), positions, self.rope_base, self.rope_width)", "k_R = self.W_KR(x)"),
    ("the softmax scale forgets d_R", None, "softmax_scale_is_one_over_root_of_whole_query_width", (), "self.scale = (c.d_h + c.d_R) ** -0.5", "self.scale = c.d_h**-0.5"),
    ("queries are made of the latent before its norm", 8, "logits_equal_oracle_at_every_budget", ("mla", torch.float64, TIGHT), "c_Q = self.norm_Q(self.W_DQ(x))", "c_Q = self.W_DQ(x)"),
    ("absorbed reading sums W_UK's wrong side", 9, "any_chunking_equals_uncached", ("mla", math.inf, [1] * 13), "Σ p (W_UV c) = W_UV Σ p c\n        return self.W_O(o.flatten(2))", "Σ p\n        return self.W_O(o.transpose(2, 3).flatten(2))"),
    ("the head slice is one head too long", None, "head_slice_ends_exactly_at_m", ("matmla",), "return heads if isinstance(heads, int) else n_h", "return min(heads + 1, n_h) if isinstance(heads, int) else n_h"),
    ("W_O is sliced on the wrong axis", 10, "W_O_is_sliced_by_input_columns", ("matmla",), "self.W_O.weight[:, : m * self.d_h]", "self.W_O.weight.T.reshape(self.W_O.weight.shape)[:, : m * self.d_h]"),
    ("W_O is sliced from its end", 10, "budget_m_is_a_separate_model_of_the_first_m_heads", ("matmla",), "self.W_O.weight[:, : m * self.d_h]", "self.W_O.weight[:, -m * self.d_h :]"),
    ("the mask drops one head too few", 11, "gradients_of_sliced_masked_and_divided_batches_agree", ("matmla",), "device=o.device) < heads[:, None])", "device=o.device) <= heads[:, None])"),
    ("the latent is counted without k_R", 12, "cache_bytes_are_numbers_per_token_times_everything", ("mla",), "return self.d_c + self.d_R", "return self.d_c"),
    ("absorption is thought to pay up to d_h", 13, None, (), "return d_c * d_h / (d_c - d_h)", "return d_h"),
    ("the softmax scale of GQA is lost", 14, None, (), " * ((d_h + mla.d_R) / d_h) ** 0.5", ""),
    ("every head finds the values of the first group", 14, None, (), "torch.kron(own, torch.eye", "torch.kron(own * 0 + own[0], torch.eye"),
    ("a row that is not in use is read", None, "decoding_by_position_equals_decoding_by_length", ("matmla", {}), "device=q.device) <= positions[:, None]", "device=q.device) <= positions[:, None] + 2"),
    ("a batch divided by budgets comes back in another order", None, "gradients_of_sliced_masked_and_divided_batches_agree", ("nested_mha",), "in zip(parts, runs)]", "in zip(parts, runs)][::-1]"),
    ("top-p cuts one token too many", None, "sampling_follows_the_distribution_that_top_k_and_top_p_leave", (), "p.cumsum(-1) - p < top_p", "p.cumsum(-1) < top_p"),
]


@pytest.mark.parametrize("what, number, test, arguments, old, new", MUTANTS, ids=[mutant[0].replace(" ", "-") for mutant in MUTANTS])
def test_mutant_is_caught(what, number, test, arguments, old, new, monkeypatch):
    assert old in REFERENCE, f"matmla.py no longer says: {old}"
    mutated = REFERENCE.replace(old, new)
    if number:                                                                                     # a plausible wrong answer
        with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
            grade(number, mutated)
    if test:
        lab = load_text(mutated)
        monkeypatch.setitem(globals(), "matmla", lab)
        for name in ("ATTENTION", "GPT", "Cache", "Config", "attend", "rope", "sample"):
            monkeypatch.setitem(globals(), name, getattr(lab, name))
        with pytest.raises((AssertionError, RuntimeError)):
            globals()["test_" + test](*arguments)


def test_mutant_of_a_joined_product_that_is_cut_elsewhere_is_caught(monkeypatch):
    monkeypatch.setattr(decode.Part, "forward", lambda self, x: x[..., : self.stop - self.start])
    with pytest.raises((AssertionError, RuntimeError)):
        test_decoding_by_position_equals_decoding_by_length("matmla", {})


# ---------------------------------------------------------------- the scripts


def run(folder, *command):
    """Run a script in `folder`; return what it printed."""
    done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main_of(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    importlib.import_module(script.removesuffix(".py")).main()


def refuses(words, monkeypatch, capsys, script, *arguments):
    """It ends with status 2 and one line on stderr that has all of these words."""
    with pytest.raises(SystemExit) as stop:
        main_of(script, monkeypatch, *arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and all(word in message for word in words), message


SMALL = "--device cpu --n-layer 1 --d 24 --d-h 4 --d-c 12 --d-cq 8 --d-R 4 --d-ff 32 --context 32 --steps 3 --eval-windows 8".split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, "train.py", *SMALL)


def test_train_reports_saves_and_samples(trained):
    folder, printed = trained
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    final = lines[-1]["final"]
    assert list(final["val_loss"]) == ["12", "8", "4"]
    for m, loss in final["val_loss"].items():
        assert f"| {m} | {final['parameters']:,} | {final['tokens']:,} " in printed
        assert f"| {loss:.4f} | {math.exp(loss):.3f} |" in printed
        assert f"a sample at {m} heads" in printed
    assert torch.load(folder / "out/checkpoint.pt", weights_only=True)["config"]["budgets"] == (12, 8, 4)


@pytest.fixture(scope="session")
def baseline(trained):
    return run(trained[0], "train.py", *SMALL, "--attention", "mla", "--n-h", "8", "--out", "baseline")


def test_fixed_head_baseline_trains_with_the_same_command(baseline):
    assert "a sample at 8 heads" in baseline and "a sample at 4 heads" not in baseline


def start(folder, *flags, **options):
    """Start a training that takes some seconds; returns the process and the file of its metrics."""
    command = [sys.executable, HERE / "train.py", *SMALL, "--steps", "60", "--eval-every", "10", *flags]
    process = subprocess.Popen(command, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    return process, folder / flags[flags.index("--out") + 1] / "metrics.jsonl"


def wait_for(metrics, step, process):
    while f'{{"step": {step}, "val_loss"' not in (metrics.read_text() if metrics.exists() else ""):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def plain(state):
    """A nested state with its tensors as lists of numbers, which == compares to the last bit."""
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(v) for v in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def same_run(a, b):
    """Parameters, optimizers, losses and evaluations are equal to the last bit."""
    a_state, b_state = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    for folder, state in ((a, a_state), (b, b_state)):                                             # time too goes on, and differs
        assert 0 < state.pop("seconds") <= train.read_final(folder)["seconds"] + 1
    assert a_state["optimizers"][0]["state"] and plain(a_state) == plain(b_state)
    a_lines, b_lines = ([json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()][:-1] for folder in (a, b))
    assert a_lines == b_lines and a_lines[-1]["step"] == a_state["step"] == b_state["step"]


@pytest.fixture(scope="session")
def undisturbed(trained):
    process, _ = start(trained[0], "--out", "undisturbed")
    assert process.wait() == 0
    return trained[0] / "undisturbed"


@pytest.mark.parametrize("name, status, step", [("SIGKILL", -9, 30), ("SIGKILL", -9, 0), ("SIGTERM", 0, 30), ("SIGINT", 0, 30)])
def test_interrupted_run_resumes_as_if_never_stopped(undisturbed, name, status, step):
    out = undisturbed.parent / f"{name}{step}"
    if step == 0:
        shutil.copytree(undisturbed.parent / "out", out)                                           # of another run, to be replaced
        (out / "metrics.jsonl").unlink()
    process, metrics = start(undisturbed.parent, "--out", out.name)
    wait_for(metrics, step, process)
    process.send_signal(getattr(signal, name))
    printed, errors = process.communicate()
    assert process.returncode == status, errors
    assert ("continue with --resume" in printed) == (status == 0)
    run(undisturbed.parent, "train.py", "--resume", "--out", out.name)
    same_run(out, undisturbed)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_like_one(trained):
    """The same global batch, in two halves, accumulated over micro-batches: the same losses."""
    losses = []
    for launch, out in (((), "one"), (("-m", "torch.distributed.run", "--nproc_per_node=2", "--"), "two")):
        command = [sys.executable, *launch, HERE / "train.py", *SMALL, "--steps", "21", "--batch", "12", "--micro-batch", "4", "--out", out]
        done = subprocess.run(command, cwd=trained[0], env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses.append([x["loss"] for x in map(json.loads, (trained[0] / out / "metrics.jsonl").read_text().splitlines()) if "loss" in x])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_batched_muon_is_torchs_muon(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)                  # torch's rounds on the CPU too, ours does not
    ours, theirs = ([nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(i)))
                     for i, shape in enumerate([(8, 20), (8, 20), (20, 8), (30, 30)])] for _ in range(2))
    recipe = dict(lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for optimizer, parameters in ((train.Muon(ours, **recipe), ours), (torch.optim.Muon(theirs, **recipe), theirs)):
        for step in range(3):
            for i, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
    for p, q in zip(ours, theirs):
        assert error(p, q) < LOOSE


def test_every_budget_gets_its_share_of_sequences():
    _, args, config = train.settings(["--shares", "2,1,1", "--batch", "6"])
    given = torch.cat([train.passes(args, config, step, np.arange(6))[0][0] for step in range(4)])
    assert [(given == m).sum() for m in (12, 8, 4)] == [12, 6, 6]
    _, args, config = train.settings(["--shares", "2,1,1", "--batch", "8"])
    assert train.passes(args, config, 5, np.arange(8)) == [((12, 12, 8, 4), 1.0)]
    _, args, config = train.settings(["--objective", "sum", "--shares", "2,1,1"])
    assert train.passes(args, config, 5, np.arange(6)) == [(12, 0.5), (8, 0.25), (4, 0.25)]


def test_training_flops_count_only_the_heads_that_are_computed():
    def cost(*flags):
        _, args, config = train.settings(["--context", "32", *flags])
        return train.flops_per_token(args, config)

    fixed = [cost("--attention", "mla", "--n-h", m) for m in ("12", "8", "4")]
    assert fixed[0] > fixed[1] > fixed[2]
    assert cost() == cost("--objective", "sample") == pytest.approx(sum(fixed) / 3)
    assert cost("--batch", "18", "--micro-batch", "9") == pytest.approx(sum(fixed) / 3)
    assert cost("--objective", "sum") == pytest.approx(sum(fixed))
    assert cost("--batch", "10") == pytest.approx(fixed[0])                                        # a mask saves nothing
    assert cost("--batch", "10", "--micro-batch", "3") == pytest.approx(0.2 * sum(fixed) / 3 + 0.8 * fixed[0])    # in 3 steps 2 of 12 passes divide
    parts = cost("--batch", "10", "--micro-batch", "4", "--budgets", "12,4")                       # of 4, divided, of 3 and 3, masked
    assert parts == pytest.approx(0.4 * (fixed[0] + fixed[2]) / 2 + 0.6 * fixed[0])
    _, args, config = train.settings(["--context", "32", "--batch", "12"])
    assert train.flops_per_token(args, config, world=8) == pytest.approx(fixed[0])                 # 1 or 2 sequences each: masked


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_text_becomes_tokens_with_documents_held_out_whole(kind, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "get_encoding", lambda name, real=train.get_encoding: real("bytes"))    # no download here
    Path("texts").mkdir()
    written = [f"document {i}: é{'.' * 20 * i}" for i in range(450)]
    table = datasets.Dataset.from_dict({"body": [None, *written] if kind == "jsonl" else written})    # a row without text is left out
    if kind == "txt":
        for i, text in enumerate(written):
            Path(f"texts/{i:03}.txt").write_text(text, "utf-8")
    else:
        getattr(table, {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(f"texts/part.{kind}")
    _, args, _ = train.settings(["--data", "texts", "--text-column", "body"])
    folder = train.prepare(args)
    for name, expected in (("val.bin", written[::200]), ("train.bin", [t for i, t in enumerate(written) if i % 200])):
        tokens = np.fromfile(folder / name, np.uint16).tolist()
        assert tokens == [token for text in expected for token in [*text.encode(), 256]]
    assert train.prepare(args) == folder and [p.name for p in Path("data").iterdir()] == [folder.name]


def test_of_short_texts_the_last_20th_is_held_out_also_after_a_kill(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "get_encoding", lambda name, real=train.get_encoding: real("bytes"))
    Path("short.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(1000)))
    _, args, _ = train.settings(["--data", "short.jsonl"])
    folder = train.prepare(args)
    sizes = [(folder / name).stat().st_size for name in ("train.bin", "val.bin")]
    assert sizes[1] == pytest.approx(sum(sizes) / 20, abs=2)
    folder.rename(folder.with_name(f"{folder.name}.{os.getpid()}"))                               # as a killed run leaves it
    assert train.prepare(args) == folder and [p.name for p in Path("data").iterdir()] == [folder.name]
    _, args, _ = train.settings(["--data", "short.jsonl", "--tokens", "500"])
    limited = train.prepare(args)
    assert sum((limited / name).stat().st_size for name in ("train.bin", "val.bin")) // 2 in range(500, 510)    # whole documents
    Path("numbers.jsonl").write_text('{"text": 1}\n')
    refuses(("numbers.jsonl", "'text'"), monkeypatch, capsys, "train.py", "--data", "numbers.jsonl")


def test_a_second_run_that_prepares_the_same_text_takes_what_the_faster_one_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, args, _ = train.settings([])
    monkeypatch.setattr(train, "stdlib_files", lambda real=train.stdlib_files(): real[:30])
    folder = train.prepare(args)
    others = folder.rename("others")
    real = train.documents

    def while_another_run_finishes(*arguments):
        yield from real(*arguments)
        others.rename(folder)

    monkeypatch.setattr(train, "documents", while_another_run_finishes)
    stamp = (others / "train.bin").stat().st_mtime_ns
    assert train.prepare(args) == folder and [p.name for p in Path("data").iterdir()] == [folder.name]
    assert (folder / "train.bin").stat().st_mtime_ns == stamp


def test_diverging_run_stops_and_full_disk_keeps_the_old_checkpoint(trained):
    resource = pytest.importorskip("resource", reason="limits file sizes as a full disk would, on Unix")
    folder = trained[0]
    (folder / "kept").mkdir()
    shutil.copy(folder / "out/checkpoint.pt", folder / "kept")
    before = None
    for flags, words, limit in ((["--lr", "1e38"], "lower --lr", None), ([], "cannot save", 30_000)):
        limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))} if limit else {}
        process, _ = start(folder, "--out", "kept", *flags, **limits)
        _, errors = process.communicate()
        assert process.returncode == (2 if limit else 1) and words in errors and len(errors.splitlines()) == 1, errors
        kept = torch.load(folder / "kept/checkpoint.pt", weights_only=True)
        assert kept["step"] == 0 and all(p.isfinite().all() for p in kept["model"].values())
        assert not limit or (folder / "kept/checkpoint.pt").read_bytes() == before
        before = (folder / "kept/checkpoint.pt").read_bytes()
        assert not list((folder / "kept").glob("*.partial"))


def test_tokens_whose_vocabulary_is_out_of_reach_are_trained_on_and_reported(tmp_path, monkeypatch, capsys):
    def out_of_reach(name):
        raise OSError("no network")

    for name in ("train.bin", "val.bin"):
        (np.arange(2000) % 100).astype(np.uint16).tofile(tmp_path / name)
    monkeypatch.setattr(train, "get_encoding", out_of_reach)
    monkeypatch.setattr(signal, "signal", lambda *_: None)                                         # pytest keeps its Ctrl-C
    main_of("train.py", monkeypatch, *SMALL, "--data", tmp_path, "--out", tmp_path / "out")
    assert "no samples: no network" in capsys.readouterr().out and train.read_final(tmp_path / "out")


def test_report_compares_runs(trained, baseline):
    printed = run(trained[0], "train.py", "--report", "out", "baseline", "--out", "out")
    assert printed.count("matmla, mixed") == 3 and printed.count("| mla | 8 |") == 1
    assert all((trained[0] / "out" / name).stat().st_size > 10000 for name in ("report.png", "curves.png"))
    final = train.read_final(trained[0] / "out")
    lines = train.curves(trained[0] / "out")
    assert list(lines) == ["batches"] + [f"held out, {m} heads" for m in (12, 8, 4)] and min(lines["batches"]) == 0
    assert all(lines[f"held out, {m} heads"][max(lines["batches"]) + 1] == loss for m, loss in final["val_loss"].items())


def test_report_averages_seeds_and_reads_another_text(trained, baseline, tmp_path, monkeypatch, capsys):
    baseline = trained[0] / "baseline"
    text = "def f(x):\n    return x\n" * 100
    (tmp_path / "other.txt").write_text(text)
    for seed in (0, 1):
        shutil.copytree(baseline, tmp_path / f"mla.{seed}")
    lines = [json.loads(line) for line in (baseline / "metrics.jsonl").read_text().splitlines()]
    loss = lines[-1]["final"]["val_loss"]["8"]
    lines[-1]["final"] |= {"seed": 1, "val_loss": {"8": loss + 0.2}}
    (tmp_path / "mla.1/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(baseline, tmp_path / "mla.2")                                                  # another model has its own row
    lines[-1]["final"] |= {"seed": 2, "parameters": 1}
    (tmp_path / "mla.2/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = run(tmp_path, "train.py", "--report", "mla.2", "mla.0", "mla.1", "--text", "other.txt", "--out", ".")
    row = printed.splitlines()[-1].split(" | ")
    assert printed.count("| mla | mla |") == 2 and row[0] == "| mla" and row[-3] == f"{loss + 0.1:.4f} ± 0.1000" and row[-2] == f"{math.exp(loss + 0.1):.3f}"
    shutil.copytree(baseline, tmp_path / "mla")
    refuses(("mla", "seed 0"), monkeypatch, capsys, "train.py", "--report", tmp_path / "mla.0", tmp_path / "mla", "--out", tmp_path)
    model, encoding = train.load(baseline / "checkpoint.pt", "cpu")
    tokens, context = torch.tensor(encoding.encode(text)), model.config.context
    n = (len(tokens) - 1) // context
    with torch.no_grad():
        mean = model(tokens[: n * context].view(n, -1), tokens[1 : n * context + 1].view(n, -1))[1].item()
    assert abs(float(row[-1].strip(" |")) / math.exp(mean) - 1) < 0.02                             # its windows are evenly spaced


def test_sample_is_the_models_own_generation(trained):
    model, encoding = train.load(trained[0] / "out/checkpoint.pt", "cpu")
    for m in (12, 4):
        printed = run(trained[0], "sample.py", "--device", "cpu", "--heads", str(m), "--prompt", "def é", "--tokens", "50", "--temperature", "0")
        tokens = model.generate(torch.tensor([encoding.encode("def é")]), 50, heads=m, temperature=0)[0]
        assert printed == encoding.decode(tokens.tolist()) + "\n"


def test_sample_compares_budgets_and_takes_schedules_files_and_batches(trained, tmp_path):
    common = ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--device", "cpu", "--temperature", "0")
    compared = run(tmp_path, *common, "--compare", "--tokens", "12", "--prompt", "def ")
    assert all(f"--- {m} heads ---\ndef " in compared and f"--- {m} heads: " in compared for m in (12, 8, 4))
    (tmp_path / "prompt.txt").write_text("def é", "utf-8")
    model, encoding = train.load(trained[0] / "out/checkpoint.pt", "cpu")
    prompt = torch.tensor([encoding.encode("def é")])
    expected = encoding.decode(model.generate(prompt, 30, heads=[12] * 10 + [4] * 20, temperature=0)[0].tolist())
    flags = "--heads", "12:10,4:*", "--tokens", "30", "--prompt-file", tmp_path / "prompt.txt"
    assert run(tmp_path, *common, *flags) == expected + "\n"
    assert run(tmp_path, *common, *flags, "--samples", "2") == f"{expected}\n---\n{expected}\n"


def test_mistakes_are_one_line_and_status_2(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "empty").mkdir()
    other = torch.load(trained[0] / "out/checkpoint.pt", weights_only=True)
    torch.save(other | {"model": {"embed.weight": torch.zeros(3, 3)}}, tmp_path / "other.pt")
    for name, tokens in (("short", [7] * 9), ("foreign", [60000] * 999)):
        (tmp_path / name).mkdir()
        np.array(tokens, np.uint16).tofile(tmp_path / name / "train.bin")
        np.array(tokens, np.uint16).tofile(tmp_path / name / "val.bin")
    for command, words in {
        ("train.py", "--head", "4"): ("--head",),
        ("train.py", "--budgets", "16,4"): ("16", "12"),
        ("train.py", "--budgets", "4,12"): ("(4, 12)", "largest first"),
        ("train.py", "--budgets", "4,4"): ("(4, 4)", "different"),
        ("train.py", "--seed", "-1"): ("--seed", "-1"),
        ("train.py", "--steps", "many"): ("--steps", "positive", "many"),
        ("train.py", "--rope-base", "0"): ("rope_base", "0"),
        ("train.py", "--shares", "1,2"): ("(1, 2)", "3"),
        ("train.py", "--resume", "--out", "nothing"): ("nothing/checkpoint.pt",),
        ("train.py", "--resume", "--out", trained[0] / "out", "--d", "48"): ("shape",),
        ("train.py", "--resume", "--out", trained[0] / "out", "--budgets", "4"): ("shape",),
        ("train.py", "--resume", "--out", trained[0] / "out", "--shares", "2,1,1"): ("--shares", "--init"),
        ("train.py", "--resume", "--out", trained[0] / "out", "--weight-decay", "5"): ("--weight-decay", "--init"),
        ("train.py", "--report", "nothing"): ("nothing",),
        ("train.py", "--report", trained[0] / "out", trained[0] / "out"): ("two runs", "out"),
        ("train.py", "--text", "my.txt"): ("--text", "--report"),
        ("train.py", "--report", trained[0] / "out", "--text", "nothing.txt"): ("nothing.txt",),
        ("train.py", "--data", "empty"): ("empty", "no .txt"),
        ("train.py", "--data", "missing.jsonl"): ("no file missing.jsonl",),
        ("train.py", "--data", "short"): ("short", "9 tokens", "256"),
        ("train.py", "--data", "foreign"): ("foreign", "60000", "50304"),
        ("train.py", "--attention", "gqa", "--n-kv", "5", *SMALL): ("12", "5"),
        ("train.py", "--device", "abacus"): ("abacus",),
        ("sample.py",): ("out/checkpoint.pt", "train.py"),
        ("sample.py", "--checkpoint", "foreign.pt"): ("foreign.pt",),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "13"): ("13", "12"),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--prompt", ""): ("0 tokens",),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "12:5,99:*"): ("99", "12"),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "12:5,4:9"): ("14", "400", ":*"),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "all"): ("all", "12:64,4:*"),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--prompt-file", "nothing.txt"): ("nothing.txt",),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "4:-3,2:*"): ("4:-3,2:*",),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "4:3:2,2:*"): ("4:3:2,2:*",),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "4:*,2:3"): ("4:*,2:3",),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--heads", "4:900,2:*"): ("901", "400"),
        ("sample.py", "--compare", "--heads", "4"): ("--heads", "--compare"),
        ("sample.py", "--checkpoint", "other.pt"): ("other.pt", "fit"),
        ("sample.py", "--checkpoint", trained[0] / "out/checkpoint.pt", "--top-p", "0"): ("top_p 0",),
        ("sample.py", "--samples", "0"): ("--samples", "0"),
        ("train.py", "--init", trained[0] / "out/checkpoint.pt", "--out", trained[0] / "out"): ("--init", "another --out"),
        ("bench_cache.py", "--out", "foreign.pt"): ("foreign.pt",),
        ("bench_cache.py", "--preset", "huge"): ("huge",),
        ("bench_cache.py", "--switch", "nothing"): ("nothing",),
    }.items():
        refuses(words, monkeypatch, capsys, *command)


def test_bytes_survive_the_encoding():
    encoding = train.get_encoding("bytes")
    text = "def f():\r\n\n\treturn 'é日本'  \n\n"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode(train.END, allowed_special="all") == [encoding.eot_token] == [256]


def test_bench_measures_what_the_formula_says(tmp_path):
    rows = json.loads(run(tmp_path, "bench_cache.py", "--preset", "paper", "--device", "cpu").splitlines()[-1])["sizes"]
    assert all(row["measured"] == row["formula"] for row in rows)
    assert {row["variant"]: row["measured"] for row in rows if "ragged" not in row["layout"]} == {
        "mha": 61440, "nested_mha": 61440, "gqa": 20480, "mla": 10240, "matmla": 10240,
    }
    rows = json.loads(run(tmp_path, "bench_cache.py", "--preset", "deepseek-v3", "--device", "cpu").splitlines()[-1])["sizes"]
    assert [row["measured"] for row in rows] == [70272, 327680, 516096]                            # as published


def test_bench_times_every_variant(monkeypatch):
    config = Config(**SIZES | {"n_layer": 1})
    rows = bench_cache.speeds(config, [(2, 24)], torch.device("cpu"))
    assert [(row["variant"], row["reader"], row["heads"]) for row in rows][-3:] == [("matmla", "absorbed", m) for m in (6, 4, 1)]
    assert all(row["step"] > 0 and row["to_mha"] > 0 for row in rows) and decode.attend_one.__module__ == "decode"


def test_switching_matrix_is_the_perplexity_of_text_after_a_prefix(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    model, _ = train.load(Path("out/checkpoint.pt"), "cpu")
    variant, table = bench_cache.switching(Path("out"), torch.device("cpu"), count=16)
    assert variant == "matmla" and list(table) == [12, 8, 4]
    _, args, config = train.settings(SMALL)
    _, tokens = train.read_tokens(train.prepare(args), args, config)
    starts = np.linspace(0, len(tokens) - 33, 16).astype(int)
    losses = []
    for start in starts:                                                                           # both halves at 8 heads: one plain pass
        x = torch.from_numpy(tokens[start : start + 33].astype(np.int64))
        logits = model(x[None, :-1], heads=8)[0][0]
        losses.append(nn.functional.cross_entropy(logits[16:], x[17:]).item())
    assert table[8][8] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    bench_cache.draw_switching({"one": table, "two": table}, "switch.png")
    assert Path("switch.png").stat().st_size > 5000


# ---------------------------------------------------------------- pretrained models: transmla.py

FAMILIES = {    # what transformers' own random models look like; d = 24, n_h = 6 unless said otherwise
    "llama": ("Llama", dict(num_key_value_heads=3)),
    "llama, untied, wide heads, another base": ("Llama", dict(
        num_key_value_heads=2, tie_word_embeddings=False, head_dim=10, rms_norm_eps=1e-2,
        rope_parameters=dict(rope_theta=500.0, rope_type="default"))),
    "llama, a key for every head": ("Llama", dict(num_key_value_heads=6, head_dim=4)),
    "mistral, one key for all": ("Mistral", dict(num_key_value_heads=1, head_dim=8, sliding_window=None)),
    "mistral, a window as long as the context": ("Mistral", dict(num_key_value_heads=2, head_dim=8, sliding_window=64)),
    "qwen2, biases": ("Qwen2", dict(num_key_value_heads=2)),
    "qwen2, untied": ("Qwen2", dict(
        num_key_value_heads=3, tie_word_embeddings=False, rope_parameters=dict(rope_theta=1e6, rope_type="default"))),
}
HF_SIZES = dict(
    vocab_size=257, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6, head_dim=4,
    max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=256,
)


def hf_config(family, **sizes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{family}Config")(**HF_SIZES | sizes)


def hf_model(family, **sizes):
    """A model of transformers with random weights, biases and norms."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(hf_config(family, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 1))
    return model


def hf_tokens():
    return torch.randint(257, (B, 40), generator=torch.Generator().manual_seed(1))


def greedy(model, tokens, n):
    """transformers' own greedy continuation."""
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=False,
                          eos_token_id=None, pad_token_id=0)


def converted(model, order=None, moments=None, **changes):
    """(GQA, MLA) in float64 for a model of transformers."""
    import transmla

    gqa, old = transmla.to_gqa(model)
    mla = dataclasses.replace(gqa, **{"attention": "mla"} | changes)
    new = transmla.to_mla(old, gqa, mla, order, moments)
    return transmla.build(gqa, old, torch.float64), transmla.build(mla, new, torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_transmla_is_the_pretrained_model(name):
    transmla = pytest.importorskip("transmla")
    family, sizes = FAMILIES[name]
    theirs, tokens = hf_model(family, **sizes), hf_tokens()
    expected = theirs(tokens).logits
    gqa, mla = converted(theirs)
    assert gqa.config.qkv_bias == (family == "Qwen2") and gqa.config.tie == theirs.config.tie_word_embeddings
    assert error(mla(tokens)[0], gqa(tokens)[0]) < TIGHT
    assert mla.new_cache(3, 17).nbytes == gqa.new_cache(3, 17).nbytes
    continued = greedy(theirs, tokens, 20)
    for short in (0, math.inf):                                                                    # naive, absorbed
        for block in mla.blocks:
            block.attention.short = short
        logits, _ = chunked(mla, tokens, [17, 1, 22], [6] * 3)
        assert error(logits, gqa(tokens)[0]) < TIGHT
        assert torch.equal(mla.generate(tokens, 20, temperature=0), continued)
    for block in mla.blocks:
        block.attention.read, block.attention.short = None, 0                                      # absorbed needs neither
    assert error(transmla.absorbed(mla, tokens), gqa(tokens)[0]) < TIGHT
    for run in (lambda: gqa.float()(tokens)[0], lambda: transmla.absorbed(mla.float(), tokens)):
        assert error(run(), expected) < LOOSE


def test_transmla_keeps_the_softmax_scale():
    """√(d_h + d_R) grows with the number of keys in k_R; what the scores are divided by must stay √d_h."""
    for n_kv in (1, 2, 6):
        gqa, mla = converted(hf_model("Llama", num_key_value_heads=n_kv))
        a, b = gqa.blocks[0].attention, mla.blocks[0].attention
        assert (b.W_QR.weight.norm() * b.scale).item() == pytest.approx((a.W_Q.weight.norm() * a.d_h**-0.5).item())


@pytest.mark.parametrize("family, sizes, words", [
    ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)), "RoPE scaling (linear)"),
    ("Llama", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, rope_theta=1e4)), "RoPE on a part"),
    ("Llama", dict(hidden_act="gelu"), "the activation gelu"),
    ("Llama", dict(attention_bias=True), "self_attn.o_proj.bias"),
    ("Llama", dict(mlp_bias=True), "mlp.gate_proj.bias"),
    ("Mistral", dict(sliding_window=16), "a sliding window of 16"),
    ("Qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), "a sliding window of 16"),
    ("Qwen3", {}, "QK-norm"),
    ("Olmo2", {}, "QK-norm"),
    ("Mixtral", {}, "mixture of experts"),
    ("Qwen2Moe", {}, "mixture of experts"),
    ("Gemma", {}, "the architecture gemma"),
    ("GPT2", {}, "the architecture gpt2"),
])
def test_transmla_refuses_by_name(family, sizes, words, tmp_path, monkeypatch, capsys):
    hf_config(family, **sizes).save_pretrained(tmp_path)
    refuses([words], monkeypatch, capsys, "transmla.py", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A folder with a random Llama of 6 heads and 3 keys, a byte-level tokenizer, and a text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("pretrained")
    hf_model("Llama", num_key_value_heads=3).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": 256}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    (folder / "text.txt").write_text("the cat saw the dog, the dog saw the cat. " * 100, "utf-8")
    return folder


def test_transmla_refuses_what_is_broken(pretrained, tmp_path, monkeypatch, capsys):
    import transmla

    shutil.copytree(pretrained, tmp_path / "partly")
    safetensors = importlib.import_module("safetensors.torch")
    weights = safetensors.load_file(tmp_path / "partly/model.safetensors")
    del weights["model.layers.1.self_attn.v_proj.weight"]
    safetensors.save_file(weights, tmp_path / "partly/model.safetensors", {"format": "pt"})
    real = transmla.layer_to_mla
    wrong = lambda **given: (made := real(**given)) | {"W_KR": made["W_KR"].flip(0)}
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for arguments, words, layer in (
        ([tmp_path / "nothing"], "nothing", real),
        ([tmp_path / "partly"], "layers.1.self_attn.v_proj.weight", real),
        ([pretrained, "--d-R", "6"], "multiple of 4", real),
        ([pretrained, "--d-R", "16"], "up to 12", real),
        ([pretrained, "--d-R", "4", "--d-c", "16,21"], "21 in 1..20", real),
        ([pretrained, "--budgets", "7,3"], "1..6", real),
        ([pretrained, "--text", short], "10 tokens", real),
        ([pretrained, "--text", pretrained / "text.txt"], "our MLA, naive is another model", wrong),
    ):
        monkeypatch.setattr(transmla, "layer_to_mla", layer)
        refuses([words], monkeypatch, capsys, "transmla.py", *arguments, "--out", tmp_path / "out", "--device", "cpu")
        assert not (tmp_path / "out").exists()


def test_transmla_converts_without_a_tokenizer(tmp_path, monkeypatch, capsys):
    hf_model("Qwen2", num_key_value_heads=2).save_pretrained(tmp_path)
    main_of("transmla.py", monkeypatch, tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    assert "| our mla, d_c 8, d_R 8 | 6 | 64 |" in capsys.readouterr().out
    made = tmp_path / "out/checkpoint.pt"
    refuses(["without a tokenizer"], monkeypatch, capsys, "sample.py", "--checkpoint", made, "--device", "cpu")


def test_transmla_checkpoint_samples_and_trains_on(pretrained, monkeypatch, capsys):
    """It starts at the loss of the original, falls at every budget, and the cache does not grow."""
    import transmla

    folder, prompt = pretrained, "the é"
    main_of("transmla.py", monkeypatch, folder, "--out", folder / "matmla", "--text", folder / "text.txt",
            "--budgets", "6,4,2", "--device", "cpu")
    assert "| our matmla, d_c 12, d_R 12 | 2 | 96 |" in capsys.readouterr().out
    start = folder / "matmla/checkpoint.pt"
    main_of("sample.py", monkeypatch, "--checkpoint", start, "--prompt", prompt, "--tokens", 9, "--temperature", 0,
            "--device", "cpu")
    theirs, (model, encoding) = hf_model("Llama", num_key_value_heads=3), train.load(start, "cpu")
    continued = greedy(theirs, torch.tensor([encoding.encode_ordinary(prompt)]), 9)[0].tolist()
    text = b"".join(train.token_bytes(encoding, token) for token in continued).decode(errors="replace")
    assert capsys.readouterr().out == text + "\n"

    _, calibration = transmla.read_text(folder / "text.txt", 8192, encoding, 64)
    gqa = converted(theirs)[0].float()
    for old, new, score in zip(gqa.blocks, model.blocks, transmla.importance(gqa, calibration)):
        head = old.attention.W_O.weight.unflatten(1, (6, 4))[:, score.argmax()]
        assert torch.equal(new.attention.W_O.weight[:, :4], head), "the most important head is not the first"

    flags = "--out on --data text.txt --context 32 --steps 25 --batch 6 --eval-windows 24 --lr 0.02 --lr-adamw 0.01"
    printed = run(folder, "train.py", "--init", start, *flags.split(), "--device", "cpu")
    assert "a sample at 2 heads" in printed
    looks = [x["val_loss"] for x in train.read_log(folder / "on/metrics.jsonl") if "val_loss" in x]
    val = np.fromfile(next((folder / "data").glob("text-*/val.bin")), np.uint16)
    text = b"".join(map(encoding.decode_single_token_bytes, val.tolist())).decode()
    assert text in (folder / "text.txt").read_text() + "<end>"
    x, y = train.windows(val, np.linspace(0, len(val) - 33, 24).astype(int), 32, torch.device("cpu"))
    loss = nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert looks[0]["6"] == pytest.approx(loss, abs=1e-4)
    assert all(looks[-1][m] < looks[0][m] - 0.5 for m in ("6", "4", "2"))
    healed, _ = train.load(folder / "on/checkpoint.pt", "cpu")
    assert healed.new_cache(1, 1).nbytes == converted(theirs)[0].float().new_cache(1, 1).nbytes
    assert all(block.attention.W_UK.weight.abs().min() > 0 for block in healed.blocks)             # they were all zero


def test_init_takes_sizes_tokens_and_weights_but_fresh_optimizers(trained, tmp_path, monkeypatch, capsys):
    """Of any checkpoint; flags beat its sizes where weights allow it. One from before a field existed still resumes."""
    old = torch.load(trained[0] / "out/checkpoint.pt", weights_only=True)
    for field in ("qkv_bias", "norm_latents", "norm_eps", "rope_width"):
        del old["config"][field], old["settings"][field]
    torch.save(old, tmp_path / "checkpoint.pt")
    flags = "--context 16 --budgets 9,2 --data elsewhere --init"
    _, args, config = train.settings([*flags.split(), str(tmp_path / "checkpoint.pt")])
    assert (config.d, config.context, config.budgets, config.norm_eps) == (24, 16, (9, 2), 1e-6)
    assert args.encoding == "bytes" and args.steps == 500 and args.resume is None
    assert "wrote checkpoint.pt" in run(trained[0], "train.py", "--resume", "--out", tmp_path)
    for flags, words in ((["--d", "48"], "another shape"), (["--init", str(tmp_path / "no.pt")], "no.pt")):
        refuses([words], monkeypatch, capsys, "train.py", "--init", tmp_path / "checkpoint.pt", *flags, "--out", tmp_path / "new")
    monkeypatch.setattr(train, "get_encoding", lambda name: type("Large", (), {"n_vocab": 151936}))
    (tmp_path / "text.txt").write_text("a text")
    _, args, _ = train.settings(["--data", str(tmp_path / "text.txt")])
    with pytest.raises(ValueError, match="151936 .* 65536"):
        train.prepare(args)


def test_transmla_tokenizers_keep_every_byte(pretrained, tmp_path):
    """Byte-level pieces as of GPT-2, and <0x0A> for a single byte as of SentencePiece. Special tokens in a text are text."""
    import transmla

    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), " a", "ab", " ", "a", "b", "▁"]
    (tmp_path / "pieces.json").write_text(json.dumps(pieces), "utf-8")
    listed = train.get_encoding({"json": transmla.from_pieces(tmp_path / "pieces.json", 1), "eot_token": 1})
    assert listed.encode_ordinary("abab") == [1, *map(pieces.index, (" a", "b", "ab"))]            # earlier merges first
    encoding = train.get_encoding(transmla.read_pretrained(pretrained)[1])
    assert encoding.eot_token == 256 and encoding.n_vocab == 257
    for text in ("def f():\r\n\n\treturn 'é日本'  \n\n", "a <end> b"):
        for one, before in ((encoding, ""), (listed, "\n<s>\n ")):
            tokens = one.encode_ordinary(text)
            assert b"".join(map(one.decode_single_token_bytes, tokens)).decode() == before + text
            assert one.encode_ordinary_batch([text, ""], num_threads=2)[0] == tokens
    assert encoding.eot_token not in encoding.encode_ordinary("a <end> b")


def test_rope_frequencies_repeat():
    x, positions = torch.randn(B, T, 12, dtype=torch.float64), torch.arange(T)
    once = torch.cat([rope(part, positions, 100.0) for part in x.split(4, -1)], -1)
    assert error(rope(x, positions, 100.0, 4), once) < TIGHT and error(rope(x, positions, 100.0), once) > 0.1


# ---- smaller caches, fewer heads


def calibrated(theirs, **changes):
    import transmla

    gqa, _ = converted(theirs)
    return converted(theirs, moments=transmla.second_moments(gqa, hf_tokens()), **changes)


def test_transmla_rotation_of_kv_heads_commutes_with_rope():
    for family in ("Llama", "Qwen2"):
        gqa, mla = calibrated(hf_model(family, num_key_value_heads=3, head_dim=8), d_R=24, d_c=24)
        assert error(mla(hf_tokens())[0], gqa(hf_tokens())[0]) < TIGHT
        k = converted(hf_model(family, num_key_value_heads=3, head_dim=8))[1].blocks[0].attention.W_KR
        assert error(mla.blocks[0].attention.W_KR.weight, k.weight) > 0.1                          # but it is another one


def test_transmla_cuts_nothing_from_keys_that_are_copies_and_values_of_low_rank():
    """All keys ±1 times one another: RoRoPE puts them into one slot. Values of rank 5: PCA finds it."""
    theirs = hf_model("Qwen2", num_key_value_heads=3, head_dim=8)
    with torch.no_grad():
        for layer in theirs.model.layers:
            a = layer.self_attn
            for p in (a.k_proj.weight, a.k_proj.bias):
                p.copy_(torch.cat((p[:8], -p[:8], 2 * p[:8])))
            basis = torch.randn(24, 5)
            a.v_proj.weight.copy_(basis @ torch.randn(5, 24)), a.v_proj.bias.copy_(basis @ torch.randn(5))
    gqa, mla = calibrated(theirs, d_R=8, d_c=5)
    assert error(mla(hf_tokens())[0], gqa(hf_tokens())[0]) < 1e-6                                  # of float32 weights
    assert mla.new_cache(1, 1).nbytes * 48 == gqa.new_cache(1, 1).nbytes * 13
    gqa, mla = calibrated(theirs, d_R=8, d_c=4)
    assert error(mla(hf_tokens())[0], gqa(hf_tokens())[0]) > 1e-3


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_transmla_keys_beyond_k_R_go_through_the_latent(family):
    """Without RoPE, then. If the model's RoPE does not turn anything, that changes nothing."""
    theirs = hf_model(family, num_key_value_heads=3, head_dim=8, rope_parameters=dict(rope_theta=1e60, rope_type="default"))
    with torch.no_grad():
        for layer in theirs.model.layers:
            for name, p in layer.self_attn.k_proj.named_parameters():
                p.unflatten(0, (3, 2, 4))[:, :, 0] = 0                                             # frequency 1, at any base
    for d_R in (16, 8):
        gqa, mla = calibrated(theirs, d_R=d_R, d_c=48 - d_R)
        assert error(mla(hf_tokens())[0], gqa(hf_tokens())[0]) < 1e-8
        assert mla.blocks[0].attention.W_UK.weight.norm() > 1


def test_transmla_second_moments_are_of_what_the_attention_sees():
    import transmla

    gqa, _ = converted(hf_model("Llama", num_key_value_heads=3))
    windows = hf_tokens()
    x = torch.cat([gqa.blocks[0].norm_attention(gqa.embed(w[:-1])) for w in windows])
    x = torch.cat((x, torch.ones(len(x), 1)), 1)
    assert error(transmla.second_moments(gqa, windows)[0], sum(torch.outer(v, v) for v in x) / len(x)) < TIGHT


def test_transmla_any_order_of_heads_is_the_same_model_and_a_budget_keeps_the_first_of_them():
    theirs, tokens = hf_model("Qwen2", num_key_value_heads=2), hf_tokens()
    order = [[4, 0, 5, 2, 1, 3], [1, 3, 0, 5, 2, 4]]
    gqa, matmla_ = converted(theirs, order, attention="matmla", budgets=(6, 4, 2))
    assert error(matmla_(tokens)[0], gqa(tokens)[0]) < TIGHT
    with torch.no_grad():
        for block, heads in zip(gqa.blocks, order):
            for h in heads[2:]:
                block.attention.W_O.weight[:, h * 4 : (h + 1) * 4] = 0
    assert error(matmla_(tokens, heads=2)[0], gqa(tokens)[0]) < TIGHT


def test_transmla_importance_is_the_fisher_information_of_a_gate_per_head():
    import transmla

    gqa, _ = converted(hf_model("Llama", num_key_value_heads=3))
    score, expected = transmla.importance(gqa, hf_tokens()), torch.zeros(2, 6)
    for w in hf_tokens():
        gates = torch.ones(2, 39, 6, 1, dtype=torch.float64, requires_grad=True)
        hooks = [
            block.attention.W_O.register_forward_pre_hook(lambda _, o, g=g: (o[0].unflatten(-1, (6, 4)) * g).flatten(-2))
            for block, g in zip(gqa.blocks, gates)
        ]
        gqa(w[None, :-1], w[None, 1:])[1].backward()
        expected += gates.grad.square().sum((1, 3))
        for hook in hooks:
            hook.remove()
    assert error(score, expected) < LOOSE


def test_transmla_leaves_training_a_way_into_the_part_without_rope():
    """W_UK is zero and W_UQ is not: W_UK has a gradient at once. With both zero, neither would ever have one."""
    _, mla = converted(hf_model("Llama", num_key_value_heads=3))
    mla(hf_tokens(), hf_tokens())[1].backward()
    for block in mla.blocks:
        a = block.attention
        assert not a.W_UK.weight.any() and a.W_UK.weight.grad.abs().min() > 0
        assert a.W_UQ.weight.abs().min() > 0 and not a.W_UQ.weight.grad.any()                      # until W_UK has moved
        assert a.W_QR.weight.grad[a.W_QR.weight == 0].abs().min() > 0                              # other heads' slots too


def test_mla_can_do_what_no_gqa_of_the_same_cache_can():
    """The converse of TransMLA is false, twice.

    Values. A token that is alone sees itself, so the layer is a linear map of x, Σ_h W_O,h W_V,g(h) x. GQA caches as many
    numbers of values as of keys, so this map goes through half a row: its rank is at most n_kv·d_h. MLA may give nearly all
    of a row to c_KV: rank d_c.
    Scores. Head h of token t scores token s by q̃_t,h · k̃_s, k̃_s being the rotated keys of all n_kv heads side by side. So
    the scores of all heads, [n_h·T, S], are a product through n_kv·d_h numbers. What softmax shows of them, log p, differs
    by a constant in every row: 1 more at most. In MLA they go through a whole row, d_c + d_R = 2·n_kv·d_h numbers.
    """
    sizes = dict(n_layer=1, d=40, n_h=6, d_h=8, n_kv=2, qkv_bias=False, d_cq=0, norm_latents=False, rope_width=8)
    gqa = make("gqa", **sizes).blocks[0].attention
    assert gqa.numbers(6) == 32

    def rank_of_values(attention):
        return torch.linalg.matrix_rank(attention(torch.eye(40).double()[:, None])[:, 0]).item()   # 40 texts of one token

    mla = make("mla", **sizes | dict(d_c=28, d_R=4, rope_width=0)).blocks[0].attention
    assert mla.numbers(6) == 32
    assert rank_of_values(gqa) == 16 and rank_of_values(mla) == 28

    def rank_of_scores(attention):
        log_p = []

        def watch(q, k, v, positions, scale):
            keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
            scores = torch.einsum("bthd,bshd->bhts", q, keys)[0, :, 60:, :60] * scale              # late tokens see them all
            log_p.append(scores.log_softmax(-1))
            return attend(q, k, v, positions, scale)

        attention.attend = watch
        attention(torch.randn(1, 120, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4)
        return torch.linalg.matrix_rank(log_p[0].flatten(0, 1), rtol=1e-9).item()

    mla = make("mla", **sizes | dict(d_c=16, d_R=16)).blocks[0].attention                          # the shape TransMLA makes
    assert mla.numbers(6) == 32
    assert rank_of_scores(gqa) <= 16 + 1 and rank_of_scores(mla) > 16 + 1


def main():
    """Write the exercises: a copy of matmla.py, without the bodies of the functions to write."""
    parser = train.Parser(__doc__)
    parser.add_argument("--blank", required=True, type=Path, metavar="FILE", help="write a copy of matmla.py with the exercises blank")
    path = parser.parse_args().blank
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(blank(REFERENCE))
    except OSError as problem:
        parser.error(f"nothing was written: {problem}")
    print(f"{len(EXERCISES)} exercises in {path}. Grade them with: MATMLA={path.stem} python -m pytest test_matmla.py -k exercise -rsf --tb=short")


if __name__ == "__main__":
    main()
