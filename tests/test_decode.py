"""Tests of decode.py: all but the recording and the kernels without a GPU, these too where there is one."""

from types import SimpleNamespace

import pytest
import torch

import decode
import matmla
import pretrained    # noqa: F401    adds its attentions to ATTENTION
from test_matmla import error, make, some_tokens

SIZES = dict(context=40, d_R=20)    # in pretrained ones, frequencies start anew after d_h


@pytest.fixture
def recorded(monkeypatch):
    """In place of a CUDA graph: the function is called again, and its result left in the same tensor."""
    def record(function, device):
        result = function().clone()
        return SimpleNamespace(replay=lambda: result.copy_(function())), result
    monkeypatch.setattr(decode, "record", record)
    monkeypatch.setattr(decode, "compiled", lambda forward, lone: forward)


def compare(model, budgets, tolerance=1e-10, batch=2, heads=None, start=9, capacity=30, attend=decode.attend_one):
    """A fast step and the model's own, one token for each budget. Returns the cache with the graphs."""
    tokens, usual = some_tokens(batch, start + len(budgets)).to(model.embed.weight.device), model.step
    ours, theirs = (model.new_cache(batch, capacity, heads) for _ in range(2))
    for layer in ours:
        layer.rows.fill_(7.0)                                       # what is not in use must not be read
    decode.fast(model, attend)
    for step, cache in (model.step, ours), (usual, theirs):
        step(tokens[:, :start], budgets[0], cache)
    for token, m in zip(tokens[:, start:].split(1, 1), budgets):
        assert error(model.step(token, m, ours), usual(token, m, theirs)) < tolerance, m
    assert all(error(a.rows[:, : a.length], b.rows[:, : b.length]) < tolerance for a, b in zip(ours, theirs))
    return ours


@pytest.mark.parametrize("attention", matmla.ATTENTION)
def test_fast_steps_are_the_models_own_at_every_budget(attention, recorded):
    model, calls = make(attention, **SIZES), []
    assert (type(decode.join(model.blocks[0])) is decode.Joined) == (attention in ("mla", "matmla"))
    budgets = [6, 4, 1, (6, 2), 5, (4, 4), 6] if model.blocks[0].attention.nested else [6, None, (6, 6)]
    watched = lambda *given: calls.append(1) or decode.attend_one(*given)
    cache = compare(model, budgets, capacity=9 + len(budgets), attend=watched)
    assert calls, "the given attend was not called"
    with pytest.raises(ValueError, match="do not fit"):             # nor is the full cache overwritten
        model.step(some_tokens(2, 1), 6, cache)


def test_a_ragged_cache_and_no_query_latent_and_no_absorption_decode_too(recorded):
    compare(make("nested_mha", **SIZES), [4, 3], heads=4)
    for model in make("matmla", d_cq=0, **SIZES), make("matmla", **SIZES):
        for block in model.blocks:
            block.attention.short = 0
        assert decode.join(block) is block
        compare(model, [4, 3])


def test_there_is_one_graph_per_budget_and_per_doubling_beyond_1024_rows(recorded):
    cache = compare(make("matmla", context=5000), [6, 4, None, 6], start=1022, capacity=3000)
    assert set(cache.graphs) == {((6,), 1024), ((4,), 1024), ((6,), 2048)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", matmla.ATTENTION)
@pytest.mark.parametrize("batch", [1, 40])
def test_cuda_graphs_decode_like_the_models_own_step(attention, batch):
    budgets = [6, 4, 1] if matmla.ATTENTION[attention].nested else [6]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.08)):
        model = make(attention, dtype, context=400, d_h=16, d_c=24, d_R=32 if "pretrained" in attention else 8)
        cache = compare(model.cuda(), 4 * budgets, tolerance, batch, start=254, capacity=300)    # of blocks of 128
        assert len(cache.graphs) == len(budgets)
