"""Tests of sample.py and bench_cache.py on a run that never learnt anything."""

import json
from pathlib import Path

import pytest
import torch

import bench_cache
import sample
from common import get_encoding, save
from matmla import GPT, Config
from test_matmla import randomized
from tests.test_train import main_of, refuses


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What a script prints in a folder with a run: weights so large that budgets differ, and random held-out text."""
    def run(script, arguments):
        main_of(script, monkeypatch, "--device", "cpu", *arguments.split())
        return capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    config = Config(n_layer=2, d=24, d_h=4, d_c=10, d_cq=14, d_ff=32, context=40)
    run.model, run.text = randomized(GPT(config)), torch.randint(257, (999,))
    for name in "train.bin", "val.bin":
        run.text.numpy().astype("uint16").tofile(name)
    save(Path("out/checkpoint.pt"), config=vars(config), settings=dict(data=".", tokens=0), encoding="bytes", step=0,
         model=run.model.state_dict(), optimizers=[], log=[])
    return run


def test_sample_writes_the_models_own_generation_and_whole_characters_and_repeats_with_its_seed(run, monkeypatch):
    prompt, greedy = torch.tensor([list("defé".encode())]), "--temperature 0 --tokens 50 --prompt defé "
    new = [run.model.generate(prompt, 50, m, temperature=0)[0].tolist() for m in (12, 8, 4, [12] * 10 + [4] * 40)]
    texts = [get_encoding("bytes").decode(tokens) for tokens in new]
    assert len(set(texts)) == 4                                     # else it would not matter which one is written
    assert run(sample, greedy) == texts[0] + "\n" and run(sample, greedy + "--heads 4") == texts[2] + "\n"
    assert run(sample, greedy + "--heads 12:10,4:*") == texts[3] + "\n"
    compared = run(sample, greedy + "--compare")
    assert all(f"--- {m} heads ---\n{text}\n--- {m} heads: " in compared for m, text in zip((12, 8, 4), texts))
    assert compared.count("tokens/s, 144 bytes of cache per token") == 3    # 2 x (10 + 8) numbers of 4 bytes
    first, again, other = (run(sample, f"--tokens 30 --seed {seed}") for seed in (1, 1, 2))
    assert first == again != other
    stream = [*"é日".encode(), 299, 0xE6]                            # 299 is in no vocabulary, E6 half a character
    monkeypatch.setattr(GPT, "stream", lambda *a: (torch.tensor([token]) for token in stream))
    assert run(sample, "--prompt a --tokens 7") == "aé日?\ufffd\n"


def test_a_token_takes_the_bytes_that_the_papers_say_and_every_variant_is_timed_beside_mha(run, monkeypatch):
    times = iter(range(1, 99))
    monkeypatch.setitem(bench_cache.SHAPES, "cpu", [(2, 40)])
    monkeypatch.setattr(bench_cache, "seconds", lambda call, device: len(call()) and next(times))
    published, paper, tiny = (
        json.loads(run(bench_cache, f"--preset {name}").splitlines()[-1]) for name in ("deepseek-v3", "paper", "tiny"))
    assert [row["measured"] for row in published["sizes"]] == [70272, 327680, 516096]
    assert [row["measured"] for row in paper["sizes"]] == [61440, 61440, 40960, 20480, 20480, 10240, 10240]
    assert [tuple(row.values())[2:] for row in tiny["speeds"]] == [
        ("mha", "", 12, 1, 1), ("gqa", "", 12, 3, 2), ("nested_mha", "full", 4, 5, 3), ("matmla", "naive", 12, 7, None),
        ("matmla", "absorbed", 12, 8, 4.5), ("matmla", "absorbed", 8, 10, 5.5), ("matmla", "absorbed", 4, 12, 6.5)]
    assert Path("out/cache_row.png").stat().st_size > 10000


@torch.no_grad()
def test_the_switching_matrix_is_the_perplexity_of_text_after_a_prefix(run):
    table = json.loads(run(bench_cache, "--switch out").splitlines()[-1])["perplexity"]["out"]
    windows = torch.stack([run.text[int(i * 958 / 127) :][:41] for i in range(128)])
    for m in (12, 8, 4):                                            # both halves at m heads: one plain pass
        loss = run.model.loss(run.model(windows[:, :-1], heads=m)[0][:, 20:], windows[:, 21:])
        assert table[str(m)][str(m)] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert len({value for row in table.values() for value in row.values()}) == 9


@pytest.mark.parametrize("mistake, words", [
    ("--heads 12:5,99:*", ["99", "12"]), ("--heads 12:5,4:9", ["14", "400"]), ("--heads 4:*,2:3", ["neither"]),
    ("--prompt=", ["0 tokens"]), ("--prompt a\udcff", ["utf-8", "udcff"])])
def test_mistakes_are_one_line_and_status_2(mistake, words, run, monkeypatch, capsys):
    refuses(words, sample, monkeypatch, capsys, *mistake.split())
