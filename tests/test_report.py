"""Tests of report.py and dial.py, on runs with random weights."""

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import common
import dial
import report
from data import fingerprint
from matmla import GPT, MLA, Config
from test_matmla import randomized

# All sizes differ, so that a swapped axis cannot go unseen.
SIZES = dict(n_layer=3, d=20, n_h=6, n_kv=2, d_h=8, d_c=10, d_cq=14, d_R=4, d_ff=18, context=13)
BUDGETS = (6, 4, 2)
WINDOWS = 19


def write_run(folder, attention="matmla", seed=0, losses=(5.0, 5.5, 6.0), data="text"):
    """A finished run with random weights and these last losses, one for each budget: its model."""
    budgets = BUDGETS[: len(losses)]
    model = randomized(GPT(Config(attention=attention, budgets=budgets, **SIZES)), seed)
    names = [str(m) for m in budgets]
    summary = {
        "variant": f"{attention}, mixed",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": 7800,
        "flops": 1.25e9,
        "cache_bytes": 84,
        "val_loss": dict(zip(names, losses)),
        "seconds": 30 + 10 * seed,
        "seed": seed,
    }
    log = [
        {"step": 0, "val_loss": dict.fromkeys(names, 7.0)},
        {"step": 0, "loss": 7.25},
        {"step": 10, "loss": 5.75},
        {"step": 20, "val_loss": summary["val_loss"]},
        {"step": 20, "final": summary},
    ]
    Path(folder).mkdir()
    common.save(
        Path(folder, "checkpoint.pt"),
        config=vars(model.config),
        settings={"data": data, "tokens": 0},
        encoding="bytes",
        step=20,
        model=model.state_dict(),
        optimizers=[],
        log=log,
        data=fingerprint(data),
    )
    return model


TOKENS = np.random.default_rng(0).integers(257, size=(2, 301)).astype(np.uint16)


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    """It is empty, but for a folder with tokens, text."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    TOKENS[0].tofile("text/train.bin")
    TOKENS[1].tofile("text/val.bin")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by name, in place of files."""
    figures = {}

    def keep(figure, path, dpi):
        figures[path.name] = figure

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def cells(table):
    """The rows of a printed Markdown table, without its two head lines, as lists of strings."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


# ---------------------------------------------------------------- report.py


def test_runs_named_after_their_seeds_share_a_row_with_mean_and_half_the_range(says):
    write_run("mat.0", seed=0, losses=(5.0, 5.5, 6.0))
    write_run("mat.1", seed=1, losses=(5.2, 5.4, 6.0))
    write_run("mat.7", seed=7, losses=(5.9, 5.6, 6.3))
    write_run("mat.3", seed=4, losses=(1.0, 2.0, 800.0))  # not named after its seed
    *three, other, _, diverged = cells(says(report, "mat.0 mat.1 mat.7 mat.3").strip())
    size = f"{sum(p.numel() for p in GPT(Config('matmla', **SIZES)).parameters()):,}"
    assert three == [
        ["mat", "matmla, mixed", m, size, "7,800", "1.25e+09", "57", "84"]  # (30 + 40 + 100) / 3
        + [f"{mean:.4f} ± {spread:.4f}", f"{math.exp(mean):.3f}"]
        for m, mean, spread in (("6", 16.1 / 3, 0.45), ("4", 5.5, 0.1), ("2", 6.1, 0.15))
    ]
    assert other[0] == "mat.3" and other[-2:] == ["1.0000", f"{math.e:.3f}"]
    assert diverged[-2] == "800.0000" and len(diverged[-1]) > 300, "e to the 800 is no float"


def test_the_figure_has_every_loss_and_how_far_it_is_behind_the_first_run(says, drawn):
    write_run("a", losses=(5.0, 5.5))
    write_run("b", losses=(4.75, 5.25))
    says(report, "a b --out figures")
    left, right = [
        [dict(zip(*line.get_data())) for line in axes.lines] for axes in drawn["curves.png"].axes
    ]
    batches = {0: 7.25, 10: 5.75}
    assert left == [
        *(batches, {0: 7.0, 20: 5.0}, {0: 7.0, 20: 5.5}),
        *(batches, {0: 7.0, 20: 4.75}, {0: 7.0, 20: 5.25}),
    ]
    assert right == [
        *({0: 0, 10: 0}, {0: 0, 20: 0}, {0: 0, 20: 0.5}),
        *({0: 0, 10: 0}, {0: 0, 20: -0.25}, {0: 0, 20: 0.25}),
    ]
    assert json.loads(Path("figures/report.json").read_text())["b"]["val_loss"]["4"] == 5.25


def test_one_run_is_drawn_in_its_own_folder_unless_out_says_otherwise(says):
    write_run("one")
    says(report, "one")
    assert {"curves.png", "report.json"} < {path.name for path in Path("one").iterdir()}
    says(report, "one --out elsewhere")
    assert {path.name for path in Path("elsewhere").iterdir()} == {"curves.png", "report.json"}


def test_the_perplexity_of_another_text_is_that_of_all_of_it(says):
    models = [write_run(f"mat.{seed}", seed=seed, losses=(5.0, 5.5)) for seed in (0, 1)]
    text = "def f(x):\n    return x\n" * 9
    Path("other.txt").write_text(text)
    rows = cells(says(report, "mat.0 mat.1 --text other.txt").strip())
    tokens = np.array([*text.encode(), 256])  # 256 ends it
    losses = [common.evaluate(model, tokens, (len(tokens) - 1) // 13, (6, 4)) for model in models]
    right = np.exp(np.mean(losses, 0))
    assert [float(row[-1]) for row in rows] == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("script", [report, dial])
def test_a_log_that_is_cut_unfinished_or_of_another_version_is_named_in_one_line(
    script, says, refuses
):
    write_run("good")
    text = Path("good/metrics.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    for broken, words in {
        text[:-50]: "cut",
        "".join(lines[:-1]): "not finished",
        "": "not finished",
        text.replace('"flops"', '"operations"'): "another version of train.py: 'flops'",
        text.replace('"step"', '"steps"'): "another version of train.py",
        text.replace(lines[0], "3\n"): "damaged",
    }.items():
        Path("good/metrics.jsonl").write_text(broken)
        refuses(["good/metrics.jsonl", words], says, script, "good --out figures")
    refuses(["none/metrics.jsonl"], says, script, "none --out figures")
    assert not Path("figures").exists()


def test_runs_that_cannot_share_a_row_or_a_name_are_named(says, refuses):
    write_run("mat.0", seed=0)
    write_run("mat", seed=0)
    write_run("mat.1", seed=1, losses=(5.0, 5.5))
    shutil.copytree("mat.0", "elsewhere/mat.0")
    for flags, words in {
        "mat.0 mat": "mat.0, mat are one row, mat",
        "mat.0 mat.1": "mat.0, mat.1 are one row, mat",
        "mat.0 elsewhere/mat.0": "two runs are named mat.0",
        "mat.0 --text none.txt": "none.txt",
    }.items():
        refuses([words], says, report, flags)


# ---------------------------------------------------------------- dial.py


def with_heads(model, layers):
    """The model as fixed MLAs that have only these heads in each layer: other weights are gone."""
    rest = copy.deepcopy(model)
    for block, heads in zip(rest.blocks, layers):
        weights = block.attention.state_dict()
        for name in ("W_UQ.weight", "W_QR.weight", "W_UK.weight", "W_UV.weight"):
            weights[name] = weights[name].unflatten(0, (6, -1))[heads].flatten(0, 1)
        weights["W_O.weight"] = weights["W_O.weight"].unflatten(1, (6, -1))[:, heads].flatten(1)
        block.attention = MLA(replace(model.config, attention="mla", n_h=len(heads)))
        block.attention.load_state_dict(weights)
    return rest


def loss_of(model):
    """On the windows of the held-out text."""
    return common.evaluate(model, TOKENS[1], WINDOWS, (None,))[0]


def test_numbers_vectors_and_left_out_heads_are_models_without_the_other_heads(says, drawn):
    models = [write_run(f"mat.{seed}", seed=seed) for seed in (0, 1)]
    write_run("gqa", "gqa", losses=(5.0,))
    printed = says(dial, f"mat.0 gqa mat.1 --windows {WINDOWS} --out figures")
    found = json.loads(Path("figures/dial.json").read_text())["dial"]
    vectors = {
        "6/2/6/2…": [6, 2, 6],
        "2…/6…": [2, 6, 6],
        "6…/2…": [6, 6, 2],
        "6…/4…/2…": [6, 4, 2],
        "2…/4…/6…": [2, 4, 6],
    }
    settings = {str(m): m for m in range(1, 7)} | vectors
    assert {name: point["heads"] for name, point in found["mat.0"].items()} == settings
    assert list(found["gqa"]) == ["6"]

    for (name, heads), (i, model) in itertools.product(settings.items(), enumerate(models)):
        vector = heads if isinstance(heads, list) else [heads] * 3
        loss = loss_of(with_heads(model, [[*range(m)] for m in vector]))
        point = found[f"mat.{i}"][name]
        assert point["loss"] == pytest.approx(loss, rel=1e-5)
        assert point["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert f"{point['perplexity']:,.3f}" in printed
    assert len({point["perplexity"] for point in found["mat.0"].values()}) == len(settings)

    # What a model loses without a head is what one has lost that never had it.
    rises = json.loads(Path("figures/heads.json").read_text())["heads"]["mat.1"]["rises"]
    for head, rise in enumerate(rises):
        others = [m for m in range(6) if m != head]
        lost = loss_of(with_heads(models[1], [others] * 3)) - loss_of(models[1])
        assert rise == pytest.approx(lost, abs=1e-4) and abs(rise) > 1e-3

    # The figures show these numbers.
    whole, costs, _ = drawn["dial.png"].axes
    points = [found["mat.0"][str(m)] for m in range(1, 7)]
    assert [*whole.lines[0].get_xdata()] == [1, 2, 3, 4, 5, 6]
    assert [*whole.lines[0].get_ydata()] == [point["perplexity"] for point in points]
    assert [*costs.lines[0].get_xdata()] == [point["flops"] for point in points]
    assert [bar.get_height() for bar in drawn["heads.png"].axes[2].patches] == rises


@pytest.mark.parametrize("heads", [6, 3, [6, 2, 5]])
def test_flops_of_a_prompt_are_two_per_weight_and_score_that_is_used(heads):
    c = Config("matmla", **SIZES)
    T = c.context
    flops = 2 * c.d * c.vocab_size  # the logits after the last token only
    for m in heads if isinstance(heads, list) else [heads] * 3:
        weights = c.d * (c.d_cq + c.d_c + c.d_R + 3 * c.d_ff)
        weights += m * (c.d_cq * (c.d_h + c.d_R) + c.d_c * 2 * c.d_h + c.d_h * c.d)
        flops += 2 * T * weights + 2 * T * T * m * (c.d_h + c.d_R + c.d_h)  # the whole square
    assert dial.prompt_flops(c, heads) == flops


def test_nested_gqa_turns_in_steps_and_two_budgets_make_three_vectors():
    c = Config("nested_gqa", budgets=(6, 2), **SIZES | {"n_layer": 4})
    assert dial.settings_of(c, unit=2) == {
        **{"2": 2, "4": 4, "6": 6, "6/2/6/2…": [6, 2, 6, 2]},
        **{"2…/6…": [2, 2, 6, 6], "6…/2…": [6, 6, 2, 2]},
    }
    assert list(dial.settings_of(replace(c, n_layer=1), unit=2)) == ["2", "4", "6"]


def test_runs_on_different_texts_or_one_that_changed_are_not_compared(says, refuses):
    shutil.copytree("text", "news")
    write_run("a", "mla", losses=(5.0,))
    write_run("b", "mla", losses=(5.0,), data="news")
    words = ["text in windows of 13", "news in windows of 13"]
    assert not refuses(words, says, dial, "a b --out figures"), "nothing was measured in vain"
    assert not refuses(["metrics.jsonl/x"], says, dial, "a --out a/metrics.jsonl/x")
    shutil.copy("text/train.bin", "text/val.bin")
    refuses(["text has changed since", "/a was trained"], says, dial, "b a --out figures")
    assert not Path("figures").exists()
