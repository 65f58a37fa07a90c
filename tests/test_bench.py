"""Tests of bench_cache.py: sizes as published, every variant timed, the switching matrix against plain passes."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench_cache
import train
from tests.test_sample import write_run
from tests.test_train import main_of, refuses


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The JSON in the last line of what bench_cache.py prints."""
    def run(*arguments):
        main_of(bench_cache, monkeypatch, "--device", "cpu", "--out", tmp_path / "out", *arguments)
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return run


def test_a_token_takes_the_bytes_that_the_papers_say(run, tmp_path):
    rows = run("--preset", "paper")["sizes"]
    assert [(row["variant"], row["measured"]) for row in rows] == [
        ("mha", 61440), ("nested_mha", 61440), ("nested_mha", 40960), ("nested_mha", 20480), ("gqa", 20480),
        ("mla", 10240), ("matmla", 10240)]
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in ("cache_row.png", "bench_cache.png"))
    assert [row["measured"] for row in run("--preset", "deepseek-v3")["sizes"]] == [70272, 327680, 516096]


def test_every_variant_is_timed(run, monkeypatch):
    monkeypatch.setitem(bench_cache.SHAPES, "cpu", [(1, 24), (2, 40)])
    rows = run()["speeds"]
    assert [(row["batch"], row["length"]) for row in rows] == 7 * [(1, 24)] + 7 * [(2, 40)]
    assert [(row["variant"], row["reader"], row["heads"]) for row in rows[7:]] == [
        ("mha", "", 12), ("gqa", "", 12), ("nested_mha", "full", 4), ("matmla", "naive", 12),
        ("matmla", "absorbed", 12), ("matmla", "absorbed", 8), ("matmla", "absorbed", 4)]
    assert all(row["step"] > 0 and (row["reader"] == "naive" or row["prefill"] > 0) for row in rows)
    assert rows[7]["to_mha"] == 1 and rows[13]["cache_bytes"] == 48 * 4 * 4 * 2 * 40    # numbers, bytes, layers, tokens


def test_the_kernel_for_a_full_cache_is_attend():
    q, k, v = (torch.randn(2, n, 6, width) for n, width in ((1, 20), (9, 20), (9, 12)))
    torch.testing.assert_close(bench_cache.attend_all(q, k, v, None, 0.3),
                               bench_cache.attend_one(q, k, v, torch.tensor([8]), 0.3))


@torch.no_grad()
def test_the_switching_matrix_is_the_perplexity_of_text_after_a_prefix(run, tmp_path):
    model, tokens = write_run(tmp_path)
    table = run("--switch", tmp_path)["perplexity"][str(tmp_path)]
    windows = tokens[torch.from_numpy(np.linspace(0, 999 - 41, 128).astype(int))[:, None] + torch.arange(41)]
    for m in (12, 8, 4):                                            # both halves at m heads: one plain pass
        loss = F.cross_entropy(model(windows[:, :-1], heads=m)[0][:, 20:].mT, windows[:, 21:])
        assert table[str(m)][str(m)] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert len({value for row in table.values() for value in row.values()}) == 9
    assert (tmp_path / "out/switch.png").stat().st_size > 5000


def test_mistakes_are_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, attention="mla")
    for mistake, words in {f"--switch {tmp_path}": ["mla", "one budget"], f"--out {tmp_path}/train.bin": ["train.bin"],
                           "--switch nothing": ["nothing"], "--preset huge": ["huge"]}.items():
        refuses(words, bench_cache, monkeypatch, capsys, "--out", tmp_path / "out", *mistake.split())
    content = torch.load(tmp_path / "checkpoint.pt")
    train.save(tmp_path / "checkpoint.pt", **content | {"settings": {}})
    refuses(["held-out text"], bench_cache, monkeypatch, capsys, "--out", tmp_path / "out", "--switch", tmp_path)
