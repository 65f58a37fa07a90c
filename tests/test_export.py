"""Tests of export.py: what transformers opens says what ours says."""

import dataclasses
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers

import common    # the first of ours
import export
import transmla
from data import END, get_encoding
from test_matmla import error, make, some_tokens
from tests.test_train import main_of, refuses

WIDE = dict(vocab_size=300, d=48, context=128, rope_base=500.0)    # for bytes, heads that divide d, 100 new tokens
CHARACTERS = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
TEXT = f"It's  we'LL\t\n\n \r\n  x12 5 ,6 . !?  \n {END} e\u0301 👩‍🚀\0 " + CHARACTERS[:0x3000] + CHARACTERS[::97]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"    # GPT-2's
PIECES = *(bytes([i]) for i in range(256)), b"we", b" we", b"12", b"\n\n", b"  ", "é".encode(), "\u0301".encode()
WORDS = tiktoken.Encoding("words", pat_str=PATTERN, mergeable_ranks={piece: i for i, piece in enumerate(PIECES)},
                          special_tokens={END: len(PIECES)})


def in_float64(monkeypatch):
    """transformers computes norms and angles in float32, whatever the weights are. From here on both are in float64."""
    def norm(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def angles(self, x, position_ids):
        n, base = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        angle = (position_ids[..., None] * base ** -(torch.arange(0, n, 2).double() / n)).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    for family in "DeepseekV3", "Llama", "Mistral", "Qwen2":
        module = sys.modules[getattr(transformers, f"{family}ForCausalLM").__module__]
        monkeypatch.setattr(getattr(module, f"{family}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"{family}RotaryEmbedding"), "forward", angles)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("attention, m, sizes", [
    ("mha", 6, {}), ("gqa", 6, dict(norm_eps=1e-3)), ("nested_mha", 4, dict(tie=False)), ("mla", 6, dict(d_cq=0)),
    ("matmla", 3, dict(d_cq=0, tie=False, norm_eps=1e-3)), *[("matmla", m, {}) for m in range(1, 7)]])
def test_logits_and_100_greedy_tokens_are_ours(attention, m, sizes, dtype, most, tmp_path, monkeypatch):
    if dtype == torch.float64:
        in_float64(monkeypatch)
    model = make(attention, dtype, **WIDE | sizes)
    export.to_transformers(model, m).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=m)[0]) < most
    text = theirs.generate(some_tokens(length=20), max_new_tokens=100, do_sample=False)
    assert torch.equal(text, model.generate(some_tokens(length=20), 100, m, temperature=0))


@pytest.mark.parametrize("encoding", [get_encoding("bytes"), WORDS], ids=["bytes", "words"])
def test_a_tokenizer_has_our_ids_for_every_kind_of_character_and_gives_the_text_back(encoding, tmp_path):
    export.to_tokenizer(encoding, 10**6).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(TEXT)["input_ids"]
    assert ids == encoding.encode_ordinary(TEXT) and theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == encoding.eot_token and theirs.decode([encoding.eot_token]) == END


def test_an_exported_gqa_comes_back_through_transmla_and_a_mistake_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make("gqa", torch.float32, **WIDE)
    common.save(Path("ours.pt"), config=dataclasses.asdict(model.config), settings={}, encoding="bytes", step=0,
                model=model.state_dict(), optimizers=[], log=[])
    refuses(["5 heads asked"], export, monkeypatch, capsys, "ours.pt", "--heads", 5, "--out", "new/llama")
    assert not Path("new").exists()
    main_of(export, monkeypatch, "ours.pt", "--out", "new/llama")
    refuses(["new/llama exists"], export, monkeypatch, capsys, "ours.pt", "--out", "new/llama")
    main_of(transmla, monkeypatch, "new/llama", "--text", __file__, "--tokens", 100, "--device", "cpu")
    back, encoding = common.load("out/transmla/checkpoint.pt", "cpu")
    assert error(back(some_tokens())[0], model(some_tokens())[0]) < 2e-6
    ids = export.to_tokenizer(encoding, 9)(TEXT)["input_ids"]
    assert ids == encoding.encode_ordinary(TEXT) == get_encoding("bytes").encode_ordinary(TEXT)
    assert transformers.AutoConfig.from_pretrained("new/llama").eos_token_id == encoding.eot_token == 256


@pytest.mark.parametrize("attention, m, words", [
    ("matmla", 7, "7 heads asked, but MatMLA has 1 to 6"), ("mla", 4, "4 heads asked"),
    ("nested_mha", 5, "5 heads do not divide 48"), ("pretrained_mla", 6, "cannot export pretrained_mla")])
def test_what_no_architecture_of_theirs_can_be_is_refused(attention, m, words):
    with pytest.raises(ValueError, match=words):
        export.to_transformers(make(attention, **WIDE, d_R=10), m)
