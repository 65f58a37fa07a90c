"""Tests of transmla.py: what is converted says the same as transformers does, or is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import gguf
import pytest
import safetensors.torch  # noqa: F401  before in_float64, which it would not survive
import tokenizers
import torch
import transformers

import common
import export
import hub
import train
import transmla
from matmla import ATTENTION, MLA, Config
from pretrained import to_gqa, with_one
from test_matmla import chunked, error, randomized

TIGHT = 1e-10  # float64: rounding only
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
PIECES += ["▁", "a", "b", "▁a", "ab", "abb", "c"]
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
# A context of 16 and factors 1 and 4: frequencies that stay, are divided, and are in between.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=30.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LINEAR = dict(rope_type="linear", rope_theta=50.0, factor=2.5)
TOKENS = torch.randint(266, (2, 40), generator=torch.Generator().manual_seed(1))
FLAGS = "model --text model/text.txt --device cpu "
OUT = Path("out/transmla/checkpoint.pt")
LOUD = (4, 1)  # of the two layers of `original`, these heads are the most important


def hf_model(family, **sizes):
    """A random model of transformers, in float32."""
    config = getattr(transformers, f"{family}Config")(**SIZES | sizes)
    config._experts_implementation = "eager"  # others have no float64
    model = randomized(getattr(transformers, f"{family}ForCausalLM")(config))
    for name, p in model.named_parameters():
        if "experts" in name:  # of three dimensions
            p.data *= 0.3
    return model.eval()


def convert(theirs, order=None, moments=None, **changes):
    """(our GQA, our MLA) of a model of transformers, in float64."""
    c, old = to_gqa(theirs)
    attention = c.attention.replace("gqa", "mla")
    mla = replace(c, **{"attention": attention} | changes)
    new = transmla.to_mla(old, c, mla, order, moments)
    return transmla.build(c, old, torch.float64), transmla.build(mla, new, torch.float64)


def copy_keys(layer, turning):
    """At the first `turning` of 4 frequencies, the second and third key of 3 are the first's."""
    for p in layer.self_attn.k_proj.parameters():
        k = p.data.unflatten(0, (3, 2, 4))[:, :, :turning]
        k[1] = -k[0]
        k[2] = 2 * k[0]


def cut(theirs, **changes):
    """The same, with sizes that are calibrated on TOKENS."""
    gqa, _ = convert(theirs)
    return convert(theirs, moments=transmla.second_moments(gqa, TOKENS), **changes)


def write_tokenizer(folder):
    """SentencePiece's way: a space in front, pairs of letters, and bytes for what is no letter."""
    merges = [("▁", "a"), ("a", "b"), ("ab", "b")]
    ids = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)]
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    theirs.add_special_tokens({"pad_token": "<pad>"})  # number 266: the model has no vector for it
    theirs.save_pretrained(folder)


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A Llama, saved in the folder model with its tokenizer and a text."""
    monkeypatch.chdir(tmp_path)
    model = hf_model("Llama")
    for layer, head in zip(model.model.layers, LOUD):
        layer.self_attn.o_proj.weight.data[:, 4 * head : 4 * head + 4] *= 10
    model.save_pretrained("model")
    write_tokenizer("model")
    Path("model/text.txt").write_text("the cat saw the dog, the dog saw the cat. " * 100)
    return model


# ---------------------------------------------------------------- exactly

FAMILIES = {
    "Llama, 3 heads share a key": ("Llama", dict(num_key_value_heads=2, head_dim=10)),
    "Llama 3": ("Llama", dict(head_dim=8, rope_parameters=LLAMA3)),
    "Llama, linear": ("Llama", dict(rope_parameters=LINEAR, tie_word_embeddings=True)),
    "Mistral, multi-query": ("Mistral", dict(num_key_value_heads=1, rms_norm_eps=1e-2)),
    "Mixtral": ("Mixtral", dict(num_local_experts=5)),
    "Mixtral, tied": ("Mixtral", dict(num_key_value_heads=6, tie_word_embeddings=True)),
    "Qwen2, one key a head": ("Qwen2", dict(num_key_value_heads=6, tie_word_embeddings=True)),
    "Qwen3": ("Qwen3", dict(head_dim=10, rms_norm_eps=1e-2)),
    "Qwen3, 3 heads share a key": ("Qwen3", dict(num_key_value_heads=2, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("order", [None, [[4, 0, 5, 2, 1, 3], [1, 3, 0, 5, 2, 4]]])
@pytest.mark.parametrize("name", FAMILIES)
def test_naive_absorbed_and_with_heads_in_any_order_it_is_theirs(name, order, in_float64):
    """Whole, through a cache in chunks, and generating. With an order, keys are rotated, too."""
    family, sizes = FAMILIES[name]
    theirs = hf_model(family, **sizes).double()
    assert hub.obstacles(theirs.config) == []
    gqa, mla = convert(theirs)
    if order:
        _, mla = convert(theirs, order, transmla.second_moments(gqa, TOKENS))

    right = theirs(TOKENS).logits
    assert error(gqa(TOKENS)[0], right) < TIGHT and error(mla(TOKENS)[0], right) < TIGHT
    for absorb_below in (0, torch.inf):  # naive, absorbed
        for block in mla.blocks:
            block.attention.absorb_below = absorb_below
        logits, cache = chunked(mla, TOKENS, [17, 1, 22], [6] * 3)
        assert error(logits, right) < TIGHT
        assert cache.nbytes == gqa.new_cache(2, 40).nbytes
    text = theirs.generate(TOKENS[:, :9], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(mla.generate(TOKENS[:, :9], 12, temperature=0), text)


@pytest.mark.parametrize(
    "arch, family, sizes, settings, factors",
    [
        ("llama", "Llama", {}, {}, {}),
        ("llama", "Llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 3.0}, {}),
        ("llama", "Llama", dict(rope_parameters=LINEAR), {"rope.scaling.factor": 2.5}, {}),
        ("llama", "Llama", dict(head_dim=8, rope_parameters=LLAMA3), {}, {"rope_freqs.weight"}),
        ("qwen2", "Qwen2", dict(tie_word_embeddings=True), {}, {}),
        ("qwen3", "Qwen3", dict(head_dim=128), {}, {}),
    ],
)
def test_a_gguf_says_the_same(arch, family, sizes, settings, factors, tmp_path):
    """As llama.cpp writes it: Llama's pairs are neighbours; rope_freqs divide Llama 3's angles."""
    theirs = hf_model(family, **sizes)
    base = theirs.config.rope_parameters["rope_theta"]
    d_h = len(theirs.model.layers[0].self_attn.q_proj.weight) // 6
    ordinary = base ** (-torch.arange(0, d_h, 2) / d_h)
    tensors = {name: ordinary / theirs.model.rotary_emb.inv_freq for name in factors}
    write_gguf(tmp_path / "a.gguf", arch, theirs, d_h, settings, tensors)
    read, encoding = hub.read_pretrained(tmp_path / "a.gguf")
    assert error(read(TOKENS).logits, theirs(TOKENS).logits) < 1e-6
    assert encoding["eot_token"] == 2
    gqa, mla = convert(read)
    assert error(mla(TOKENS)[0], gqa(TOKENS)[0]) < TIGHT


def write_gguf(path, arch, model, d_h, settings=(), tensors=()):
    """A .gguf file of a model of transformers, as llama.cpp's converter would write it."""
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    settings = {
        "context_length": c.max_position_embeddings,
        "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "rope.freq_base": c.rope_parameters["rope_theta"],
        "rope.dimension_count": d_h,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": d_h,
        "attention.value_length": d_h,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        **dict(settings),
    }
    for key, value in settings.items():
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    for name, value in {
        "tokenizer_model": "llama",
        "token_list": PIECES,
        "token_scores": [-float(i) for i in range(len(PIECES))],
        "token_types": [2, 3, 3, *[6] * 256, *[1] * 7],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
    }.items():
        getattr(writer, f"add_{name}")(value)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    weights = model.state_dict()
    if c.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name, W in weights.items():
        if arch == "llama" and re.search("[qk]_proj", name):
            W = W.unflatten(0, (-1, 2, d_h // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), W.numpy())
    for name, W in dict(tensors).items():
        writer.add_tensor(name, W.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_in_bfloat16_the_frequencies_stay():
    gqa, mla = convert(hf_model("Llama", rope_parameters=LLAMA3, head_dim=8))
    for model in (gqa, mla):
        right = model.blocks[1].attention.frequencies.clone()
        frequencies = model.bfloat16().blocks[1].attention.frequencies
        assert frequencies.dtype == torch.float32 and torch.equal(frequencies, right)


# ---------------------------------------------------------------- smaller


@pytest.mark.parametrize(
    "family, base, turning, kept, d_c",
    [
        ("Qwen2", 1e4, 4, {"d_R": 8}, 5),
        ("Qwen2", 1e60, 1, {"d_R": 8}, 5 + 2 * 3 * 2),  # only the first of 4 pairs turns
        ("Qwen3", 1e4, 0, {}, 5),  # with QK-norm, keys keep all their slots
    ],
)
def test_a_cut_takes_nothing_where_keys_are_copies_or_do_not_turn(family, base, turning, kept, d_c):
    """Values have rank 5."""
    rope = dict(rope_type="default", rope_theta=base)
    theirs = hf_model(family, head_dim=8, rope_parameters=rope)
    for layer in theirs.model.layers:
        copy_keys(layer, turning)
        basis = torch.randn(24, 5)
        for p in layer.self_attn.v_proj.parameters():
            p.data = basis @ torch.randn(5, *p.shape[1:])
    for rank, least, most in ((d_c, 0, 1e-6), (d_c - 1, 1e-3, 1)):  # 1e-6: of float32 weights
        gqa, mla = cut(theirs, d_c=rank, **kept)
        assert least <= error(mla(TOKENS)[0], gqa(TOKENS)[0]) < most


def test_the_slot_that_stays_takes_as_much_of_the_keys_as_one_can():
    """By the singular values of each layer's keys, at each frequency."""
    gqa, mla = cut(hf_model("Qwen2"), d_R=4, d_c=20)
    reads = []
    for block in gqa.blocks:
        block.norm_attention.register_forward_hook(lambda norm, given, x: reads.append(x))
    gqa(TOKENS[:, :-1])
    for x, before, after in zip(reads, gqa.blocks, mla.blocks, strict=True):
        x = with_one(x).flatten(0, 1)
        keys = (x @ before.attention.W_K.weight.T).unflatten(1, (3, 2, 2))  # [t,g,f,p]
        slot = (x @ after.attention.W_KR.weight.T).unflatten(1, (2, 2))  # [t,f,p]
        most = torch.linalg.svdvals(keys.permute(2, 0, 3, 1).flatten(1, 2))[:, 0]  # [f]
        assert error(slot.square().sum((0, 2)), most.square()) < 1e-8


def test_a_cut_does_not_depend_on_how_queries_and_keys_share_a_score():
    """Keys 32 times as long, and queries a 32nd, are the same GQA: so must be the cut."""
    logits = []
    for factor in (1, 32):
        theirs = hf_model("Llama")
        for layer in theirs.model.layers:
            layer.self_attn.k_proj.weight.data *= factor
            layer.self_attn.q_proj.weight.data /= factor
        gqa, mla = cut(theirs, d_R=4, d_c=11)
        logits.append(mla(TOKENS)[0])
    assert error(gqa(TOKENS)[0], logits[0]) > 0.1 and error(*logits) < 1e-8


def test_importance_is_the_fisher_information_of_gates_in_transformers():
    theirs = hf_model("Llama")
    gqa, _ = convert(theirs)
    gates = torch.ones(2, 39, 6, requires_grad=True)
    for layer, gate in zip(theirs.model.layers, gates):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, given, gate=gate: given[0] * gate.repeat_interleave(4, -1)
        )
    right = torch.zeros(2, 6)
    for w in TOKENS:
        loss = torch.nn.functional.cross_entropy(theirs(w[None, :-1]).logits[0], w[1:])
        right += torch.autograd.grad(loss, gates)[0].square().sum(1)
    assert error(transmla.importance(gqa.float(), TOKENS), right) < 1e-4
    assert not any("attend" in vars(block.attention) for block in gqa.blocks)


@pytest.mark.parametrize("family, share", [("Llama", 0.0013), ("Qwen2", 0.015)])
def test_for_deepseek_keys_that_are_copies_lose_little(family, share):
    """Of what attention is worth on the model's own text: what the loss would rise without it.

    One key with RoPE then has all. Llama loses by the norm alone, Qwen2 by its biases, too. The
    mean of the embeddings is not zero, as in models that were trained.
    """
    theirs = hf_model(family, hidden_size=42, head_dim=8)
    theirs.model.embed_tokens.weight.data += 0.3 * torch.randn(42)
    for layer in theirs.model.layers:
        copy_keys(layer, 4)
        layer.self_attn.o_proj.weight.data *= 3
    gqa, _ = convert(theirs)
    text = gqa.float().generate(torch.arange(240)[:, None], 60)
    moments = transmla.second_moments(gqa, text[:200])
    gqa, mla = convert(theirs, moments=moments, attention="mla", d_R=8, d_c=24)
    x, y = text[200:, :-1], text[200:, 1:]
    before, after = gqa(x, y)[1], mla(x, y)[1]
    for block in gqa.blocks:
        block.attention.W_O.weight.data.zero_()
    assert after - before < share * (gqa(x, y)[1] - before)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "words, changes",
    [  # of config.json; or whole files
        ("the architecture gemma", {"model_type": "gemma"}),
        ("RoPE scaling (yarn)", {"rope_parameters": LLAMA3 | dict(rope_type="yarn")}),
        (
            "RoPE on a part of each head",
            {"rope_parameters": dict(rope_type="default", partial_rotary_factor=0.5)},
        ),
        ("a sliding window of 16", {"model_type": "mistral", "sliding_window": 16}),
        ("3 experts per token", {"model_type": "mixtral", "num_experts_per_tok": 3}),
        ("the activation gelu", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("without model.layers.2.", {"num_hidden_layers": 3}),
        ("the weight model.layers.1.", {"num_hidden_layers": 1}),
        ("the config of", {"num_hidden_layers": "two"}),
        ("no end of text", {"tokenizer_config.json": "{}", "eos_token_id": None}),
        ("token 300 is not in the", {"tokenizer_config.json": "{}", "eos_token_id": 300}),
        ("token 265 is not in the embedding of 265", {"vocab_size": 265}),
        ("the tokenizer of", {"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}),
        ("has 8 tokens", {"text.txt": "a text"}),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(words, changes, original, says, refuses):
    config = original.config.to_dict()
    for name, value in changes.items():
        if "." in name:
            Path("model", name).write_text(value)
        else:
            config[name] = value
    Path("model/config.json").write_text(json.dumps(config))
    refuses([words], says, transmla, FLAGS)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words, settings",
    [
        ("rope.scaling.type = yarn", {"rope.scaling.type": "yarn"}),
        ("attention.value_length = 8", {"attention.value_length": 8}),
        ("expert_count = 8", {"expert_count": 8}),
        ("the weight blk.0.attn_sinks.weight", {}),
    ],
)
def test_what_a_gguf_says_and_transformers_drops_is_refused(
    words, settings, tmp_path, says, refuses
):
    tensors = {} if settings else {"blk.0.attn_sinks.weight": torch.ones(6)}
    write_gguf(tmp_path / "a.gguf", "llama", hf_model("Llama"), 4, settings, tensors)
    refuses([words], says, transmla, f"{tmp_path}/a.gguf")


@pytest.mark.parametrize(
    "words, flags",
    [
        ("d_R 6 must be a multiple of 4", "--d-R 6"),
        ("in 1..20", "--d-R 4 --d-c 9,21"),
        ("budgets (7, 3)", "--budgets 7,3"),
        ("--deepseek: d_R must be 4", "--deepseek --d-R 8"),
        ("in 2..20", "--deepseek --d-c 1"),
    ],
)
def test_flags_that_cannot_be(words, flags, original, says, refuses):
    refuses([words], says, transmla, FLAGS + flags)


@pytest.mark.parametrize(
    "words, flags, family, sizes",
    [
        ("keys cannot go into the latent", "--d-R 4", "Qwen3", {}),
        ("no QK-norm", "--deepseek", "Qwen3", {}),
        ("no experts", "--deepseek", "Mixtral", {}),
        ("no RoPE scaling", "--deepseek", "Llama", dict(rope_parameters=LINEAR)),
        ("has no tokenizer", "--budgets 6,3", "Llama", {}),
    ],
)
def test_flags_that_cannot_be_for_this_model(words, flags, family, sizes, tmp_path, says, refuses):
    hf_model(family, **sizes).save_pretrained(tmp_path)
    refuses([words], says, transmla, f"{tmp_path} {flags}")


def test_several_sizes_are_compared_and_the_last_is_saved_beside_the_gqa(original, says):
    with (
        patch.object(transmla, "importance", wraps=transmla.importance) as importance,
        patch.object(transmla, "second_moments", wraps=transmla.second_moments) as moments,
    ):
        printed = says(transmla, FLAGS + "--budgets 6,4 --d-R 4 --d-c 16,8 --keep-gqa")
    rows = [line.split(" | ") for line in printed.splitlines() if "| pretrained_" in line]
    sizes = [[int(cell or 0) for cell in row[1:5]] for row in rows]
    exact = [[12, 12, m, 96] for m in (6, 4)]
    cut_twice = [[d_c, 4, m, size] for d_c, size in ((16, 80), (8, 48)) for m in (6, 4)]
    assert sizes == [[0, 0, 6, 96], *exact, *cut_twice]

    gqa, _ = common.load(Path("out/transmla/gqa/checkpoint.pt"), "cpu")
    assert error(gqa(TOKENS)[0], original(TOKENS).logits) < 1e-6
    mla, encoding = common.load(OUT, "cpu")
    assert (mla.config.d_c, mla.config.d_R) == (8, 4)
    text, other = transmla.read_text("model/text.txt", 8192, encoding, 64)
    for row, m in zip(rows[-2:], (6, 4)):
        right = mla(text[:, :-1], text[:, 1:], m)[1].exp().item()
        assert float(row[5].strip(" |").replace(",", "")) == pytest.approx(right, abs=1e-3)
    assert not torch.equal(text, other), "the text to measure on is not to calibrate on"
    assert torch.equal(importance.call_args.args[1], other)
    assert torch.equal(moments.call_args.args[1], other)


def test_a_matmla_generates_like_the_original_and_trains_on_at_every_budget(original, says):
    assert "| pretrained_matmla | 12 | 12 | 2 | 96 |" in says(transmla, FLAGS + "--budgets 6,4,2")
    ours, encoding = common.load(OUT, "cpu")
    for block, layer, head in zip(ours.blocks, original.model.layers, LOUD):
        W_O = layer.self_attn.o_proj.weight[:, 4 * head : 4 * head + 4]
        assert torch.equal(block.attention.W_O.weight[:, :4], W_O), "the loudest is not the first"
    prompt = torch.tensor([encoding.encode_ordinary("ababb")])
    assert prompt.tolist() == [[1, *map(PIECES.index, ("▁a", "b", "abb"))]]
    text = original.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, 40, temperature=0), text)

    flags = "--data model/text.txt --device cpu --context 32 --steps 25 --batch 6 --out on"
    says(train, f"--init {OUT} {flags} --lr 0.02 --lr-adamw 0.01")
    log = [json.loads(line) for line in Path("on/metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line["val_loss"] for line in log if "val_loss" in line]
    trained, held_out, _ = common.load_run(Path("on"), "cpu")
    ours.config = trained.config  # whose context is 32
    for m, loss in zip((6, 4, 2), common.evaluate(ours, held_out, 256, (6, 4, 2))):
        assert first[str(m)] == pytest.approx(loss, abs=1e-4) and last[str(m)] < loss - 0.5
    for block in trained.blocks:
        assert block.attention.W_UK.weight.abs().min() > 0, "training found no way in"


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3"])
def test_without_a_tokenizer_a_checkpoint_says_the_same(family, tmp_path, says):
    theirs = hf_model(family)
    theirs.save_pretrained(tmp_path)
    says(transmla, f"{tmp_path} --device cpu --out {tmp_path}/out")
    saved = common.load_checkpoint(tmp_path / "out/checkpoint.pt")
    assert saved["encoding"] is None
    ours = transmla.build(Config(**saved["config"]), saved["model"])
    assert error(ours(TOKENS)[0], theirs(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("flags", ["--d-R 4", "--deepseek"])
@pytest.mark.parametrize("name", ["v_proj", "k_proj"])
def test_a_layer_of_zeros_leaves_no_nan(name, flags, original, says):
    getattr(original.model.layers[0].self_attn, name).weight.data[:] = 0
    original.save_pretrained("model")
    says(transmla, FLAGS + flags)
    assert all(W.isfinite().all() for W in common.load_checkpoint(OUT)["model"].values())


def test_a_trained_run_is_not_overwritten_and_no_gqa_of_another_model_stays(
    original, says, refuses
):
    gqa = OUT.parent / "gqa"
    says(transmla, FLAGS + "--keep-gqa")
    says(transmla, FLAGS)
    assert not (gqa / "checkpoint.pt").exists()
    for folder in OUT.parent, gqa:
        before = OUT.read_bytes()
        (folder / "metrics.jsonl").write_text("{}")
        refuses([f"{folder} has a trained run"], says, transmla, FLAGS)
        assert OUT.read_bytes() == before
        (folder / "metrics.jsonl").unlink()


def test_for_deepseek_an_ordinary_mla_is_saved_which_a_server_gets(original, says):
    assert "| matmla | 20 | 4 | 4 | 96 |" in says(transmla, FLAGS + "--deepseek --budgets 6,4")
    ours, encoding = common.load(OUT, "cpu")
    assert type(ours.blocks[0].attention) is ATTENTION["matmla"]
    text = transmla.read_text("model/text.txt", 64, encoding, 64)[0][:, :-1]
    for m in 6, 4:
        served = export.to_transformers(ours, m, encoding.eot_token, vllm=True)
        assert error(ours(text, heads=m)[0], served(text).logits) < 1e-5


@pytest.mark.parametrize(
    "words, place, name, factor",
    [
        ("our GQA is another model", transmla, "to_gqa", 1 + 1e-3),  # float32 shows it
        ("our MLA, expanded is another model", transmla, "to_mla", 1 + 1e-6),  # float64 shows it
        ("our MLA, absorbed is another model", MLA, "read_absorbed", 1 + 1e-6),
    ],
)
def test_another_model_is_refused(words, place, name, factor, original, monkeypatch, says, refuses):
    """One factor is wrong, in both of our models, in the MLA, or only where it reads absorbed."""
    right = getattr(place, name)

    def wrong(*given):
        result = right(*given)
        if name == "read_absorbed":
            return result * factor
        weights = result[1] if name == "to_gqa" else result
        W_O = "blocks.1.attention.W_O.weight"
        weights[W_O] = weights[W_O] * factor  # the original's is another
        return result

    monkeypatch.setattr(place, name, wrong)
    refuses([words], says, transmla, FLAGS)
    assert not Path("out").exists()


def test_mla_can_do_what_no_gqa_of_the_same_cache_can():
    """A token alone is mapped linearly: by GQA through its values, which are half a row of 32; by
    MLA through c_KV, 28 of 32."""
    for name, rank in (("gqa", 16), ("mla", 28)):
        c = Config(attention=name, d=40, n_h=6, n_kv=2, d_h=8, d_c=28, d_cq=0, d_R=4)
        attention = ATTENTION[name](c)
        attention.norm_KV = torch.nn.Identity()
        reads = attention(torch.eye(40)[:, None])[:, 0]
        assert attention.row_width(6) == 32 and torch.linalg.matrix_rank(reads, rtol=1e-5) == rank
