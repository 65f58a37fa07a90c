"""Tests of transmla.py: what it converts is transformers' model, and what it cannot convert is refused by name."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
import common    # the first of ours
import train
import matmla
import pretrained
import sample
import transmla
from data import get_encoding, prepare, read_tokens, token_bytes, windows
from safetensors.torch import load_file, save_file
from tests.test_train import log_of, main_of, refuses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

torch.set_num_threads(1)
TIGHT, LOOSE = 1e-10, 1e-5    # float64: rounding only; float32

SIZES = dict(    # of all random models here, unless said otherwise
    vocab_size=257, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6, head_dim=4,
    num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=256)
TOKENS = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(1))


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def hf_config(family, **sizes):
    return getattr(transformers, f"{family}Config")(**SIZES | sizes)


def randomized(module):
    """With random weights and biases so large that attention is far from uniform, and norms that are not all ones."""
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 2 else 1)
    return module.eval()


def hf_model(family, **sizes):
    return randomized(getattr(transformers, f"{family}ForCausalLM")(hf_config(family, **sizes)))


def greedy(model, tokens, n):
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=False,
                          eos_token_id=None, pad_token_id=0)


def converted(model, order=None, calibrate=False, **changes):
    """(GQA, MLA) in float64 for a model of transformers."""
    c, old = transmla.to_gqa(model)
    gqa, mla = transmla.build(c, old, torch.float64), replace(c, **{"attention": "pretrained_mla"} | changes)
    moments = transmla.second_moments(gqa, TOKENS) if calibrate else None
    return gqa, transmla.build(mla, transmla.to_mla(old, c, mla, order, moments), torch.float64)


def base(theta, **more):
    return dict(rope_parameters=dict(rope_type="default", rope_theta=theta, **more))


@pytest.mark.parametrize("family, sizes", [
    ("Llama", {}),
    ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=False, head_dim=10, rms_norm_eps=1e-2) | base(500.0)),
    ("Llama", dict(num_key_value_heads=6)),
    ("Llama", base(1e4, partial_rotary_factor=0.5)),    # which transformers ignores
    ("Mistral", dict(num_key_value_heads=1, head_dim=8, sliding_window=None)),
    ("Mistral", dict(num_key_value_heads=2, head_dim=8, sliding_window=64)),    # as long as the context
    ("Qwen2", dict(num_key_value_heads=2)),    # with biases
    ("Qwen2", dict(tie_word_embeddings=False) | base(1e6)),
])
def test_conversion_is_the_pretrained_model(family, sizes):
    theirs = hf_model(family, **sizes)
    assert not transmla.obstacles(theirs.config, None)
    gqa, mla = converted(theirs)
    expected, exact = theirs(TOKENS).logits, gqa(TOKENS)[0]
    assert gqa.config.tie == theirs.config.tie_word_embeddings
    assert error(gqa.float()(TOKENS)[0], expected) < LOOSE and error(mla(TOKENS)[0], exact) < TIGHT
    assert mla.new_cache(3, 17).nbytes == 2 * gqa.new_cache(3, 17).nbytes    # of float64, by now
    continued = greedy(theirs, TOKENS, 20)
    for short in 0, torch.inf:    # naive, absorbed
        cache = mla.new_cache(2, 40)
        for block in mla.blocks:
            block.attention.short = short
        assert error(torch.cat([mla(part, cache=cache)[0] for part in TOKENS.split([17, 1, 22], 1)], 1), exact) < TIGHT
        assert torch.equal(mla.generate(TOKENS, 20, temperature=0), continued)
    assert error(mla.float()(TOKENS, cache=mla.new_cache(2, 40))[0], expected) < LOOSE


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    def refuse(words, *arguments):
        refuses(words, transmla, monkeypatch, capsys, *arguments, "--device", "cpu", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    return refuse


@pytest.mark.parametrize("family, sizes, words", [
    ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)), "RoPE scaling (linear)"),
    ("Llama", dict(hidden_act="gelu"), "the activation gelu"), ("Llama", dict(mlp_bias=True), "mlp.gate_proj.bias"),
    ("Llama", dict(attention_bias=True), "self_attn.o_proj.bias"),
    ("Mistral", dict(sliding_window=16), "a sliding window of 16"),
    ("Qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), "a sliding window of 16"),
    ("Qwen3", {}, "QK-norm"), ("Olmo2", {}, "QK-norm"), ("Gemma", {}, "the architecture gemma"),
    ("Mixtral", {}, "mixture of experts"), ("Qwen2Moe", {}, "mixture of experts"), ("GPT2", {}, "the architecture gpt2"),
])
def test_what_gpt_does_not_have_is_refused_by_name(family, sizes, words, tmp_path, refuse):
    hf_config(family, **sizes).save_pretrained(tmp_path)
    refuse([words], tmp_path)


def write_gguf(path, model, family, tensors=(), **metadata):
    """The model as llama.cpp's converter writes it: other names, and for a Llama other pairs in RoPE."""
    gguf, c = pytest.importorskip("gguf"), model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_vocab_size(c.vocab_size), writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers), writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size), writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads), writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(1e4), writer.add_rope_dimension_count(4)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{family}.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.num_hidden_layers)
    for name, W in model.named_parameters():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            W = W.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), W.detach().numpy().copy())
    for name, size in tensors:
        writer.add_tensor(name, torch.ones(size).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("said, words", [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "RoPE scaling (linear)"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "RoPE scaling (yarn)"),
    ({"rope.scale_linear": 4.0}, "rope.scale_linear = 4.0"), ({"logit_scale": 0.5}, "logit_scale = 0.5"),
    ({"attention.scale": 0.5}, "attention.scale = 0.5"), ({"attention.sliding_window": 16}, "sliding_window = 16"),
    ({"attention.layer_norm_epsilon": 0.5}, "layer_norm_epsilon = 0.5"),
    ({"attention.key_length": 4, "attention.value_length": 8}, "attention.value_length = 8"),
    ({"tensors": [("rope_freqs.weight", 2)]}, "rope_freqs.weight"),
    ({"tensors": [("blk.1.attn_output.bias", 24)]}, "blk.1.attn_output.bias"),
    ({"tensors": [("blk.2.attn_norm.weight", 24)]}, "blk.2.attn_norm.weight"),
])
def test_what_a_gguf_says_and_transformers_drops_is_refused_by_name(family, said, words, tmp_path, refuse):
    write_gguf(tmp_path / "a.gguf", hf_model(family), family.lower(), **said)
    refuse([words, "a.gguf"], tmp_path / "a.gguf")


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_gguf_that_says_nothing_more_is_the_same_model(family, tmp_path):
    pytest.importorskip("accelerate", reason="transformers loads .gguf files through it")
    theirs = hf_model(family)
    harmless = {"rope.scaling.type": "none", "attention.key_length": 4, "attention.value_length": 4}
    write_gguf(tmp_path / "a.gguf", theirs, family.lower(), **harmless)
    model, encoding = transmla.read_pretrained(str(tmp_path / "a.gguf"))
    assert encoding is None and error(converted(model)[1](TOKENS)[0], converted(theirs)[0](TOKENS)[0]) < TIGHT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random Llama, a byte-level tokenizer and a text."""
    folder = tmp_path_factory.mktemp("pretrained")
    hf_model("Llama").save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": 256}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    (folder / "text.txt").write_text("the cat saw the dog, the dog saw the cat. " * 100, "utf-8")
    return folder


@pytest.mark.parametrize("arguments, words", [
    ("--d-R 6", "multiple of 4"), ("--d-R 16", "up to 12"), ("--d-R 4 --d-c 16,21", "21 in 1..20"),
    ("--budgets 7,3", "1..6"), ("--text short.txt", "10 tokens")])
def test_sizes_that_cannot_be_are_refused_with_both_numbers(arguments, words, folder, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    refuse([words], folder, *arguments.split())


def test_a_wrong_conversion_or_a_missing_weight_is_noticed(folder, tmp_path, refuse, monkeypatch):
    refuse(["no/such/model"], "no/such/model")
    partly = shutil.copytree(folder, tmp_path / "partly") / "model.safetensors"
    weights = load_file(partly)
    del weights["model.layers.1.self_attn.v_proj.weight"]
    save_file(weights, partly, {"format": "pt"})
    refuse(["without model.layers.1.self_attn.v_proj.weight"], tmp_path / "partly")
    right = transmla.layer_to_mla
    monkeypatch.setattr(transmla, "layer_to_mla", lambda *given: (new := right(*given)) | {"W_KR": new["W_KR"].flip(0)})
    refuse(["our MLA, naive is another model"], folder, "--text", folder / "text.txt")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"    # for a large file that was not fetched
SLOW = '{"tokenizer_class": "ByT5Tokenizer"}'


@pytest.mark.parametrize("files, words", [
    ({"tokenizer.json": LFS}, ["the tokenizer of"]),
    ({"tokenizer.json": '{"version": "1.0", "trunc'}, ["the tokenizer of"]),
    ({"tokenizer.json": None}, ["the tokenizer of"]),
    ({"tokenizer.json": None, "tokenizer_config.json": None, "tokenizer.model": LFS}, ["the tokenizer of"]),
    ({"tokenizer.json": None, "tokenizer_config.json": SLOW}, ["ByT5Tokenizer", "fast"]),
    ({"config.json": ('id": 256', 'id": null'), "tokenizer_config.json": None}, ["no end of text"]),
    ({"config.json": ('id": 256', 'id": 300'), "tokenizer_config.json": None}, ["300", "257"]),
    ({"tokenizer.json": ('"<end>": 256', '"<end>": 256, "b": 400')}, ["400", "257"]),
])
def test_a_tokenizer_that_is_of_no_use_is_refused_with_the_reason(files, words, folder, tmp_path, refuse):
    shutil.copytree(folder, tmp_path / "model")
    for name, content in files.items():
        path = tmp_path / "model" / name
        if isinstance(content, tuple):
            assert content[0] in path.read_text()
            content = path.read_text().replace(*content)
        path.unlink(missing_ok=True) if content is None else path.write_text(content)
    refuse(words, tmp_path / "model", "--text", folder / "text.txt")


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_model_without_a_tokenizer_converts_and_says_that_it_knows_no_text(family, tmp_path, monkeypatch, capsys):
    hf_model(family).save_pretrained(tmp_path)
    main_of(transmla, monkeypatch, tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    assert "| our mla, d_c 12, d_R 12 | 6 | 96 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without a tokenizer"):
        common.load(tmp_path / "out/checkpoint.pt", "cpu")


def test_checkpoint_samples_and_trains_on(folder, tmp_path, monkeypatch, capsys):
    """It starts at the loss of the original, falls at every budget, and the cache does not grow."""
    monkeypatch.chdir(tmp_path)
    start, text, theirs = tmp_path / "out/transmla/checkpoint.pt", folder / "text.txt", hf_model("Llama")
    main_of(transmla, monkeypatch, folder, "--text", text, "--budgets", "6,4,2", "--device", "cpu")
    assert "| our matmla, d_c 12, d_R 12 | 2 | 96 |" in capsys.readouterr().out
    flags = "--device cpu --tokens 9 --temperature 0 --prompt".split()
    main_of(sample, monkeypatch, "--checkpoint", start, *flags, "the é")
    model, encoding = common.load(start, "cpu")
    continued = greedy(theirs, torch.tensor([encoding.encode_ordinary("the é")]), 9)[0].tolist()
    said = b"".join(token_bytes(encoding, token) for token in continued).decode(errors="replace")
    assert capsys.readouterr().out == said + "\n"

    _, calibration = transmla.read_text(str(text), 8192, encoding, 64)
    gqa = converted(theirs)[0].float()
    for old, new, score in zip(gqa.blocks, model.blocks, transmla.importance(gqa, calibration)):
        head = old.attention.W_O.weight.unflatten(1, (6, 4))[:, score.argmax()]
        assert torch.equal(new.attention.W_O.weight[:, :4], head), "the most important head is not the first"

    flags = "--device cpu --out on --context 32 --steps 25 --batch 6 --lr 0.02 --lr-adamw 0.01".split()
    main_of(train, monkeypatch, "--init", start, "--data", text, *flags)
    looks = [line["val_loss"] for line in log_of(tmp_path / "on") if "val_loss" in line]
    _, held_out = read_tokens(prepare(str(text), torch.load(start)["encoding"]), 32, 257)
    x, y = windows(held_out, range(len(held_out) - 32), 32, torch.device("cpu"))
    loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert looks[0]["6"] == pytest.approx(loss, abs=0.02)    # at nearly all of these windows
    assert all(looks[-1][m] < looks[0][m] - 0.5 for m in ("6", "4", "2"))
    healed, _ = common.load(tmp_path / "on/checkpoint.pt", "cpu")
    assert healed.new_cache(1, 1).nbytes == gqa.new_cache(1, 1).nbytes
    assert all(block.attention.W_UK.weight.abs().min() > 0 for block in healed.blocks)    # they were all zero


def test_tokenizer_of_pieces_merges_the_earlier_pieces_first_and_keeps_every_byte(tmp_path):
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), " a", "ab", " ", "a", "b", "▁"]
    (tmp_path / "pieces.json").write_text(json.dumps(pieces), "utf-8")
    encoding = get_encoding({"json": pretrained.from_pieces(tmp_path / "pieces.json", 1), "eot_token": 1})
    assert encoding.encode_ordinary("abab") == [1, *map(pieces.index, (" a", "b", "ab"))]
    text = "def f():\r\n\n\treturn 'é日本'  \n\n"
    assert b"".join(token_bytes(encoding, t) for t in encoding.encode_ordinary(text)).decode() == "\n<s>\n " + text


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_rotation_of_kv_heads_commutes_with_rope(family):
    theirs = hf_model(family, head_dim=8)
    gqa, mla = converted(theirs, calibrate=True)
    assert error(mla(TOKENS)[0], gqa(TOKENS)[0]) < TIGHT
    plain = converted(theirs)[1].blocks[0].attention.W_KR.weight
    assert error(mla.blocks[0].attention.W_KR.weight, plain) > 0.1    # but it is another one


def test_nothing_is_cut_from_keys_that_are_copies_and_values_of_low_rank():
    """All keys are multiples of one another: RoRoPE puts them into one slot. Values of rank 5: PCA finds it."""
    theirs = hf_model("Qwen2", head_dim=8)
    with torch.no_grad():
        for layer in theirs.model.layers:
            a, basis = layer.self_attn, torch.randn(24, 5)
            for p in (a.k_proj.weight, a.k_proj.bias):
                p.copy_(torch.cat((p[:8], -p[:8], 2 * p[:8])))
            a.v_proj.weight.copy_(basis @ torch.randn(5, 24)), a.v_proj.bias.copy_(basis @ torch.randn(5))
    gqa, mla = converted(theirs, calibrate=True, d_R=8, d_c=5)
    assert error(mla(TOKENS)[0], gqa(TOKENS)[0]) < 1e-6    # of float32 weights
    assert mla.new_cache(1, 1).nbytes * 48 == gqa.new_cache(1, 1).nbytes * 13
    gqa, mla = converted(theirs, calibrate=True, d_R=8, d_c=4)
    assert error(mla(TOKENS)[0], gqa(TOKENS)[0]) > 1e-3


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_keys_beyond_k_R_go_through_the_latent(family):
    """Without RoPE, then. If the model's RoPE does not turn anything, that changes nothing."""
    theirs = hf_model(family, head_dim=8, rope_parameters=dict(rope_theta=1e60, rope_type="default"))
    with torch.no_grad():
        for layer in theirs.model.layers:
            for p in layer.self_attn.k_proj.parameters():
                p.unflatten(0, (3, 2, 4))[:, :, 0] = 0    # frequency 1, at any base
    for d_R in 16, 8:
        gqa, mla = converted(theirs, calibrate=True, d_R=d_R, d_c=48 - d_R)
        assert error(mla(TOKENS)[0], gqa(TOKENS)[0]) < 1e-8
        assert mla.blocks[0].attention.W_UK.weight.norm() > 1


def test_second_moments_are_of_what_the_attention_sees():
    gqa, _ = converted(hf_model("Llama"))
    x = torch.cat([pretrained.with_one(gqa.blocks[0].norm_attention(gqa.embed(w[:-1]))) for w in TOKENS])
    assert error(transmla.second_moments(gqa, TOKENS)[0], sum(torch.outer(v, v) for v in x) / len(x)) < TIGHT


def test_any_order_of_heads_is_the_same_model_and_a_budget_keeps_the_first_of_them():
    order = [[4, 0, 5, 2, 1, 3], [1, 3, 0, 5, 2, 4]]
    changes = dict(attention="pretrained_matmla", budgets=(6, 4, 2))
    gqa, nested = converted(hf_model("Qwen2", num_key_value_heads=2), order, **changes)
    assert error(nested(TOKENS)[0], gqa(TOKENS)[0]) < TIGHT
    with torch.no_grad():
        for block, heads in zip(gqa.blocks, order):
            for h in heads[2:]:
                block.attention.W_O.weight[:, h * 4 : (h + 1) * 4] = 0
    assert error(nested(TOKENS, heads=2)[0], gqa(TOKENS)[0]) < TIGHT


def test_importance_is_the_fisher_information_of_a_gate_per_head(monkeypatch):
    gqa, _ = converted(hf_model("Llama"))
    score, expected, attend = transmla.importance(gqa, TOKENS), torch.zeros(2, 6), matmla.attend
    for w in TOKENS:
        gates = torch.ones(2, 39, 6, 1, dtype=torch.float64, requires_grad=True)
        closing = iter(gates)
        monkeypatch.setattr(matmla, "attend", lambda *given: attend(*given) * next(closing))
        gqa(w[None, :-1], w[None, 1:])[1].backward()
        expected += gates.grad.square().sum((1, 3))
    assert error(score, expected) < LOOSE


def test_training_finds_a_way_into_the_part_without_rope():
    """W_UK is zero and W_UQ is not: W_UK has a gradient at once. With both zero, neither would ever have one."""
    _, mla = converted(hf_model("Llama"))
    mla(TOKENS, TOKENS)[1].backward()
    for a in (block.attention for block in mla.blocks):
        assert not a.W_UK.weight.any() and a.W_UK.weight.grad[:, :24].abs().min() > 0
        assert not a.W_UQ.weight.grad.any()    # until W_UK has moved
        assert a.W_QR.weight.grad[:, :24][a.W_QR.weight[:, :24] == 0].abs().min() > 0    # other heads' slots too


def test_mla_can_do_what_no_gqa_of_the_same_cache_can(monkeypatch):
    """The converse of TransMLA is false, twice.

    Values. A token that is alone sees itself: a linear map of x. In GQA it goes through the values, half a row, so its
    rank is at most n_kv·d_h. MLA may give nearly all of a row to c_KV: rank d_c.
    Scores. Those of all heads, [n_h·T, S], are in GQA a product through the keys, n_kv·d_h numbers again, and in MLA
    through a whole row, d_c + d_R = 2·n_kv·d_h numbers. Softmax shows log p, which differs by a constant in every row:
    a rank higher by 1 at most.
    """
    def make(name, d_c=1, d_R=2):
        c = matmla.Config(attention=name, d=40, n_h=6, n_kv=2, d_h=8, d_c=d_c, d_cq=0, d_R=d_R)
        attention = randomized(matmla.ATTENTION[name](c).double())
        attention.norm_KV = torch.nn.Identity()
        assert attention.numbers(6) == 32
        return attention

    alone, attend, log_p = torch.eye(40).double()[:, None], matmla.attend, []    # 40 texts of one token
    for attention, rank in (make("gqa"), 16), (make("mla", 28, 4), 28):
        assert torch.linalg.matrix_rank(attention(alone)[:, 0]) == rank

    def watched(q, k, v, positions, scale):
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(6 // k.shape[2], 2))
        log_p.append((scores[0, :, 60:, :60] * scale).log_softmax(-1).flatten(0, 1))    # late tokens see all the early
        return attend(q, k, v, positions, scale)

    monkeypatch.setattr(matmla, "attend", watched)
    x = torch.randn(1, 120, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4
    make("gqa")(x), make("pretrained_mla", 16, 16)(x)    # the shape TransMLA makes
    gqa, mla = (torch.linalg.matrix_rank(one, rtol=1e-9) for one in log_p)
    assert gqa <= 16 + 1 < mla
