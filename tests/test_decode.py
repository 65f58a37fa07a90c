"""Tests of decode.py: all but the recording and the kernels without a GPU, these too where there is one."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import decode
import matmla
import pretrained    # adds its attentions to matmla.ATTENTION
from test_matmla import SIZES, error, randomized, some_tokens

NESTED = {"nested_mha", "matmla", "pretrained_matmla"}
every_variant = pytest.mark.parametrize("attention", matmla.ATTENTION)


def make(attention, dtype=torch.float64, **sizes):
    d_R = 20 if attention.startswith("pretrained") else 8           # there, RoPE's frequencies start anew after d_h
    return randomized(matmla.GPT(matmla.Config(attention, **SIZES | dict(context=40, d_R=d_R) | sizes)).to(dtype))


@pytest.fixture
def recorded(monkeypatch):
    """In place of a CUDA graph: the function is called again, and its result left in the same tensor."""
    def record(function, device):
        result = function().clone()
        return SimpleNamespace(replay=lambda: result.copy_(function())), result

    monkeypatch.setattr(decode, "record", record)
    monkeypatch.setattr(decode, "compiled", lambda forward, lone: forward)


def compare(model, steps, tolerance=1e-10, batch=2, heads=None, start=9, capacity=30, attend=decode.attend_one):
    """A fast step and the model's own, one token for each budget in `steps`. Returns the cache with the graphs."""
    tokens, usual = some_tokens(batch, start + len(steps)).to(model.embed.weight.device), matmla.GPT.step
    ours, theirs = (model.new_cache(batch, capacity, heads) for _ in range(2))
    for layer in ours:
        layer.rows.fill_(7.0)                                       # what is not in use must not be read
    decode.fast(model, attend)
    first = model.blocks[0].attention.check(heads, batch, 6)[0]
    with torch.no_grad():
        for step, cache in (model.step, ours), (functools.partial(usual, model), theirs):
            step(tokens[:, :start], first, cache)
        for i, m in enumerate(steps, start):
            expected = usual(model, tokens[:, i : i + 1], m, theirs)
            assert error(model.step(tokens[:, i : i + 1], m, ours), expected) < tolerance, m
    assert ours.length == theirs.length == start + len(steps)
    assert all(error(a.rows[:, : a.length], b.rows[:, : b.length]) < tolerance for a, b in zip(ours, theirs))
    return ours


@every_variant
def test_fast_steps_are_the_models_own_at_every_budget(attention, recorded):
    for dtype, tolerance in (torch.float64, 1e-10), (torch.float32, 1e-5):
        model = make(attention, dtype)
        kind = "Block" if "pretrained" in attention else "JoinedMLA" if "mla" in attention else "JoinedMHA"
        assert type(decode.join(model.blocks[0])).__name__ == kind
        compare(model, [6, 4, 1, (6, 2), 5, None, (4, 4), 6] if attention in NESTED else [6, None, (6, 6)], tolerance)


def test_no_query_latent_and_no_absorption_and_a_ragged_cache_decode_too(recorded):
    naive = make("matmla")
    for block in naive.blocks:
        block.attention.short = 0
        assert decode.join(block) is block
    compare(naive, [6, 4])
    compare(make("matmla", d_cq=0), [6, 4, (6, 1)])
    compare(make("matmla", d_c=8), [6, 4])                          # narrower than a head
    compare(make("nested_mha"), [4, 3], heads=4)


def test_there_is_one_graph_per_budget_and_per_doubling_beyond_1024_rows(recorded):
    model = make("matmla", context=5000)
    cache = compare(model, [6, 4, None, 6], start=1022, capacity=3000)
    assert set(cache.graphs) == {((6,), 1024), ((4,), 1024), ((6,), 2048)}
    cache = compare(model, [6, 6], batch=1, start=2047, capacity=2500)
    assert set(cache.graphs) == {((6,), 2048), ((6,), 2500)}


def test_generation_past_the_context_is_the_models_own(recorded):
    model, tokens, heads = make("matmla"), some_tokens(2, 5), [6] * 20 + [1] * 30 + [4] * 20
    expected = model.generate(tokens, 70, heads, temperature=0)
    decode.fast(model)
    assert torch.equal(model.generate(tokens, 70, heads, temperature=0), expected)


def test_mistakes_are_refused_as_by_the_models_own_step(recorded):
    model = make("matmla")
    cache, token = compare(model, [6], capacity=11), some_tokens(2, 1)
    with torch.no_grad():
        for tokens, heads, words in (token, 7, "7 .* 6"), (token, (6, 4, 1), "2 .* 3"), (token[:1], 6, "1 .* 2"):
            with pytest.raises(ValueError, match=words):
                model.step(tokens, heads, cache)
            assert cache.length == 10
        model.step(token, 6, cache)                                 # the last that fits
        with pytest.raises(ValueError, match="12"):
            model.step(token, 6, cache)


@every_variant
def test_every_attention_calls_the_given_attend_while_it_is_recorded(attention, recorded):
    model, calls, usual = make(attention), [], matmla.attend
    decode.fast(model, lambda *arguments: (calls.append(1), usual(*arguments))[1])
    model.generate(some_tokens(2, 5), 2)                            # the prompt, then one step
    assert len(calls) == 2 and matmla.attend is usual               # in 2 layers


@pytest.mark.parametrize("attention", ["gqa", "matmla", "pretrained_mla"])
def test_all_layers_and_lengths_share_one_compiled_block(attention, recorded, monkeypatch):
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(decode, "compiled", functools.cache(
        lambda forward, lone: torch.compile(forward, backend=counter, fullgraph=True, dynamic=False)))
    compare(make(attention), [6, 6, 6], attend=matmla.attend)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("B, g, S, position", [
    (2, 1, 20, 13), (2, 2, 128, 127), (1, 6, 300, 127), (2, 1, 300, 128), (2, 2, 300, 299), (1, 1, 4200, 4150)])
def test_attend_one_equals_attend(B, g, S, position, monkeypatch):
    chip = SimpleNamespace(shared_memory_per_block_optin=232448, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: chip)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(decode, "attend", lambda *a: pytest.fail("the kernel was not called"))
    q, rows = torch.randn(B, 1, 6, 16).bfloat16(), torch.randn(B, S, g, 16).bfloat16()
    past, position = rows[:, : position + 1].double(), torch.tensor([position])
    o = decode.attend_one(q, rows, rows, position, 0.3).double()
    assert error(o, matmla.attend(q.double(), past, past, position, 0.3)) < 0.01    # bfloat16 has 8 bits


@pytest.mark.parametrize("B, g, w, w_v, dtype", [
    (1, 1, 16, 16, torch.bfloat16), (2, 6, 20, 12, torch.bfloat16), (2, 1, 288, 288, torch.bfloat16),
    (2, 6, 16, 16, torch.float32)])
def test_attend_one_leaves_to_attend_what_the_kernel_is_bad_at(B, g, w, w_v, dtype, monkeypatch):
    q, k, v = (torch.randn(B, n, h, width).to(dtype) for n, h, width in ((1, 6, w), (20, g, w), (20, g, w_v)))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(decode, "flex_attention", lambda *a, **k: pytest.fail("the kernel was called"))
    expected = matmla.attend(q, k, v, torch.tensor([13]), 0.1)
    assert torch.equal(decode.attend_one(q, k, v, torch.tensor([13]), 0.1), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_variant
@pytest.mark.parametrize("batch", [1, 40])
def test_cuda_graphs_decode_like_the_models_own_step(attention, batch):
    budgets = [6, 4, 1] if attention in NESTED else [6]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.08)):
        model = make(attention, dtype, context=400, d_h=16, d_c=24, d_R=32 if "pretrained" in attention else 8)
        cache = compare(model.cuda(), 4 * budgets, tolerance, batch, start=254, capacity=300)    # of blocks of 128
        assert len(cache.graphs) == len(budgets)
