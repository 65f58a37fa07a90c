"""Tests of report.py: the numbers of its tables, and which figures it draws."""

import json
import math
import shutil

import pytest
import torch

import report
import common    # the first of ours
import train
from tests.test_train import HERE, SMALL, refuses, run, trained  # noqa: F401


@pytest.fixture(scope="module")
def baseline(trained):    # noqa: F811
    run(trained[0], HERE / "train.py", *SMALL, "--attention", "mla", "--n-h", "8", "--out", "baseline")
    return trained[0] / "baseline"


def test_one_run_has_a_row_for_each_budget_and_a_figure(trained, monkeypatch, capsys):    # noqa: F811
    out = trained[0] / "out"
    report.report([out], trained[0] / "unused")
    printed, final = capsys.readouterr().out, report.read_log(out)[-1]["final"]
    for m, loss in final["val_loss"].items():
        assert f"| out | matmla, mixed 1:1:1 | {m} | {final['parameters']:,} | 864 |" in printed
        assert f"| {final['cache_bytes']} | {loss:.4f} | {math.exp(loss):.3f} |" in printed
    assert (out / "loss.png").stat().st_size > 10000 and not (trained[0] / "unused").exists()
    lines = report.curves(out)
    assert list(lines) == ["batches"] + [f"held out, {m} heads" for m in (12, 8, 4)] and list(lines["batches"]) == [0]
    assert all(lines[f"held out, {m} heads"][3] == loss for m, loss in final["val_loss"].items())


def test_runs_named_after_their_seeds_share_a_row_with_their_mean_loss(baseline, tmp_path, monkeypatch, capsys):
    text = "def f(x):\n    return x\n" * 100
    (tmp_path / "other.txt").write_text(text)
    lines = [json.loads(line) for line in (baseline / "metrics.jsonl").read_text().splitlines()]
    final = lines[-1]["final"]
    loss = final["val_loss"]["8"]
    for name, changes in (("mla.0", {}), ("mla.1", {"seed": 1, "val_loss": {"8": loss + 0.2}}),
                          ("mla.2", {"seed": 2, "parameters": 1}), ("mla", {})):    # another model has its own row
        shutil.copytree(baseline, tmp_path / name)
        lines[-1]["final"] = final | changes
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = run(tmp_path, HERE / "report.py", "mla.2", "mla.0", "mla.1", "--text", "other.txt", "--out", "figures")
    row = printed.splitlines()[-1].strip("| ").split(" | ")
    assert printed.count("| mla | mla |") == 2 and row[0] == "mla"
    assert row[-3:-1] == [f"{loss + 0.1:.4f} ± 0.1000", f"{math.exp(loss + 0.1):.3f}"]
    assert all((tmp_path / "figures" / name).stat().st_size > 10000 for name in ("report.png", "curves.png"))
    assert list(json.loads((tmp_path / "figures/report.json").read_text())) == ["mla.2", "mla.0", "mla.1"]
    model, encoding = common.load(baseline / "checkpoint.pt", "cpu")
    tokens, context = torch.tensor(encoding.encode_ordinary(text) + [encoding.eot_token]), model.config.context
    n = (len(tokens) - 1) // context
    with torch.no_grad():
        mean = model(tokens[: n * context].view(n, -1), tokens[1 : n * context + 1].view(n, -1))[1].item()
    assert abs(float(row[-1]) / math.exp(mean) - 1) < 0.02                  # its windows are evenly spaced
    for runs, words in ((["mla.0", "mla"], ["mla", "seed 0"]), (["mla", "mla"], ["two runs", "mla"]), (["no"], ["no"]),
                        (["mla", "--text", "none.txt"], ["none.txt"])):
        monkeypatch.chdir(tmp_path)
        refuses(words, report, monkeypatch, capsys, *runs)
