"""Tests of export.py: what transformers opens says what ours says."""

import dataclasses
import os
import sys

import pytest
import torch
import transformers
from tiktoken import Encoding
from tiktoken._educational import bpe_train
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.llama import modeling_llama as llama

import common    # the first of ours
import export
import transmla
from data import END, get_encoding
from test_matmla import error, make, some_tokens

torch.set_num_threads(1)
WIDE = dict(vocab_size=300, d=48, context=128, rope_base=500.0)    # for bytes, heads that divide d, 100 new tokens
CHARACTERS = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
TEXT = f"It's  we'LL\t\n\n \r\n  x12 5,6..!?  \n {END} e\u0301 👩‍🚀\0 " + CHARACTERS[:0x3000] + CHARACTERS[::97]


def reopened(model, m, folder):
    export.to_transformers(model, m).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def in_float64(monkeypatch):
    """transformers computes norms and angles in float32, whatever the weights are. Here both are in float64, too."""
    def norm(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def angles(self, x, position_ids):
        n, base = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        angle = (position_ids[..., None] * base ** -(torch.arange(0, n, 2).double() / n)).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    for name, forward in ("RMSNorm", norm), ("RotaryEmbedding", angles):
        monkeypatch.setattr(getattr(deepseek, "DeepseekV3" + name), "forward", forward)
        monkeypatch.setattr(getattr(llama, "Llama" + name), "forward", forward)


CASES = [("mha", 6, {}), ("gqa", 6, dict(norm_eps=1e-3)), ("mla", 6, dict(d_cq=0)), ("nested_mha", 6, {}),
         ("nested_mha", 4, dict(tie=False)), ("matmla", 3, dict(d_cq=0, tie=False)), ("matmla", 2, dict(norm_eps=1e-3)),
         *[("matmla", m, {}) for m in range(1, 7)]]


@pytest.mark.parametrize("attention, m, sizes", CASES)
def test_logits_are_ours_in_float64(attention, m, sizes, tmp_path, in_float64):
    model = make(attention, **WIDE | sizes)
    theirs = reopened(model, m, tmp_path)
    assert type(theirs).__name__ == ("DeepseekV3ForCausalLM" if "mla" in attention else "LlamaForCausalLM")
    assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=m)[0]) < 1e-10


@pytest.mark.parametrize("attention, m", [("gqa", 6), ("nested_mha", 3), ("mla", 6), ("matmla", 4)])
def test_in_float32_logits_differ_by_rounding_and_the_greedy_text_is_the_same(attention, m, tmp_path):
    model = make(attention, torch.float32, **WIDE)
    theirs = reopened(model, m, tmp_path)
    assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=m)[0]) < 2e-6
    text = theirs.generate(some_tokens(length=20), max_new_tokens=100, do_sample=False)
    assert torch.equal(text, model.generate(some_tokens(length=20), 100, m, temperature=0))


@pytest.mark.parametrize("name", ["bytes", "learnt"] + ["gpt2"] * ("TIKTOKEN_CACHE_DIR" in os.environ))
def test_tokenizer_has_our_ids_for_every_kind_of_character_and_gives_the_text_back(name, tmp_path):
    if name == "learnt":    # GPT-2's way of cutting text into words, with 400 tokens of this file
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        ranks = bpe_train(open(__file__, encoding="utf-8").read(), 400, pattern, visualise=None)
        encoding = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 400})
    else:
        encoding = get_encoding(name)
    export.to_tokenizer(encoding, 10**6).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(TEXT)["input_ids"]
    assert ids == encoding.encode_ordinary(TEXT) and theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == encoding.eot_token and theirs.decode([encoding.eot_token]) == END


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script in a folder that has this model's checkpoint; return (exit status, what it said)."""
    def run(module, model, *arguments):
        common.save(tmp_path / "checkpoint.pt", config=dataclasses.asdict(model.config), settings={}, encoding="bytes",
                    step=0, model=model.state_dict(), optimizers=[], log=[])
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        try:
            return module.main() or 0, "".join(capsys.readouterr())
        except SystemExit as stop:
            return stop.code, "".join(capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    return run


def test_an_exported_gqa_goes_through_transmla_and_comes_back_with_its_logits_and_tokens(run, tmp_path):
    model = make("gqa", torch.float32, **WIDE)
    assert run(export, model, "checkpoint.pt", "--out", "new/llama")[0] == 0
    assert run(transmla, model, "new/llama", "--text", __file__, "--tokens", 100, "--device", "cpu")[0] == 0
    back, encoding = common.load(tmp_path / "out/transmla/checkpoint.pt", "cpu")
    assert error(back(some_tokens())[0], model(some_tokens())[0]) < 2e-6
    ids = export.to_tokenizer(encoding, 9)(TEXT)["input_ids"]
    assert ids == encoding.encode_ordinary(TEXT) == get_encoding("bytes").encode_ordinary(TEXT)
    assert transformers.AutoConfig.from_pretrained("new/llama").eos_token_id == encoding.eot_token == 256


@pytest.mark.parametrize("attention, arguments, words", [
    ("matmla", ["--heads", 7], "7 heads asked, but MatMLA has 1 to 6"), ("matmla", ["--heads", 0], "0 is below 1"),
    ("mla", ["--heads", 4], "4 heads asked"), ("nested_mha", ["--heads", 5], "5 heads do not divide 48"),
    ("pretrained_mla", [], "pretrained_mla"), ("mla", ["--out", "full"], "full exists")])
def test_a_mistake_is_one_line_and_writes_nothing(attention, arguments, words, run, tmp_path):
    (tmp_path / "full/of").mkdir(parents=True)
    code, said = run(export, make(attention, **WIDE, d_R=10), "checkpoint.pt", *arguments)
    assert code == 2 and said.count("\n") == 1 and words in said
    assert {path.name for path in tmp_path.rglob("*")} == {"checkpoint.pt", "metrics.jsonl", "full", "of"}
