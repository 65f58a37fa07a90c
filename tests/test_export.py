"""Tests of export.py: what transformers opens says what ours says."""

import dataclasses
import os
import sys

import pytest
import torch
import transformers
from tiktoken import Encoding
from tiktoken._educational import bpe_train
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama import modeling_llama

import common    # the first of ours
import export
import transmla
from data import END, get_encoding
from matmla import GPT, Config

torch.set_num_threads(1)
SIZES = dict(vocab_size=300, context=128, n_layer=2, d=48, n_h=6, n_kv=3, d_h=10, d_c=14, d_cq=22, d_R=4, d_ff=36,
             budgets=(6,), rope_base=500.0)
CHARACTERS = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
TEXT = f"It's  we'LL\t\n\n \r\n  x12 5,6..!?  \n {END} e\u0301 👩‍🚀\0 " + "".join(CHARACTERS[:0x3000] + CHARACTERS[::97])


def random_model(attention, **sizes):
    """Weights so large that attention is far from uniform; norms that are not all ones."""
    torch.manual_seed(0)
    model = GPT(Config(**SIZES | {"attention": attention} | sizes)).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.dim() == 2 else 1)
    return model


def reopened(model, m, folder):
    export.to_transformers(model, m).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def tokens(batch=2, length=50):
    return torch.randint(300, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def widened(monkeypatch):
    """transformers computes norms and angles in float32, whatever the weights are. Here both are in float64."""
    def norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def angles(self, x, position_ids):
        n, base = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        angle = position_ids[..., None] * base ** -(torch.arange(0, n, 2).double() / n)
        return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()

    for library, name in (modeling_deepseek_v3, "DeepseekV3"), (modeling_llama, "Llama"):
        monkeypatch.setattr(getattr(library, name + "RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(library, name + "RotaryEmbedding"), "forward", angles)


CASES = [("mha", 6, {}), ("gqa", 6, dict(norm_eps=1e-3)), ("mla", 6, dict(d_cq=0)), ("nested_mha", 6, {}),
         ("nested_mha", 4, dict(tie=False)), ("matmla", 3, dict(d_cq=0, tie=False)), ("matmla", 2, dict(norm_eps=1e-3)),
         *[("matmla", m, {}) for m in range(1, 7)]]


@pytest.mark.parametrize("attention, m, sizes", CASES)
def test_logits_are_ours_in_float64(attention, m, sizes, tmp_path, widened):
    model = random_model(attention, **sizes).double()
    theirs, ours = reopened(model, m, tmp_path), model(tokens(), heads=m)[0]
    assert type(theirs).__name__ == ("DeepseekV3ForCausalLM" if "mla" in attention else "LlamaForCausalLM")
    assert (theirs(tokens()).logits - ours).abs().max() < 1e-10 * ours.abs().max()


@pytest.mark.parametrize("attention, m", [("gqa", 6), ("nested_mha", 3), ("mla", 6), ("matmla", 4)])
def test_in_float32_logits_differ_by_rounding_and_the_greedy_text_is_the_same(attention, m, tmp_path):
    model = random_model(attention)
    theirs, ours = reopened(model, m, tmp_path), model(tokens(), heads=m)[0]
    assert (theirs(tokens()).logits - ours).abs().max() < 1e-5 * ours.abs().max()
    text = theirs.generate(tokens(length=20), max_new_tokens=100, do_sample=False, pad_token_id=0)
    assert torch.equal(text, model.generate(tokens(length=20), 100, m, temperature=0))


@pytest.mark.parametrize("name", ["bytes", "learnt", "gpt2"])
def test_tokenizer_has_our_ids_for_every_kind_of_character_and_gives_the_text_back(name, tmp_path):
    if name == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("GPT-2's vocabulary may not be here")
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
    """Run export.py on a model in an empty folder; return (exit status, what it said)."""
    def run(model, *arguments):
        common.save(tmp_path / "checkpoint.pt", config=dataclasses.asdict(model.config), settings={}, encoding="bytes",
                   step=0, model=model.state_dict(), optimizers=[], log=[])
        monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "checkpoint.pt"), *map(str, arguments)])
        try:
            return export.main() or 0, "".join(capsys.readouterr())
        except SystemExit as stop:
            return stop.code, "".join(capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    return run


def test_an_exported_gqa_goes_through_transmla_and_comes_back_with_its_text_and_tokens(run, tmp_path):
    model = random_model("gqa")
    assert run(model, "--out", "new/llama")[0] == 0
    theirs, tokenizer = transmla.read_pretrained(str(tmp_path / "new/llama"))
    gqa, weights = transmla.to_gqa(theirs)
    mla = dataclasses.replace(gqa, attention="pretrained_mla")
    new = transmla.build(mla, transmla.to_mla(weights, gqa, mla), torch.float64)
    ours = model.double()(tokens())[0]
    assert (new(tokens())[0] - ours).abs().max() < 1e-10 * ours.abs().max()
    assert get_encoding(tokenizer).encode_ordinary(TEXT) == get_encoding("bytes").encode_ordinary(TEXT)


@pytest.mark.parametrize("attention, arguments, words", [
    ("matmla", ["--heads", 7], "7 heads asked, but MatMLA has 1 to 6"), ("matmla", ["--heads", 0], "0 is below 1"),
    ("mla", ["--heads", 4], "4 heads asked"), ("nested_mha", ["--heads", 5], "5 heads do not divide 48"),
    ("pretrained_mla", [], "pretrained_mla"), ("mla", ["--out", "full"], "full exists")])
def test_a_mistake_is_one_line_and_writes_nothing(attention, arguments, words, run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/of").write_text("life")
    code, said = run(random_model(attention, d_R=10), *arguments)
    assert code == 2 and said.count("\n") == 1 and words in said
    assert {path.name for path in tmp_path.rglob("*")} == {"checkpoint.pt", "metrics.jsonl", "full", "of"}
