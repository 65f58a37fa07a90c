"""Tests of sample.py, with weights so large that every number of heads writes another text."""

import io
import sys
from pathlib import Path

import pytest
import torch

import common
import sample
from matmla import GPT, Config
from test_matmla import randomized

SIZES = dict(n_layer=2, d=24, n_h=12, d_h=4, d_c=12, d_cq=8, d_R=6, d_ff=32, context=40)
PROMPT = torch.tensor([list("defé".encode())])
GREEDY = "--device cpu --prompt defé --tokens 50 --temperature 0 "


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The model of out/checkpoint.pt in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    model = randomized(GPT(Config(**SIZES)))
    Path("out").mkdir()
    common.save(
        Path("out/checkpoint.pt"),
        config=vars(model.config),
        settings={},
        encoding="bytes",
        step=1,
        model=model.state_dict(),
        optimizers=[],
        log=[],
    )
    return model


def text_of(model, heads=None, n=50, **keywords):
    tokens = model.generate(PROMPT, n, heads, **keywords)[0].tolist()
    return common.get_encoding("bytes").decode(tokens)


@pytest.mark.parametrize(
    "flag, heads",
    [
        ("", {"heads": 12}),
        ("--heads 4", {"heads": 4}),
        ("--heads 12/3", {"heads": [12, 3]}),
        ("--heads 12:10,4:*", {"schedule": [12] * 10 + [4] * 40}),
        ("--heads 1:7,12/3:9,8:34", {"schedule": [1] * 7 + [[12, 3]] * 9 + [8] * 34}),
    ],
)
def test_it_writes_what_the_model_generates_with_these_heads(flag, heads, model, says):
    written = says(sample, GREEDY + flag)
    assert written == text_of(model, temperature=0, **heads) + "\n"
    if flag:  # else it would not matter which heads are taken
        assert written != text_of(model, temperature=0) + "\n"


def test_it_draws_as_the_flags_say_and_the_same_again_for_a_seed(model, says):
    flags = "--device cpu --prompt defé --tokens 50 --temperature 1.7 --top-k 9 --top-p 0.6 --seed"
    first, again, other = (says(sample, f"{flags} {seed}") for seed in (3, 3, 4))
    draw = torch.Generator().manual_seed(3)
    right = text_of(model, temperature=1.7, top_k=9, top_p=0.6, generator=draw)
    assert first == again == right + "\n" != other


def test_compare_writes_the_text_speed_and_cache_of_every_budget(model, says, monkeypatch):
    clock = iter([0, 10, 12] * 3)  # at the first and second token, and at the end
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    written = says(sample, GREEDY + "--compare")
    for m in (12, 8, 4):
        # 48 tokens in 2 seconds; 2 layers of 12 + 6 numbers of 4 bytes
        line = f"--- {m} heads: 24 tokens/s, 144 bytes of cache per token ---"
        assert f"{text_of(model, m, temperature=0)}\n{line}\n" in written


def test_a_character_of_several_tokens_is_written_whole(model, says, monkeypatch):
    tokens = [*"é日".encode(), 299, 0xE6]  # 299 is in no vocabulary, E6 half a character
    stream = [torch.tensor([token]) for token in tokens]
    monkeypatch.setattr(GPT, "stream", lambda *arguments, **keywords: iter(stream))
    assert says(sample, "--device cpu --prompt a") == "aé日?\ufffd\n"


def test_a_text_need_not_be_short(model, says, monkeypatch):
    monkeypatch.setattr(GPT, "stream", lambda *arguments, **keywords: iter([torch.tensor([98])]))
    assert says(sample, f"--device cpu --prompt a --heads 4 --tokens {10**12}") == "ab\n"


class Foreign(io.TextIOBase):
    """Standard output as in a notebook: not of the kind that Python opens itself."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def test_standard_output_may_be_closed_or_foreign(model, monkeypatch, says):
    foreign = Foreign()
    for stream in (None, foreign):
        monkeypatch.setattr(sys, "stdout", stream)
        says(sample, GREEDY)
    assert foreign.text == text_of(model, temperature=0) + "\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--heads", "99"], ["99", "12"]),
        (["--heads", "12/8/4"], ["3", "2"]),
        (["--heads", "12:5,99:*"], ["99", "12"]),
        (["--heads", "12:5,4:9"], ["14", "400"]),
        (["--heads", "12:99999999999,4:*"], ["99999999999", "400"]),
        (["--heads", "4:*,2:3"], ["2:3", "0"]),
        (["--heads", "12,8"], ["12,8"]),
        (["--heads", "4:-1,8:*"], ["4:-1"]),
        (["--heads", "9" * 5000], []),
        (["--prompt", ""], ["0 tokens"]),
        (["--prompt", "a\udcff"], ["utf-8"]),
        (["--temperature", "-1"], ["-1"]),
        (["--top-p", "0"], ["top_p 0"]),
        (["--device", "abacus"], ["abacus"]),
        (["--checkpoint", "none.pt"], ["none.pt"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(flags, words, model, says, refuses):
    assert refuses(words, says, sample, ["--device", "cpu", *flags]) == ""
