"""Tests of sample.py: it writes the model's own generation, and refuses what cannot be."""

import io
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import common    # the first of ours
import train
from matmla import GPT, Config
from test_matmla import randomized
from tests.test_train import ENV, HERE, main_of, refuses


def write_run(folder, **sizes):
    """A run that never learnt anything: weights so large that the text depends on the budget, and random text."""
    sizes = dict(n_layer=2, d=24, d_h=4, d_c=10, d_cq=14, d_ff=32, context=40) | sizes
    model, tokens = randomized(GPT(Config(**sizes))), np.random.default_rng(0).integers(257, size=999)
    for name in "train.bin", "val.bin":
        tokens.astype(np.uint16).tofile(folder / name)
    train.save(folder / "checkpoint.pt", config=vars(model.config), settings=dict(data=str(folder), tokens=0),
               encoding="bytes", step=0, model=model.state_dict(), optimizers=[], log=[])
    return model, torch.from_numpy(tokens)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder / "checkpoint.pt"


@pytest.fixture
def run(path, monkeypatch, capfdbinary):
    """What sample.py writes."""
    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        main_of(sample, monkeypatch, "--checkpoint", path, "--device", "cpu", *arguments)
        return capfdbinary.readouterr().out.decode()
    return run


def continued(path, text, n, heads):
    model, encoding = common.load(path, "cpu")
    tokens = model.generate(torch.tensor([list(text.encode())]), n, heads, temperature=0)[0]
    return b"".join(encoding.decode_single_token_bytes(token) for token in tokens.tolist()).decode("utf-8", "replace")


def test_it_writes_the_models_own_generation_at_budgets_and_schedules(path, run, tmp_path):
    greedy = "--temperature", "0", "--tokens", "50", "--prompt", "def é"
    texts = {heads: continued(path, "def é", 50, heads) for heads in (12, 8, 4)}
    assert len(set(texts.values())) == 3                            # else it would not matter which one is written
    assert run(*greedy) == texts[12] + "\n" and run(*greedy, "--heads", "4") == texts[4] + "\n"
    switched = continued(path, "def é", 50, [12] * 10 + [4] * 40)
    assert run(*greedy, "--heads", "12:10,4:*") == switched + "\n"
    assert run(*greedy, "--heads", "12:10,4:40", "--samples", "2") == f"{switched}\n---\n{switched}\n"
    compared = run(*greedy, "--compare")
    assert all(f"--- {m} heads ---\n{text}\n--- {m} heads: " in compared for m, text in texts.items())
    assert compared.count("tokens/s, 144 bytes of cache per token") == 3    # 2 x (10 + 8) numbers of 4 bytes
    (tmp_path / "prompt.txt").write_bytes("def é".encode())
    assert run(*greedy[:4], "--prompt-file", tmp_path / "prompt.txt") == texts[12] + "\n"
    assert run(*greedy[:4], "--prompt-file", "-", stdin="def é".encode()) == texts[12] + "\n"


def test_a_seed_repeats_and_another_one_gives_another_text(run):
    first, again, other = (run("--tokens", "30", "--samples", "2", "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other and len(set(first.split("\n---\n"))) == 2


def test_characters_of_several_tokens_are_written_whole(run, monkeypatch):
    monkeypatch.setattr(GPT, "stream", lambda *a: (torch.tensor([token]) for token in "é日".encode() + b"\xe6"))
    assert run("--prompt", "a", "--tokens", "6") == "aé日\ufffd\n"


def test_mistakes_are_one_line_and_status_2(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\xff")))
    for mistake, words in {
        "--heads 13": ["13", "12"],
        "--heads 12:5,99:* --compare": ["--heads", "--compare"],
        "--heads 12:5,99:*": ["99", "12"],                          # before the first token
        "--heads 12:5,4:9": ["14", "400", ":*"],
        "--heads 4:900,2:*": ["900", "400"],
        "--heads all": ["all", "12:64,4:*"],
        "--heads 4:-3,2:*": ["4:-3,2:*"],
        "--heads 4:*,2:3": ["4:*,2:3"],
        "--prompt=": ["0 tokens"],
        "--prompt a\udcff": ["UTF-8", "udcff"],                     # as Python reads a byte that is not UTF-8
        "--prompt-file nothing.txt": ["nothing.txt"],
        "--prompt-file -": ["UTF-8", "0xff"],
        "--top-p 0 --compare": ["top_p 0"],
    }.items():
        refuses(words, sample, monkeypatch, capsys, "--checkpoint", path, "--device", "cpu", *mistake.split())
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", ["sample.py", "bench_cache.py"])
def test_scripts_take_the_students_file_in_the_place_of_matmla(script, path, tmp_path):
    (tmp_path / "mine.py").write_text("raise ValueError('here I am')")
    env = ENV | {"PYTHONPATH": f"{tmp_path}:{HERE}", "MATMLA": "mine"}
    done = subprocess.run([sys.executable, HERE / script], env=env, capture_output=True, text=True)
    assert "here I am" in done.stderr
