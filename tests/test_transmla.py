"""Tests of transmla.py: what it converts is transformers' model, and what it cannot convert is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
import common    # the first of ours
import matmla
import pretrained
import sample
import train
import transmla
from data import prepare, read_tokens, token_bytes
from tests.test_train import log_of, main_of, refuses

torch.set_num_threads(1)
TIGHT, LOOSE = 1e-10, 1e-5    # float64: rounding only; float32
TOKENS = torch.randint(266, (2, 40), generator=torch.Generator().manual_seed(1))
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), " a", "ab", "abb", " ", "a", "b", "▁"]
ELSE = {"pieces.json": None}    # then another tokenizer is looked for
LFS = "version https://git-lfs.github.com/spec/v1"    # of a file that was not fetched
SIZES = dict(vocab_size=266, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=3, head_dim=4, max_position_embeddings=64, tie_word_embeddings=True)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def hf_model(family, **sizes):
    """With weights and biases so large that attention is far from uniform, and norms that are not all ones."""
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES | sizes))
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 2 else 1)
    return model.eval()


def converted(model, order=None, calibrate=False, **changes):
    """(GQA, MLA) in float64 for a model of transformers."""
    c, old = transmla.to_gqa(model)
    gqa, mla = transmla.build(c, old, torch.float64), replace(c, **{"attention": "pretrained_mla"} | changes)
    moments = transmla.second_moments(gqa, TOKENS) if calibrate else None
    return gqa, transmla.build(mla, transmla.to_mla(old, c, mla, order, moments), torch.float64)


@pytest.mark.parametrize("family, sizes", [
    ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=False, head_dim=10, rms_norm_eps=1e-2)),
    ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5))),
    ("Mistral", dict(num_key_value_heads=1, head_dim=8, sliding_window=64)),    # as long as the context
    ("Qwen2", dict(num_key_value_heads=6, head_dim=8)),    # with biases
])
def test_conversion_is_the_pretrained_model_naive_absorbed_cached_and_with_keys_rotated(family, sizes):
    theirs = hf_model(family, **sizes)
    assert not transmla.obstacles(theirs.config, None)
    gqa, mla = converted(theirs)
    exact = gqa(TOKENS)[0]
    assert mla.new_cache(3, 17).nbytes == gqa.new_cache(3, 17).nbytes and error(mla(TOKENS)[0], exact) < TIGHT
    for model in mla, converted(theirs, calibrate=True)[1]:
        for short in 0, torch.inf:    # naive, absorbed
            for block in model.blocks:
                block.attention.short = short
            cache = model.new_cache(2, 40)
            parts = [model(part, cache=cache)[0] for part in TOKENS.split([17, 1, 22], 1)]
            assert error(torch.cat(parts, 1), exact) < TIGHT
    assert error(gqa.float()(TOKENS)[0], theirs(TOKENS).logits) < LOOSE


def test_a_cut_takes_nothing_from_keys_that_are_copies_and_values_of_low_rank():
    """RoRoPE puts keys that are multiples of one another into one slot. Values of rank 5: PCA finds it."""
    theirs, basis = hf_model("Qwen2", head_dim=8), torch.randn(24, 5)
    for a in (layer.self_attn for layer in theirs.model.layers):
        for p in a.k_proj.parameters():
            p.data = torch.cat((p.data[:8], -p.data[:8], 2 * p.data[:8]))
        a.v_proj.weight.data, a.v_proj.bias.data = basis @ torch.randn(5, 24), basis @ torch.randn(5)
    for d_c, least, most in (5, 0, 1e-6), (4, 1e-3, 1):    # 1e-6: of float32 weights
        gqa, mla = converted(theirs, calibrate=True, d_R=8, d_c=d_c)
        assert least <= error(mla(TOKENS)[0], gqa(TOKENS)[0]) < most
    x = torch.cat([pretrained.with_one(gqa.blocks[0].norm_attention(gqa.embed(w[:-1]))) for w in TOKENS])
    assert error(transmla.second_moments(gqa, TOKENS)[0], x.T @ x / len(x)) < TIGHT


def test_keys_beyond_k_R_go_through_the_latent_without_rope():
    theirs = hf_model("Qwen2", head_dim=8, rope_parameters=dict(rope_theta=1e60, rope_type="default"))
    for layer in theirs.model.layers:
        for p in layer.self_attn.k_proj.parameters():
            p.data.unflatten(0, (3, 2, 4))[:, :, 0] = 0    # frequency 1, at any base: now RoPE turns nothing here
    for d_R in 16, 8:
        gqa, mla = converted(theirs, calibrate=True, d_R=d_R, d_c=48 - d_R)
        assert error(mla(TOKENS)[0], gqa(TOKENS)[0]) < 1e-8


def test_any_order_of_heads_is_the_same_model_and_importance_is_that_of_a_gate_on_each(monkeypatch):
    order, attend = [[4, 0, 5, 2, 1, 3], [1, 3, 0, 5, 2, 4]], matmla.attend
    gqa, nested = converted(hf_model("Qwen2"), order, attention="pretrained_matmla", budgets=(6, 2))
    assert error(nested(TOKENS)[0], gqa(TOKENS)[0]) < TIGHT
    two, importance = nested(TOKENS, heads=2)[0], transmla.importance(gqa, TOKENS)

    def gated(gates, *given):
        of_layer = iter(gates)
        monkeypatch.setattr(matmla, "attend", lambda *read: attend(*read) * next(of_layer))
        return gqa(*given)

    first = torch.tensor([[[h in heads[:2]] for h in range(6)] for heads in order]).double()
    assert error(two, gated(first, TOKENS)[0]) < TIGHT, "a budget of 2 is not the first two heads"
    fisher = torch.zeros(2, 6)
    for w in TOKENS:
        gates = torch.ones(2, 39, 6, 1, dtype=torch.float64, requires_grad=True)
        gated(gates, w[None, :-1], w[None, 1:])[1].backward()
        fisher += gates.grad.square().sum((1, 3))
    assert error(importance, fisher) < LOOSE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    hf_model("Llama", bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    (folder / "pieces.json").write_text(json.dumps(PIECES))
    (folder / "text.txt").write_text("the cat saw the dog, the dog saw the cat. " * 100, "utf-8")
    return folder


@pytest.mark.parametrize("words, broken", [    # what is replaced in config.json, and by what; or whole files, or flags
    ("cannot use", {"config.json": "{"}), ("RoPE scaling (linear)", ('"default"', '"linear", "factor": 2.0')),
    ("the activation gelu", ("silu", "gelu")),
    ("the weight model.layers.0.self_attn.o_proj.bias", ('n_bias": false', 'n_bias": true')),
    ("a sliding window of 16", ('"llama"', '"mistral", "sliding_window": 16')),
    ("QK-norm", ('"llama"', '"qwen3"')), ("mixture of experts", ('"llama"', '"mixtral"')),
    ("the architecture gemma", ('"llama"', '"gemma"')),
    ("without model.layers.2.", ('rs": 2', 'rs": 3')), ("weight model.layers.1.", ('rs": 2', 'rs": 1')),
    ("no end of text", ('eos_token_id": 2', 'eos_token_id": null')),
    ("token 300 is not in the embedding of 266", ('eos_token_id": 2', 'eos_token_id": 300')),
    ("token 266 is not in the embedding of 266", {"pieces.json": json.dumps([*PIECES, "more"])}),
    ("the tokenizer of", ELSE | {"tokenizer.json": LFS}), ("the tokenizer of", ELSE | {"tokenizer_config.json": "{}"}),
    ("has no fast form", ELSE | {"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'}),
    ("no tokenizer", ELSE | {"flags": "--budgets 6,3"}), ("has 8 tokens", {"text.txt": "a text"}),
    ("multiple of 4", {"flags": "--d-R 6"}), ("up to 12", {"flags": "--d-R 16"}), ("1..6", {"flags": "--budgets 7,3"}),
    ("21 in 1..20", {"flags": "--d-R 4 --d-c 16,21"}), ("our MLA, naive is another model", {"W_KR": ""}),
])
def test_what_cannot_be_converted_is_refused_by_name(words, broken, folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    if isinstance(broken, tuple):
        right = Path("model/config.json").read_text()
        assert broken[0] in right
        broken = {"config.json": right.replace(*broken)}
    for name, content in broken.items():
        Path("model", name).unlink() if content is None else Path("model", name).write_text(content)
    if "W_KR" in broken:
        right = transmla.layer_to_mla
        monkeypatch.setattr(transmla, "layer_to_mla", lambda *given: right(*given) | {"W_KR": torch.ones(12, 32)})
    flags = ["--text", "model/text.txt", "--device", "cpu", *broken.get("flags", "").split()]
    refuses([words], transmla, monkeypatch, capsys, "model", *flags)
    assert not Path("out").exists()


@pytest.mark.parametrize("said, tensor, found", [
    ({"attention.value_length": 4, "rope.scaling.type": "none"}, "blk.1.attn_q.weight", []),
    ({"rope.scaling.type": "yarn"}, "rope_freqs.weight", ["RoPE scaling (yarn)", "the weight rope_freqs.weight"]),
    ({"attention.value_length": 8}, "blk.1.attn_k.weight", ["attention.value_length = 8"]),
    ({"logit_scale": 0.5}, "blk.2.attn_norm.weight", ["logit_scale = 0.5", "the weight blk.2.attn_norm.weight"]),
])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_what_a_gguf_says_and_transformers_drops_is_refused_by_name(family, said, tensor, found):
    said = {f"{family.lower()}.{key}": value for key, value in said.items()} | {"general.architecture": family.lower()}
    fields = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in said.items()}
    reader = SimpleNamespace(fields=fields, tensors=[SimpleNamespace(name=tensor)])
    assert transmla.obstacles(hf_model(family).config, reader) == found


def test_a_checkpoint_samples_like_the_original_and_trains_on(folder, tmp_path, monkeypatch, capsys):
    """It starts at the loss of the original, falls at every budget, and the cache does not grow."""
    monkeypatch.chdir(tmp_path)
    start, text, theirs = "out/transmla/checkpoint.pt", str(folder / "text.txt"), hf_model("Llama")
    main_of(transmla, monkeypatch, folder, "--text", text, "--budgets", "6,4,2", "--device", "cpu")
    assert "| our matmla, d_c 12, d_R 12 | 2 | 96 |" in capsys.readouterr().out
    model, encoding = common.load(start, "cpu")
    old = transmla.build(*transmla.to_gqa(theirs))
    best = transmla.importance(old, transmla.read_text(text, 8192, encoding, 64)[1]).argmax(1)
    for first, block, gqa in zip(best, model.blocks, old.blocks):
        head = gqa.attention.W_O.weight.unflatten(1, (6, 4))[:, first]
        assert torch.equal(block.attention.W_O.weight[:, :4], head), "the most important head is not the first"
    prompt = encoding.encode_ordinary("ababb")
    assert prompt == [1, *map(PIECES.index, (" a", "b", "abb"))], "pieces are not merged in their order"
    flags = "--device cpu --tokens 9 --temperature 0 --prompt ababb".split()
    main_of(sample, monkeypatch, "--checkpoint", start, *flags)
    tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)[0].tolist()
    said = b"".join(token_bytes(encoding, token) for token in tokens).decode(errors="replace")
    assert "<s> " + capsys.readouterr().out == said + "\n"

    flags = "--device cpu --out on --context 32 --steps 25 --batch 6 --lr 0.02 --lr-adamw 0.01".split()
    main_of(train, monkeypatch, "--init", start, "--data", text, *flags)
    looks = [line["val_loss"] for line in log_of(Path("on")) if "val_loss" in line]
    _, held_out = read_tokens(prepare(text, torch.load(start)["encoding"]), 32, 266)
    old.config = replace(old.config, context=32)
    loss = common.evaluate(old, held_out, 256)[6]
    assert looks[0]["6"] == pytest.approx(loss, abs=1e-4)
    assert all(looks[-1][m] < looks[0][m] - 0.5 for m in ("6", "4", "2"))
    healed = common.load("on/checkpoint.pt", "cpu")[0]
    assert healed.new_cache(1, 1).nbytes == old.new_cache(1, 1).nbytes
    assert all(block.attention.W_UK.weight.abs().min() > 0 for block in healed.blocks), "training found no way in"

    main_of(transmla, monkeypatch, folder, "--text", text, "--device", "cpu", "--d-R", 4, "--d-c", "16,8")
    assert "| our mla, d_c 8, d_R 4 | 6 | 48 |" in capsys.readouterr().out
    hf_model("Qwen2").save_pretrained("no_text")
    main_of(transmla, monkeypatch, "no_text", "--device", "cpu")
    assert "| our mla, d_c 12, d_R 12 | 6 | 96 | no tokenizer" in capsys.readouterr().out


def test_mla_can_do_what_no_gqa_of_the_same_cache_can():
    """A token alone is mapped linearly. GQA's map goes through its values, half a row of 32: rank n_kv·d_h at most. MLA
    may give nearly all of the row to c_KV: rank d_c."""
    for name, d_c, d_R, rank in ("gqa", 1, 2, 16), ("mla", 28, 4, 28):
        c = matmla.Config(attention=name, d=40, n_h=6, n_kv=2, d_h=8, d_c=d_c, d_cq=0, d_R=d_R)
        attention = matmla.ATTENTION[name](c)
        attention.norm_KV = torch.nn.Identity()
        assert attention.numbers(6) == 32
        assert torch.linalg.matrix_rank(attention(torch.eye(40)[:, None])[:, 0], rtol=1e-5) == rank
