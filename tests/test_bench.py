"""Tests of decode.py and bench_cache.py. What needs a GPU is run where there is one."""

import json
import math
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_cache
import common
import decode
from matmla import ATTENTION, GPT, Block, Config
from test_matmla import error, make, operations, randomized, readers, some_tokens

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# In pretrained attentions, frequencies start anew after d_h = 10 numbers.
ODD = dict(context=40, d_R=20, rope_base=500.0, norm_eps=1e-3)


# decode.py


@pytest.fixture
def captured(monkeypatch):
    """In place of a CUDA graph, a function is called again, and its result left in one tensor.

    A list with a list for every graph: how many keys its layers gave to attend_one.
    """
    graphs = []
    keys = []
    ordinary = decode.attend_one

    def attend_one(q, k, v, positions, scale):
        keys.append(k.shape[1])
        return ordinary(q, k, v, positions, scale)

    def capture_graph(function, device):
        keys.clear()
        result = function().clone()
        graphs.append([*keys])
        return SimpleNamespace(replay=lambda: result.copy_(function())), result

    monkeypatch.setattr(decode, "attend_one", attend_one)
    monkeypatch.setattr(decode, "capture_graph", capture_graph)
    monkeypatch.setattr(decode, "compiled", lambda forward, one_sequence: forward)
    return graphs


def compare(model, heads, tolerance=1e-10, batch=2, ragged=None, start=9, capacity=30):
    """A fast step beside the model's own, one token for each of `heads`. Returns the fast cache."""
    tokens = some_tokens(batch, start + len(heads)).to(model.embed.weight.device)
    ordinary = model.step
    ours = model.new_cache(batch, capacity, ragged)
    theirs = model.new_cache(batch, capacity, ragged)
    for layer in ours:
        layer.rows.fill_(7.0)  # what is not in use must not be read
    decode.fast(model)
    model.step(tokens[:, :start], heads[0], ours)
    ordinary(tokens[:, :start], heads[0], theirs)
    for token, m in zip(tokens[:, start:].split(1, 1), heads):
        assert error(model.step(token, m, ours), ordinary(token, m, theirs)) < tolerance, m
    for a, b in zip(ours, theirs):
        assert error(a.rows[:, : a.length], b.rows[:, : b.length]) < tolerance
    return ours


@pytest.mark.parametrize("attention", ATTENTION)
def test_fast_steps_are_the_models_own_with_any_heads(attention, captured):
    model = make(attention, **ODD)
    layer = model.blocks[0].attention
    assert (type(decode.join(model.blocks[0])) is decode.Joined) == (attention in ("mla", "matmla"))
    heads = [6, None, (6, 6), [6, (6, 6)]]
    if layer.nested:
        a, b = layer.unit, 2 * layer.unit  # 1 and 2, or 3 and 6 of nested GQA
        heads = [6, a, b, (6, a), [a, b], [(b, a), 6], [b, (a, a)], 6]
    compare(model, heads)


def test_fast_steps_without_what_usually_helps(captured):
    compare(make("nested_mha", **ODD), [4, 3, [3, 4]], ragged=4)
    compare(make("nested_mha", **ODD), [2, [2, 4], [1, 3]], ragged=[2, 4])
    compare(make("matmla", d_cq=0, **ODD), [4, 3])
    model = make("matmla", **ODD)
    next(readers(model))  # it expands the cache
    assert decode.join(model.blocks[0]) is model.blocks[0]
    compare(model, [4, 3])


@pytest.mark.parametrize(
    "context, capacity, words",
    [(12, 30, "12 + [2, 1] tokens do not fit [B, 12]"), (40, 12, "2 x 13 tokens do not fit into")],
)
def test_a_fast_step_is_refused_beyond_the_context_and_the_cache(
    context, capacity, words, captured
):
    model = make("matmla", **ODD | {"context": context})
    cache = compare(model, [6, 4, 6], capacity=capacity)  # 9 tokens, and 3
    with pytest.raises(ValueError, match=re.escape(words)):
        model.step(some_tokens(2, 1), 6, cache)


def test_a_graph_for_every_choice_of_heads_and_doubling_of_the_rows_is_freed_with_the_cache(
    captured,
):
    model = make("matmla", context=5000)
    # The tokens stand at 1022 to 1026.
    cache = compare(model, [6, 4, [6, 4], None, 6], start=1022, capacity=3000)
    assert captured == [[1024, 1024], [1024, 1024], [2048, 2048], [2048, 2048]]
    rows = weakref.ref(cache[0].rows)
    del cache
    assert rows() is None


def test_a_block_is_not_joined_where_that_makes_it_much_larger():
    with torch.device("meta"):
        block = Block(bench_cache.PUBLISHED["DeepSeek-V3"])
    assert decode.join(block) is block


@gpu
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("batch", [1, 40])
def test_cuda_graphs_decode_like_the_models_own_step(attention, batch):
    """Across a block of 128 keys; also heads that differ between layers and sequences."""
    torch.compiler.reset()
    heads = [6]
    if ATTENTION[attention].nested:
        heads = [6, 3, [3, 6]] if batch == 1 else [6, 3, [3, 6], [(6, 3), 3]]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.08)):
        d_R = 32 if "pretrained" in attention else 8
        model = make(attention, dtype, context=400, d_h=16, d_c=24, d_R=d_R).cuda()
        compare(model, 4 * heads, tolerance, batch, start=254, capacity=300)


# bench_cache.py


def printed(says, flags):
    """The JSON that bench_cache.py prints last."""
    return json.loads(says(bench_cache, f"--device cpu {flags}").splitlines()[-1])


def test_a_token_takes_the_bytes_that_the_papers_say(says):
    published = printed(says, "--preset deepseek-v3")
    # From DeepSeek's paper on hardware, arXiv:2505.09343
    assert [row["bytes measured"] for row in published["sizes"]] == [70272, 327680, 516096]
    assert "decoding" not in published

    small = Config(n_layer=3, d=40, n_h=6, n_kv=2, d_h=10, d_c=14, d_R=8, budgets=(6, 4, 2))
    models = {name: replace(small, attention=name) for name in ATTENTION if "pre" not in name}
    rows = [*bench_cache.sizes(models, torch.device("cpu"))]
    numbers = {"mha": [120], "nested_mha": [120, 80, 40], "gqa": [40], "nested_gqa": [40]}
    numbers |= {"mla": [22], "matmla": [22]}
    right = [(name, n, n * 3 * 2, n * 3 * 2) for name in numbers for n in numbers[name]]
    columns = ("attention", "numbers in a layer", "bytes by formula", "bytes measured")
    assert [tuple(row[name] for name in columns) for row in rows] == right


COSTS = dict(d=40, n_h=6, d_h=10, d_c=14, d_cq=22, d_R=8, d_ff=36, context=16)


def test_the_papers_costs_are_those_of_the_weights_that_a_token_uses():
    """A weight costs 2 FLOPs for a token. Of W_UQ, W_QR, W_UK and W_UV, a token uses its heads'."""
    rows = bench_cache.costs(Config(**COSTS))
    rows = {(row["attention"], row["reader"], row["α"]): row for row in rows}
    a = ATTENTION["matmla"](Config(**COSTS))
    size = {name: 2 * p.numel() for name, p in a.named_parameters()}
    shared = size["W_DQ.weight"] + size["W_DKV.weight"] + size["W_KR.weight"]
    of_queries = (size["W_UQ.weight"] + size["W_QR.weight"]) // 6
    of_keys = (size["W_UK.weight"] + size["W_UV.weight"]) // 6
    W_Q = 2 * 40 * 6 * 10  # as large as W_K and W_V

    # heads of a token on average; keys and values that are made for it, if budgets are mixed:
    # half of the tokens in a first pass with 3 heads, all in a second with 6
    for alpha, used, made in (("0", 6, 6), ("0.5", 4.5, 0.5 * 3 + 6), ("1", 3, 3)):
        row = rows["nested_mha", "", alpha]
        assert row["at our sizes"] == row["counted"] == 3 * W_Q * used / 6
        written = 3 if alpha == "1" else 6
        assert row["counted, mixed"] == W_Q * used / 6 + 2 * W_Q * written / 6
        assert (row["cached"], row["cached, mixed"]) == (2 * used * 10, 2 * written * 10)

        for reader, keys in (("expanded", made), ("absorbed", used)):
            row = rows["matmla", reader, alpha]
            assert row["counted"] == shared + (of_queries + of_keys) * used
            assert row["counted, mixed"] == shared + of_queries * used + of_keys * keys
            assert row["cached"] == row["cached, mixed"] == 14 + 8


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_table_2_is_the_papers(alpha):
    """Its formulas as they stand there. With c_q = c, ours has narrower values, and no more."""
    d, h, c, r = 40, 6, 14, 8
    config = Config(**COSTS | {"d_cq": c})
    d_h = 10 + r
    paper = (6 - 3 * alpha) * c * h * d_h - (2 - alpha) * c * h * r + 4 * d * c + 2 * d * r
    values = (2 - alpha) * c * h * r
    assert bench_cache.table_2(config, alpha) == (paper, paper - values, c + r)
    d_h = 10
    flops = (6 - 3 * alpha) * d * h * d_h
    found = bench_cache.table_2(replace(config, attention="nested_mha"), alpha)
    assert found == (flops, flops, (2 - alpha) * h * d_h)


def test_steps_and_prompts_are_timed_beside_mha(monkeypatch, says):
    times = iter(range(1, 99))
    flops = []

    def seconds(call):
        assert len(call()) == 2  # a token for each sequence
        flops.append(operations(call))
        return next(times)

    monkeypatch.setitem(bench_cache.SHAPES, "cpu", [(2, 40)])
    monkeypatch.setattr(bench_cache, "seconds", seconds)
    tables = printed(says, "")
    found = [tuple(row.values()) for row in tables["decoding"]]
    assert found == [
        (2, 40, "mha", "", 12, 1, 1e3),
        (2, 40, "nested_mha", "full", 4, 2, 2e3),
        (2, 40, "gqa", "", 12, 3, 3e3),
        (2, 40, "nested_gqa", "", 4, 4, 4e3),
        (2, 40, "matmla", "expanded", 12, 5, 5e3),
        (2, 40, "matmla", "absorbed", 12, 6, 6e3),
        (2, 40, "matmla", "absorbed", 8, 7, 7e3),
        (2, 40, "matmla", "absorbed", 4, 8, 8e3),
    ]
    prompts = [(row["attention"], row["heads"], row["relative time"]) for row in tables["prompts"]]
    times = iter(range(9, 16))
    assert prompts == [(row[2], row[4], next(times) / 9) for row in found if row[3] != "expanded"]
    expanded, absorbed, eight, four = flops[4:8]
    assert expanded > 3 * absorbed > 3 * eight > 3 * four
    assert flops[12] > 30 * absorbed  # 40 tokens with 12 heads


def test_on_a_gpu_a_row_says_what_the_cache_gives_and_what_heads_do_with_it(monkeypatch):
    monkeypatch.setattr(bench_cache, "step_seconds", lambda *arguments: 0.002)
    monkeypatch.setattr(bench_cache, "attention_seconds", lambda *arguments: 0.001)
    config = replace(bench_cache.PUBLISHED["DeepSeek-V3"], n_layer=3, n_kv=8)
    readers = [("matmla", "absorbed", 128), ("matmla", "absorbed", 32)]
    readers += [("mha", "", 128), ("gqa", "", 128), ("nested_mha", "full", 32)]
    rows = bench_cache.speeds(config, readers, [(64, 8192)], False, SimpleNamespace(type="cuda"))
    found = [(row["GB/s of cache"], row["FLOPs per byte"], row["attention, ms"]) for row in rows]
    second = 64 * 8192 * 2 * 3 / 0.002 / 1e9  # of one number in each layer
    of_one = 2 * 576 + 2 * 512  # FLOPs of a head for a token: a score, and a share of the sum
    right = [
        (576 * second, 128 * of_one / (2 * 576), 1),
        (576 * second, 32 * of_one / (2 * 576), 1),
        (128 * 256 * second, 1, 1),
        (8 * 256 * second, 16, 1),
        (32 * 256 * second, 1, 1),
    ]
    assert found == [pytest.approx(row) for row in right]


@gpu
@pytest.mark.parametrize("preset, count", [("tiny", 8), ("deepseek-v3", 3)])
def test_a_gpu_measures_every_row(preset, count, monkeypatch, says):
    """With few tokens, and three calls each."""
    monkeypatch.setattr(bench_cache, "SHAPES", {"cuda": [(3, 300)], "deepseek-v3": [(2, 300)]})

    def seconds(call):
        return bench_cache.Timer("call()", globals={"call": call}).timeit(3).median

    monkeypatch.setattr(bench_cache, "seconds", seconds)
    tables = printed(says, f"--device cuda --preset {preset}")
    assert len(tables["decoding"]) == count
    for row in tables["decoding"] + tables["prompts"]:
        assert all(value > 0 for value in row.values() if isinstance(value, float)), row


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A model, saved in the folder run as if it had been trained on text.txt."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(n_layer=2, d=24, n_h=6, d_h=4, d_c=12, d_cq=8, d_R=6, d_ff=32, context=32)
    model = randomized(GPT(Config(**sizes, budgets=(6, 4, 1))))
    Path("text.txt").write_text("def f(x):\n    return x + 1\n" * 2000)
    Path("run").mkdir()
    common.save(
        Path("run/checkpoint.pt"),
        config=vars(model.config),
        settings={"data": "text.txt", "tokens": 0},
        encoding="bytes",
        step=1,
        model=model.state_dict(),
        optimizers=[],
        log=[],
    )
    return model


def test_the_switching_matrix_is_the_perplexity_of_text_after_a_prefix(trained, says):
    rows = printed(says, "--switch run")["perplexity"]["run"]
    _, held_out, _ = common.load_run(Path("run"), "cpu")
    assert list(rows[0]) == ["a \\ b", "6", "4", "1"]
    for row, prefix in zip(rows, (6, 4, 1), strict=True):
        losses = common.evaluate_after(prefix, trained, held_out, 128, (6, 4, 1))
        right = [prefix, *map(math.exp, losses)]
        assert list(row.values()) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    "change, words", [({"settings": {}}, "no held-out text"), ({"data": {}}, "has changed")]
)
def test_a_run_without_its_text_is_not_measured(change, words, trained, says, refuses):
    saved = common.load_checkpoint(Path("run/checkpoint.pt"))
    common.save(Path("run/checkpoint.pt"), **(saved | change))
    refuses([words], printed, says, "--switch run")
