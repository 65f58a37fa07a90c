"""Tests of report.py: the numbers of its tables, and which figures it draws."""

import json
import math
import shutil

import pytest
import torch

import common    # the first of ours
import report
from tests.test_train import log_of, main_of, refuses, there, trained  # noqa: F401


def test_one_run_has_a_row_for_each_budget_and_a_figure(there, monkeypatch, capsys):    # noqa: F811
    main_of(report, monkeypatch, "out", "--out", "unused")
    printed, final = capsys.readouterr().out, log_of(there / "out")[-1]["final"]
    for m, loss in final["val_loss"].items():
        assert f"| out | matmla, mixed 1:1:1 | {m} | {final['parameters']:,} | 864 |" in printed
        assert f"| {final['cache_bytes']} | {loss:.4f} | {math.exp(loss):.3f} |" in printed
    lines = report.curves(there / "out")
    assert list(lines) == ["batches"] + [f"held out, {m} heads" for m in (12, 8, 4)] and list(lines["batches"]) == [0]
    assert all(lines[f"held out, {m} heads"][3] == loss for m, loss in final["val_loss"].items())
    assert (there / "out/curves.png").stat().st_size > 10000 and not (there / "unused").exists()


def test_runs_named_after_their_seeds_share_a_row_with_their_mean_loss(there, monkeypatch, capsys):    # noqa: F811
    for seed, more in (0, 0), (1, 0.2):
        lines = log_of(there / "out")
        lines[-1]["final"] |= {"seed": seed, "val_loss": {m: 5 + more for m in ("12", "8", "4")}}
        shutil.copytree("out", f"run.{seed}", dirs_exist_ok=True)
        (there / f"run.{seed}/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "def f(x):\n    return x\n" * 100
    (there / "other.txt").write_text(text)
    main_of(report, monkeypatch, "run.0", "run.1", "out", *"--text other.txt --out figures --device cpu".split())
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[3:]]
    assert [(row[0], row[2]) for row in rows] == [(name, m) for name in ("run", "out") for m in ("12", "8", "4")]
    assert rows[0][-3:-1] == ["5.1000 ± 0.1000", f"{math.exp(5.1):.3f}"]
    assert all((there / "figures" / name).stat().st_size > 10000 for name in ("report.png", "curves.png"))
    assert list(json.loads((there / "figures/report.json").read_text())) == ["run.0", "run.1", "out"]
    model, encoding = common.load("out/checkpoint.pt", "cpu")
    tokens, n = torch.tensor(encoding.encode_ordinary(text) + [encoding.eot_token]), 2300 // 32
    with torch.no_grad():
        loss = model(tokens[: n * 32].view(n, -1), tokens[1 : n * 32 + 1].view(n, -1), 8)[1].item()
    assert float(rows[1][-1]) == pytest.approx(math.exp(loss), rel=0.02)    # its windows are evenly spaced
    (there / "other").mkdir()
    shutil.copytree("out", "other/out")
    for runs, words in (["run.0 run.0", ["run.0"]], ["out other/out", ["two runs", "out"]], ["none", ["none"]],
                        ["out --text none.txt", ["none.txt"]]):
        refuses(words, report, monkeypatch, capsys, *runs.split())
