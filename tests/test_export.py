"""Tests of export.py: what goes to transformers says the same there."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

import common
import export
from matmla import GPT, Config
from test_matmla import TIGHT, error, make, randomized, some_tokens
from tokenizer import END

# For bytes; heads that divide d; a base that is nobody's default; the eps of latents there.
SIZES = dict(vocab_size=300, d=48, context=128, rope_base=500.0, norm_eps=1e-6)
PRESETS = {
    "tiny": dict(d=144, d_h=20, d_c=64, d_cq=88, d_R=16),
    "small": dict(d=384, d_h=32, d_c=112, d_cq=192, d_R=16),
    "paper": dict(d=768, d_h=64, d_c=224, d_cq=384, d_R=32),
}
SOME = *range(0x3000), *range(0x3000, 0xD800, 97), *range(0xE000, 0x110000, 97)
TEXT = f"It's  we'LL\t\n\n \r\n  x12 5 ,6 . !?  \n {END} e\u0301 \U0001f469\u200d\U0001f680\0 "
TEXT += "".join(map(chr, SOME))


@pytest.fixture
def run(tmp_path, monkeypatch, says):
    """run(model, flags): what export.py prints in an empty folder, with the model saved there."""
    monkeypatch.chdir(tmp_path)

    def run(model, flags=""):
        content = dict(config=vars(model.config), model=model.state_dict(), encoding="bytes")
        common.save(Path("ours.pt"), settings={}, step=0, optimizers=[], log=[], **content)
        return says(export, f"ours.pt --out new/hf {flags}")

    return run


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize(
    "attention, heads, sizes",
    [
        ("mha", None, {}),
        ("gqa", 6, dict(norm_eps=1e-3)),
        ("nested_mha", 4, dict(tie=False)),
        ("nested_mha", [4, 2], {}),
        ("nested_gqa", 3, dict(d_h=14)),
        ("nested_gqa", [6, 12], dict(n_h=12)),
        ("mla", None, dict(d_cq=0)),
        ("matmla", [2, 5], dict(d_cq=0, tie=False)),
        ("matmla", [6, 1], {}),
        *[("matmla", m, {}) for m in range(1, 7)],
    ],
)
def test_logits_are_ours(attention, heads, sizes, vllm, in_float64):
    model = make(attention, torch.float64, **SIZES | sizes)
    theirs = export.to_transformers(model, heads, vllm=vllm)
    assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=heads)[0]) < TIGHT


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("query_latent", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_wide_folder_is_exact_at_the_sizes_of_presets(preset, query_latent, tie, in_float64):
    sizes = PRESETS[preset] if query_latent else PRESETS[preset] | dict(d_cq=0)
    config = Config(n_layer=2, n_h=12, vocab_size=37, d_ff=36, tie=tie, **sizes)
    model = randomized(GPT(config)).double()
    for heads in 12, 8, 4, [4, 8]:
        theirs = export.to_transformers(model, heads, vllm=True)
        attention = theirs.model.layers[0].self_attn
        widths = attention.kv_lora_rank, attention.qk_rope_head_dim, attention.qk_nope_head_dim
        assert (*widths, attention.v_head_dim) == (512, 64, 128, 128)
        assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=heads)[0]) < TIGHT


@pytest.mark.parametrize("program", ["transformers", "vllm"])
@pytest.mark.parametrize("attention, heads", [("matmla", "4/2"), ("nested_gqa", "3")])
def test_a_folder_generates_what_ours_does(attention, heads, program, run):
    model = make(attention, torch.float32, **SIZES)
    printed = run(model, f"--heads {heads} --for {program}")
    assert f"a {attention} of {heads} heads" in printed
    theirs = transformers.AutoModelForCausalLM.from_pretrained("new/hf")
    prompt = some_tokens(length=20)
    ours = model.generate(prompt, 40, common.heads_of(heads), temperature=0)
    text = theirs.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(text, ours)

    # Where other programs look.
    config = json.loads(Path("new/hf/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert config["eos_token_id"] == 256
    tied, weights = attention == "nested_gqa", load_file("new/hf/model.safetensors")
    assert config["tie_word_embeddings"] == tied and ("lm_head.weight" in weights) != tied


def test_the_tokens_are_ours(run):
    run(make("mha", torch.float32, **SIZES))
    tokenizer = transformers.AutoTokenizer.from_pretrained("new/hf")
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == [*TEXT.encode()] and tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token_id == 256 and tokenizer.decode([256]) == END


@pytest.mark.parametrize(
    "words, attention, flags, sizes",
    [
        ("cannot export pretrained_mla", "pretrained_mla", "", dict(d_R=10)),
        ("5 do not divide 48", "nested_mha", "--heads 5", {}),
        ("5 heads asked", "gqa", "--heads 5", {}),
        ("7 heads asked", "matmla", "--heads 4/7", {}),
        ("heads for 3 layers, but the model has 2", "matmla", "--heads 4/2/2", {}),
        ("--heads 4/x", "matmla", "--heads 4/x", {}),
        ("eps 1e-6 in transformers, here 0.001", "mla", "", dict(norm_eps=1e-3)),
        ("d_c is 514", "mla", "--for vllm", dict(d_c=514)),
        ("d_h 130", "mla", "--for vllm", dict(d_h=130)),
        ("d_R 12", "mla", "--for vllm", dict(d_R=12)),
        ("multiple of d_h = 18", "gqa", "--for vllm", dict(d_h=18)),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    words, attention, flags, sizes, run, refuses
):
    refuses([words], run, make(attention, torch.float32, **SIZES | sizes), flags)
    assert not Path("new").exists()


def test_a_folder_is_not_overwritten_and_a_full_disk_leaves_none(run, refuses, monkeypatch):
    model = make("mha", torch.float32, **SIZES)
    run(model)
    before = Path("new/hf/config.json").stat()
    refuses(["new/hf exists"], run, model)
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device"))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    refuses(["cannot write new/full", "No space left"], run, model, "--out new/full")
    assert Path("new/hf/config.json").stat() == before and len([*Path("new").iterdir()]) == 1
