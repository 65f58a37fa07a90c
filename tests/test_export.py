"""Tests of export.py: what goes to transformers says the same there."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import common
import export
from data import END
from matmla import GPT, Config
from test_matmla import TIGHT, error, make, randomized, some_tokens

# For bytes; heads that divide d; 100 new tokens; a base that is nobody's default.
SIZES = dict(vocab_size=300, d=48, context=128, rope_base=500.0)
PRESETS = {
    "tiny": dict(d=144, n_h=12, n_kv=2, d_h=20, d_c=64, d_cq=88, d_R=16, d_ff=352),
    "small": dict(d=384, n_h=12, n_kv=2, d_h=32, d_c=112, d_cq=192, d_R=16, d_ff=1024),
    "paper": dict(d=768, n_h=12, n_kv=2, d_h=64, d_c=224, d_cq=384, d_R=32, d_ff=3072),
}
SOME = *range(0x3000), *range(0x3000, 0xD800, 97), *range(0xE000, 0x110000, 97)
TEXT = f"It's  we'LL\t\n\n \r\n  x12 5 ,6 . !?  \n {END} e\u0301 \U0001f469\u200d\U0001f680\0 "
TEXT += "".join(map(chr, SOME))


@pytest.fixture
def in_float64(monkeypatch):
    """transformers computes norms and angles in float32, whatever the weights are. Here not."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in "float", "float32":
        monkeypatch.setattr(torch, name, torch.float64)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def save(model, path="ours.pt"):
    content = dict(config=vars(model.config), model=model.state_dict(), encoding="bytes")
    common.save(Path(path), settings={}, step=0, optimizers=[], log=[], **content)


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize(
    "attention, heads, sizes",
    [
        ("mha", 6, {}),
        ("gqa", 6, dict(norm_eps=1e-3)),
        ("nested_mha", 4, dict(tie=False)),
        ("nested_mha", [4, 2], {}),
        ("nested_gqa", 6, {}),
        ("nested_gqa", 3, dict(n_h=12, d_h=16)),
        ("nested_gqa", [6, 12], dict(n_h=12, d_h=16)),
        ("mla", 6, dict(d_cq=0)),
        ("matmla", [2, 5], dict(d_cq=0, tie=False)),
        ("matmla", [6, 1], {}),
        *[("matmla", m, {}) for m in range(1, 7)],
    ],
)
def test_logits_and_greedy_tokens_are_ours(attention, heads, sizes, vllm, in_float64):
    model = make(attention, torch.float64, **SIZES | sizes)
    theirs = export.to_transformers(model, heads, vllm=vllm)
    assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=heads)[0]) < TIGHT
    text = theirs.generate(some_tokens(length=20), max_new_tokens=50, do_sample=False)
    assert torch.equal(text, model.generate(some_tokens(length=20), 50, heads, temperature=0))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("query_latent", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_at_the_sizes_of_the_presets_the_wide_folder_is_exact_too(preset, query_latent, tie):
    sizes = PRESETS[preset] if query_latent else PRESETS[preset] | dict(d_cq=0)
    config = Config(n_layer=2, vocab_size=37, tie=tie, **sizes)
    model = randomized(GPT(config)).double()
    for heads in 12, 8, 4, [12, 4]:
        theirs = export.to_transformers(model, heads, vllm=True)
        print(error(theirs(some_tokens()).logits, model(some_tokens(), heads=heads)[0]))
        assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=heads)[0]) < 1e-6
