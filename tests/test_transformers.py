"""Tests of transmla.py and export.py: what comes from transformers, and what goes there, says the same in both."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import transformers

import common  # the first of ours
import export
import train
import transmla
from data import END, prepare, read_tokens
from matmla import ATTENTION, Config
from test_matmla import TIGHT, chunked, error, make, randomized, some_tokens
from tests.test_scripts import log_of, main_of, refuses

TOKENS = torch.randint(266, (2, 40), generator=torch.Generator().manual_seed(1))
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{b:02X}>" for b in range(256)),
    " a",
    "ab",
    "abb",
    " ",
    "a",
    "b",
    "▁",
]
SIZES = dict(
    vocab_size=266,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
FLAGS = "model --text model/text.txt --device cpu".split()
LOUD = 4, 1  # of the two layers of `original` these heads are the most important
WIDE = dict(
    vocab_size=300, d=48, context=128, rope_base=500.0
)  # for bytes, heads that divide d, 100 new tokens
SOME = *range(0x3000), *range(0x3000, 0xD800, 97), *range(0xE000, 0x110000, 97)
TEXT = f"It's  we'LL\t\n\n \r\n  x12 5 ,6 . !?  \n {END} e\u0301 \U0001f469\u200d\U0001f680\0 {''.join(map(chr, SOME))}"


def in_float64(monkeypatch):
    """transformers computes norms and angles in float32, whatever the weights are. From here on that is float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in "float", "float32":
        monkeypatch.setattr(torch, name, torch.float64)


def hf_model(family, **sizes):
    config = getattr(transformers, f"{family}Config")(**SIZES | sizes)
    return randomized(getattr(transformers, f"{family}ForCausalLM")(config)).eval()


def converted(model, order=None, **sizes):
    """(GQA, MLA) in float64 for a model of transformers, calibrated unless it is just the same."""
    c, old = transmla.to_gqa(model)
    gqa, mla = (
        transmla.build(c, old, torch.float64),
        replace(c, attention="pretrained_mla", **sizes),
    )
    moments = transmla.second_moments(gqa, TOKENS) if order or sizes else None
    return gqa, transmla.build(mla, transmla.to_mla(old, c, mla, order, moments), torch.float64)


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A Llama, saved in the folder model with its tokens and a text."""
    monkeypatch.chdir(tmp_path)
    model = hf_model("Llama")
    for layer, head in zip(model.model.layers, LOUD):
        layer.self_attn.o_proj.weight.data[:, 4 * head : 4 * head + 4] *= 10
    model.save_pretrained("model")
    Path("model/pieces.json").write_text(json.dumps(PIECES))
    Path("model/text.txt").write_text("the cat saw the dog, the dog saw the cat. " * 100)
    return model


@pytest.mark.parametrize("order", [None, [[4, 0, 5, 2, 1, 3], [1, 3, 0, 5, 2, 4]]])
@pytest.mark.parametrize(
    "family, sizes",
    [
        (
            "Llama",
            dict(
                num_key_value_heads=2,
                head_dim=10,
                rope_parameters=dict(rope_type="default", rope_theta=50.0),
            ),
        ),
        (
            "Mistral",
            dict(num_key_value_heads=1, sliding_window=64, rms_norm_eps=1e-2),
        ),  # a window like the context
        ("Qwen2", dict(num_key_value_heads=6, tie_word_embeddings=True)),
    ],
)  # with biases
def test_naive_absorbed_rotated_and_with_heads_in_any_order_it_is_theirs(
    family, sizes, order, monkeypatch
):
    in_float64(monkeypatch)
    theirs = hf_model(family, **sizes).double()
    gqa, mla = converted(theirs, order)
    right = theirs(TOKENS).logits
    assert transmla.obstacles(theirs.config) == [] and error(gqa(TOKENS)[0], right) < TIGHT
    for short in 0, torch.inf:  # naive, absorbed
        for block in mla.blocks:
            block.attention.absorb_below = short
        logits, cache = chunked(mla, TOKENS, [17, 1, 22], [6] * 3)
        assert cache.nbytes == gqa.new_cache(2, 40).nbytes and error(logits, right) < TIGHT


@pytest.mark.parametrize(
    "base, turning, d_c", [(1e4, 4, 5), (1e60, 1, 5 + 2 * 3 * 2)]
)  # 1e60 turns 1 pair of 4
def test_a_cut_takes_nothing_where_keys_are_copies_or_do_not_turn_and_values_have_rank_5(
    base, turning, d_c
):
    theirs = hf_model(
        "Qwen2", head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=base)
    )
    for a in (layer.self_attn for layer in theirs.model.layers):
        for p in a.k_proj.parameters():
            k = p.data.unflatten(0, (3, 2, 4))[:, :, :turning]
            k[1], k[2] = -k[0], 2 * k[0]
        basis = torch.randn(24, 5)
        a.v_proj.weight.data, a.v_proj.bias.data = (
            basis @ torch.randn(5, 24),
            basis @ torch.randn(5),
        )
    for rank, least, most in (d_c, 0, 1e-6), (d_c - 1, 1e-3, 1):  # 1e-6: of float32 weights
        gqa, mla = converted(theirs, d_R=8, d_c=rank)
        assert least <= error(mla(TOKENS)[0], gqa(TOKENS)[0]) < most


@pytest.mark.parametrize(
    "words, changes",
    [  # of config.json; or whole files
        (
            "RoPE scaling (linear)",
            {"rope_parameters": dict(rope_type="linear", factor=2.0, rope_theta=1e4)},
        ),
        ("a sliding window of 16", {"model_type": "mistral", "sliding_window": 16}),
        ("QK-norm", {"model_type": "qwen3"}),
        ("the activation gelu", {"hidden_act": "gelu"}),
        ("the architecture gemma", {"model_type": "gemma"}),
        ("mixture of experts", {"model_type": "mixtral"}),
        ("without model.layers.2.", {"num_hidden_layers": 3}),
        ("weight model.layers.1.", {"num_hidden_layers": 1}),
        ("no end of text", {"eos_token_id": None}),
        ("the weight model.layers.0.self_attn.o_proj.bias", {"attention_bias": True}),
        ("token 300 is not in the embedding of 266", {"eos_token_id": 300}),
        ("has 8 tokens", {"text.txt": "a text"}),
        (
            "token 266 is not in the embedding of 266",
            {"pieces.json": json.dumps([*PIECES, "more"])},
        ),
        ("the tokenizer of", {"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}),
        ("or no vocabulary", {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}),
        ("has no fast form", {"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'}),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(words, changes, original, monkeypatch, capsys):
    for file in (name for name in changes if "." in name):
        Path("model", file).write_text(changes[file])
    Path("model/config.json").write_text(json.dumps(original.config.to_dict() | changes))
    refuses([words], transmla, monkeypatch, capsys, *FLAGS)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "family, scaling", [("llama", "linear"), ("qwen2", "yarn"), ("llama", "none")]
)
def test_what_a_gguf_says_and_transformers_drops_is_refused(
    family, scaling, tmp_path, monkeypatch, capsys
):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", family)
    for key, value in {
        "block_count": 2,
        "embedding_length": 24,
        "attention.head_count": 6,
        "attention.key_length": 4,
        "attention.value_length": 8,
        "rope.scaling.type": scaling,
    }.items():
        writer.add_key_value(f"{family}.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("rope_freqs.weight", torch.ones(2).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    scaled = f"RoPE scaling ({scaling}), " * (scaling != "none")
    refuses(
        [f"supported: attention.value_length = 8, {scaled}the weight rope_freqs.weight"],
        transmla,
        monkeypatch,
        capsys,
        tmp_path / "a.gguf",
    )


def test_a_checkpoint_generates_like_the_original_and_trains_on_at_every_budget(
    original, monkeypatch, capsys
):
    path = "out/transmla/checkpoint.pt"
    main_of(transmla, monkeypatch, *FLAGS, "--budgets", "6,4,2")
    assert "| our matmla, d_c 12, d_R 12 | 2 | 96 |" in capsys.readouterr().out
    ours, encoding = common.load(path, "cpu")
    for block, layer, head in zip(ours.blocks, original.model.layers, LOUD):
        W_O = layer.self_attn.o_proj.weight[:, 4 * head : 4 * head + 4]
        assert torch.equal(block.attention.W_O.weight[:, :4], W_O), (
            "the most important head is not the first"
        )
    prompt = torch.tensor([encoding.encode_ordinary("ababb")])
    assert prompt.tolist() == [[1, *map(PIECES.index, (" a", "b", "abb"))]], (
        "pieces are not merged in their order"
    )
    theirs = original.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, 40, temperature=0), theirs)

    flags = "--data model/text.txt --device cpu --context 32 --steps 25 --batch 6 --lr 0.02 --lr-adamw 0.01".split()
    main_of(train, monkeypatch, "--init", path, "--out", "on", *flags)
    losses = [line["val_loss"] for line in log_of(Path("on")) if "val_loss" in line]
    ours.config = replace(ours.config, context=32)
    _, held_out = read_tokens(
        prepare("model/text.txt", common.load_checkpoint(path)["encoding"], 0, 266), 32, 266
    )
    for m, loss in common.evaluate(ours, held_out, 256).items():
        assert (
            losses[0][str(m)] == pytest.approx(loss, abs=1e-4) and losses[-1][str(m)] < loss - 0.5
        )
    blocks = common.load("on/checkpoint.pt", "cpu")[0].blocks
    assert all(block.attention.W_UK.weight.abs().min() > 0 for block in blocks), (
        "training found no way in"
    )


def test_flags_and_a_conversion_that_is_not_exact(original, monkeypatch, capsys):
    for words, flags in (
        ("multiple of 4", "--d-R 6"),
        ("1..6", "--budgets 7,3"),
        ("21 in 1..20", "--d-R 4 --d-c 9,21"),
    ):
        refuses([words], transmla, monkeypatch, capsys, *FLAGS, *flags.split())
    main_of(transmla, monkeypatch, *FLAGS, "--d-R", 4, "--d-c", "16,8")
    assert "| our mla, d_c 8, d_R 4 | 6 | 48 |" in capsys.readouterr().out
    Path("model/pieces.json").unlink()
    refuses(["no tokenizer"], transmla, monkeypatch, capsys, *FLAGS, "--budgets", "6,3")
    right = transmla.layer_to_mla
    monkeypatch.setattr(
        transmla, "layer_to_mla", lambda *given: right(*given) | {"W_KR": torch.ones(12, 32)}
    )
    refuses(["our MLA, naive is another model"], transmla, monkeypatch, capsys, *FLAGS)


def test_mla_can_do_what_no_gqa_of_the_same_cache_can():
    """A token alone is mapped linearly: by GQA through its values, half a row of 32; by MLA through c_KV, 28 of 32."""
    for name, rank in ("gqa", 16), ("mla", 28):
        attention = ATTENTION[name](
            Config(attention=name, d=40, n_h=6, n_kv=2, d_h=8, d_c=28, d_cq=0, d_R=4)
        )
        attention.norm_KV = torch.nn.Identity()
        reads = attention(torch.eye(40)[:, None])[:, 0]
        assert attention.row_width(6) == 32 and torch.linalg.matrix_rank(reads, rtol=1e-5) == rank


@pytest.mark.parametrize(
    "attention, m, sizes",
    [
        ("mha", 6, {}),
        ("gqa", 6, dict(norm_eps=1e-3)),
        ("nested_mha", 4, dict(tie=False)),
        ("mla", 6, dict(d_cq=0)),
        ("matmla", 3, dict(d_cq=0, tie=False, norm_eps=1e-3)),
        *[("matmla", m, {}) for m in range(1, 7)],
    ],
)
def test_logits_and_100_greedy_tokens_are_ours(attention, m, sizes, tmp_path, monkeypatch):
    for dtype, most in (torch.float32, 2e-6), (torch.float64, 1e-10):
        model = make(attention, dtype, **WIDE | sizes)
        export.to_transformers(model, m).save_pretrained(tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert error(theirs(some_tokens()).logits, model(some_tokens(), heads=m)[0]) < most
        text = theirs.generate(some_tokens(length=20), max_new_tokens=100, do_sample=False)
        assert torch.equal(text, model.generate(some_tokens(length=20), 100, m, temperature=0))
        in_float64(monkeypatch)  # for the second round


def test_a_gqa_and_its_tokens_come_back_through_transmla_and_a_mistake_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = "ours.pt --out new/llama".split()
    for attention, heads, words in (
        ("pretrained_mla", 6, "cannot export pretrained_mla"),
        ("nested_mha", 5, "5 heads do not divide 48"),
        ("gqa", 5, "5 heads asked"),
    ):
        model = make(attention, torch.float32, **WIDE, d_R=10)
        common.save(
            Path("ours.pt"),
            config=vars(model.config),
            settings={},
            encoding="bytes",
            step=0,
            optimizers=[],
            log=[],
            model=model.state_dict(),
        )
        refuses([words], export, monkeypatch, capsys, *flags, "--heads", heads)
        assert not Path("new").exists()
    main_of(export, monkeypatch, *flags)
    refuses(["new/llama exists"], export, monkeypatch, capsys, *flags)
    main_of(
        transmla, monkeypatch, "new/llama", "--text", __file__, "--tokens", 100, "--device", "cpu"
    )
    back, encoding = common.load("out/transmla/checkpoint.pt", "cpu")
    assert error(back(some_tokens())[0], model(some_tokens())[0]) < 2e-6
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained("new/llama"),
        export.to_tokenizer(encoding, 9),
    ):
        ids = tokenizer(TEXT)["input_ids"]
        assert (
            ids == encoding.encode_ordinary(TEXT) == [*TEXT.encode()]
            and tokenizer.decode(ids) == TEXT
        )
        assert (
            tokenizer.eos_token_id == encoding.eot_token == 256 and tokenizer.decode([256]) == END
        )
    assert transformers.AutoConfig.from_pretrained("new/llama").eos_token_id == 256
