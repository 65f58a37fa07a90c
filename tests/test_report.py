"""Tests of report.py: the numbers of its tables, and which figures it draws."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import common    # the first of ours
import report
from tests.test_train import log_of, main_of, refuses, there  # noqa: F401


def test_a_run_has_a_row_for_each_budget_and_seeds_share_one_with_their_mean(there, monkeypatch, capsys):  # noqa: F811
    main_of(report, monkeypatch, "out", "--out", "unused")
    printed, final = capsys.readouterr().out, log_of(Path("out"))[-1]["final"]
    for m, loss in final["val_loss"].items():
        assert f"| out | matmla, mixed 1:1:1 | {m} | {final['parameters']:,} | 15,360 |" in printed
        assert f"| {final['cache_bytes']} | {loss:.4f} | {math.exp(loss):.3f} |" in printed
    assert Path("out/curves.png").stat().st_size > 10000 and not Path("unused").exists()

    for seed, loss in (0, 5), (1, 5.2):
        *lines, last = log_of(Path("out"))
        lines[-1]["val_loss"] = dict.fromkeys(("12", "8", "4"), loss)
        last["final"] |= {"seed": seed, "val_loss": lines[-1]["val_loss"]}
        shutil.copytree("out", f"run.{seed}")
        Path(f"run.{seed}/metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, last])))
    text = "def f(x):\n    return x\n" * 100
    Path("other.txt").write_text(text)
    drawn = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path, dpi: drawn.extend(figure.axes))
    main_of(report, monkeypatch, *"run.0 run.1 out --text other.txt --out figures".split())
    left, right = ([dict(zip(*line.get_data())) for line in axes.lines] for axes in drawn)
    steps = [0, 10, 20, 30, 40]
    assert [list(line) for line in left] == [list(line) for line in right] == [steps[:4], steps, steps, steps] * 3
    assert (left[1][40], left[6][40], right[6][40]) == (5, 5.2, pytest.approx(0.2)) and not any(right[4].values())
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[3:]]
    assert [(row[0], row[2]) for row in rows] == [(name, m) for name in ("run", "out") for m in ("12", "8", "4")]
    assert rows[0][-3:-1] == ["5.1000 ± 0.1000", f"{math.exp(5.1):.3f}"]
    assert list(json.loads(Path("figures/report.json").read_text())) == ["run.0", "run.1", "out"]
    model, encoding = common.load("out/checkpoint.pt", "cpu")
    tokens = torch.tensor(encoding.encode_ordinary(text) + [encoding.eot_token])
    x = torch.stack([tokens[i : i + 33] for i in np.linspace(0, 2301 - 33, 2300 // 32).astype(int)])
    with torch.no_grad():
        loss = model(x[:, :-1], x[:, 1:], 8)[1].item()
    assert float(rows[1][-1]) == pytest.approx(math.exp(loss), abs=1e-3)
    shutil.copytree("out", "other/out")
    for runs, words in {"run.0 run.0": ["run.0"], "out other/out": ["two runs", "out"], "none": ["none"],
                        "out --text none.txt": ["none.txt"]}.items():
        refuses(words, report, monkeypatch, capsys, *runs.split())
