"""
What a reader of matmla.py wants to see proven. First the oracle, which shares nothing with it:
loops over heads and positions in float64, written from the equations of DeepSeek-V2
(arXiv:2405.04434) and RoFormer (arXiv:2104.09864).
"""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import matmla

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
VARIANTS = "mha", "nested_mha", "gqa", "nested_gqa", "mla", "matmla"
NESTED = ["nested_mha", "nested_gqa", "matmla"]
LATENT = ["mla", "matmla"]
TIGHT = 1e-10  # float64: rounding only
LOOSE = 1e-5  # float32

# All sizes differ, so that a swapped axis cannot go unseen; nothing is a default.
SIZES = dict(
    vocab_size=37,
    context=16,
    n_layer=2,
    d=40,
    n_h=6,
    n_kv=3,
    d_h=10,
    d_c=14,
    d_cq=22,
    d_R=8,
    d_ff=36,
    rope_base=500.0,
    norm_eps=1e-3,
)
B, T = 2, 11


def randomized(module, seed=0):
    """With weights so large that attention is far from uniform, and norms that are not all ones."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 1))
    return module


def make(attention, dtype=torch.float64, **sizes):
    return randomized(matmla.GPT(matmla.Config(attention=attention, **SIZES | sizes)).to(dtype))


def some_tokens(batch=B, length=T, seed=1):
    return torch.randint(
        SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def fit(attention, heads):
    """The heads, raised to what the attention has: nested GQA has multiples of its 3 groups."""
    return [3 * math.ceil(m / 3) for m in heads] if attention == "nested_gqa" else list(heads)


def budgets_of(attention):
    return fit(attention, (6, 4, 1)) if attention in NESTED else (6,)


def readers(model):
    """Set every layer to read a cache naively, then absorbed, where it can."""
    for bound in (0, math.inf) if model.config.attention in LATENT else (0,):
        for block in model.blocks:
            block.attention.absorb_below = bound
        yield


def chunked(model, tokens, lengths, heads):
    """Logits of tokens [B, T] that go through a cache in chunks, each with its heads; the cache."""
    cache = model.new_cache(len(tokens), tokens.shape[1])
    logits = [
        model(chunk, heads=m, cache=cache)[0]
        for chunk, m in zip(tokens.split(lengths, 1), heads, strict=True)
    ]
    return torch.cat(logits, 1), cache


def operations(call, *arguments, **keywords):
    """How many the products of a call take."""
    with FlopCounterMode(display=False) as counter:
        call(*arguments, **keywords)
    return counter.get_total_flops()


every_variant = pytest.mark.parametrize("attention", VARIANTS)
every_nested = pytest.mark.parametrize("attention", NESTED)
every_latent = pytest.mark.parametrize("attention", LATENT)

# ---------------------------------------------------------------- the oracle


def oracle_rope(v, t, base):
    """v [width] at position t: pairs (v0, v1), ... each times a 2×2 rotation. RoFormer (15)."""
    out = []
    for i in range(len(v) // 2):
        angle = t * base ** (-2 * i / len(v))
        out.append(math.cos(angle) * v[2 * i] - math.sin(angle) * v[2 * i + 1])
        out.append(math.sin(angle) * v[2 * i] + math.cos(angle) * v[2 * i + 1])
    return torch.stack(out)


def oracle_rmsnorm(v, norm):
    return v / math.sqrt((v @ v).item() / len(v) + SIZES["norm_eps"]) * norm.weight


def part(W, i, width):
    """The rows of W that belong to head i."""
    return W.weight[i * width : (i + 1) * width]


def oracle_attention(a, c, h, m):
    """One layer: T vectors [d] for h, T vectors [d]; m: how many heads each query has."""
    u = [torch.zeros(c.d, dtype=torch.float64) for _ in h]
    latent = c.attention in LATENT
    if latent:
        c_Q = [oracle_rmsnorm(a.W_DQ.weight @ x, a.norm_Q) if c.d_cq else x for x in h]  # (37)
        c_KV = [oracle_rmsnorm(a.W_DKV.weight @ x, a.norm_KV) for x in h]  # (41)
        k_R = [oracle_rope(a.W_KR.weight @ x, t, c.rope_base) for t, x in enumerate(h)]  # (43)
    for i in range(max(m)):
        if latent:
            q = [
                torch.cat(
                    (
                        part(a.W_UQ, i, c.d_h) @ x,
                        oracle_rope(part(a.W_QR, i, c.d_R) @ x, t, c.rope_base),
                    )
                )
                for t, x in enumerate(c_Q)  # (38)-(40)
            ]
            k = [
                torch.cat((part(a.W_UK, i, c.d_h) @ x, k_R[s])) for s, x in enumerate(c_KV)
            ]  # (42) (44)
            v = [part(a.W_UV, i, c.d_h) @ x for x in c_KV]  # (45)
        else:
            groups = {"gqa": i // (c.n_h // c.n_kv), "nested_gqa": i % c.n_kv}
            j = groups.get(c.attention, i)  # whose key and value head i reads
            q = [
                oracle_rope(part(a.W_Q, i, c.d_h) @ x, t, c.rope_base) for t, x in enumerate(h)
            ]  # (1) (4)
            k = [
                oracle_rope(part(a.W_K, j, c.d_h) @ x, t, c.rope_base) for t, x in enumerate(h)
            ]  # (2) (5)
            v = [part(a.W_V, j, c.d_h) @ x for x in h]  # (3) (6)
        for t in range(len(h)):
            if i < m[t]:
                scores = torch.stack([q[t] @ k[s] / math.sqrt(len(q[t])) for s in range(t + 1)])
                p = scores.exp() / scores.exp().sum()
                o = sum(p[s] * v[s] for s in range(t + 1))  # (7) (46)
                u[t] = u[t] + a.W_O.weight[:, i * c.d_h : (i + 1) * c.d_h] @ o  # (8) (47)
    return u


@torch.no_grad()
def oracle(model, tokens, heads):
    """Logits [B, T, vocab_size].

    heads: an int, or a list with one entry for each token, an int or a tuple of one for each layer.
    """
    c = model.config
    heads = [heads] * tokens.shape[1] if isinstance(heads, int) else heads
    table = [m if isinstance(m, tuple) else (m,) * c.n_layer for m in heads]  # [token][layer]
    logits = []
    for sequence in tokens:
        x = [model.embed.weight[t] for t in sequence]
        for block, m in zip(model.blocks, zip(*table)):
            normed = [oracle_rmsnorm(v, block.norm_attention) for v in x]
            u = oracle_attention(block.attention, c, normed, m)
            x = [v + w for v, w in zip(x, u)]
            for t, v in enumerate(x):
                v = oracle_rmsnorm(v, block.norm_feed_forward)
                g = block.W_gate.weight @ v
                x[t] = x[t] + block.W_down.weight @ (g / (1 + (-g).exp()) * (block.W_up.weight @ v))
        logits.append(
            torch.stack([model.unembed.weight @ oracle_rmsnorm(v, model.norm) for v in x])
        )
    return torch.stack(logits)


# ---------------------------------------------------------------- the proofs


@every_variant
@pytest.mark.parametrize("d_cq", [22, 0])
def test_logits_equal_oracle_at_every_budget(attention, d_cq):
    model, tokens = make(attention, d_cq=d_cq), some_tokens()
    for m in budgets_of(attention):
        expected = oracle(model, tokens, m)
        assert error(model(tokens, heads=m)[0], expected) < TIGHT
        assert error(copy.deepcopy(model).float()(tokens, heads=m)[0], expected) < LOOSE


@every_variant
def test_any_chunking_through_a_cache_equals_oracle_naive_and_absorbed(attention):
    """Also: RoPE goes on at the cache's length, and a chunk after a cache is causal."""
    model, tokens = make(attention), some_tokens()
    for m in budgets_of(attention):
        expected = oracle(model, tokens, m)
        for _, lengths in itertools.product(readers(model), ([1] * T, [6, 1, 4], [T])):
            logits, cache = chunked(model, tokens, lengths, [m] * len(lengths))
            assert error(logits, expected) < TIGHT
        assert error(cache[1].rows, chunked(model, tokens, [T], [m])[1][1].rows) < TIGHT


@every_nested
def test_heads_may_change_from_token_to_token_and_differ_between_layers(attention):
    """All on one cache. A list has the heads of each layer."""
    model, tokens = make(attention), some_tokens(1)
    a, b, c = (fit(attention, layers) for layers in ((6, 1), (2, 6), (1, 4)))
    for lengths, heads in (
        ([4, 3, 4], fit(attention, [6, 2, 6])),
        ([1] * T, fit(attention, [1, 6, 3] * 3 + [5, 1])),
        ([2, 8, 1], fit(attention, [1, 4, 6])),
        ([4, 3, 4], [a, b, c]),
        ([1] * T, [a, b, c, 3] * 2 + [a, b, c]),
    ):
        table = [tuple(m) if isinstance(m, list) else m for m in heads]
        expected = oracle(model, tokens, sum([[m] * n for n, m in zip(lengths, table)], []))
        for _ in readers(model):
            assert error(chunked(model, tokens, lengths, heads)[0], expected) < TIGHT


@every_nested
def test_parts_of_a_batch_may_differ_in_every_layer(attention):
    model, tokens = make(attention), some_tokens(6)
    first, second = tuple(fit(attention, (4, 6, 1))), tuple(fit(attention, (2, 5)))
    alone = []
    for i, sequence in enumerate(tokens.split(1)):
        vector = (first[i // 2], second[i // 3])
        alone.append(oracle(model, sequence, [vector] * T))
    for _ in readers(model):
        for lengths in [T], [5, 1, 5]:
            heads = [[first, second]] * len(lengths)
            logits, _ = chunked(model, tokens, lengths, heads)
            assert error(logits, torch.cat(alone)) < TIGHT
    assert error(model(tokens, heads=[first, second])[0], torch.cat(alone)) < TIGHT


@every_variant
def test_the_same_heads_in_every_layer_are_bit_equal_to_one_number(attention):
    model, tokens = make(attention, torch.float32), some_tokens()
    for m in budgets_of(attention):
        assert torch.equal(model(tokens, heads=[m] * 2)[0], model(tokens, heads=m)[0])


@pytest.mark.parametrize("n_kv", [1, 2, 3])
def test_nested_gqa_equals_oracle_at_every_multiple_of_its_groups(n_kv):
    model, tokens = make("nested_gqa", n_kv=n_kv), some_tokens()
    for m in range(n_kv, 7, n_kv):
        assert error(model(tokens, heads=m)[0], oracle(model, tokens, m)) < TIGHT


@every_nested
@pytest.mark.parametrize("heads", [(4, 6, 1, 1, 6, 2), (4, 6, 1), (6, 6, 4), (3, 5), (2,)])
def test_tuple_of_budgets_equals_each_sequence_alone(attention, heads):
    model, tokens, heads = make(attention), some_tokens(6), tuple(fit(attention, heads))
    parts = tokens.chunk(len(heads))
    alone = [model(part, heads=m)[0] for part, m in zip(parts, heads)]
    assert error(model(tokens, heads=heads)[0], torch.cat(alone)) < TIGHT
    for _ in readers(model):  # through a cache, where budgets change on the way
        alone = [
            chunked(model, part, [6, 1, 4], [m, n, 6])[0]
            for part, m, n in zip(parts, heads, heads[::-1])
        ]
        together, _ = chunked(model, tokens, [6, 1, 4], [heads, heads[::-1], 6])
        assert error(together, torch.cat(alone)) < TIGHT


@every_nested
def test_gradients_of_a_divided_batch_equal_those_of_separate_ones(attention):
    tokens, targets = some_tokens(6), some_tokens(6, seed=2)
    for heads in (4, 6, 1), (6, 6, 4):
        heads = tuple(fit(attention, heads))
        separate, divided = make(attention), make(attention)
        for part, target, m in zip(tokens.split(2), targets.split(2), heads):
            (separate(part, target, heads=m)[1] / 3).backward()
        divided(tokens, targets, heads=heads)[1].backward()
        for (name, p), q in zip(separate.named_parameters(), divided.parameters()):
            assert error(q.grad, p.grad) < TIGHT, name


def test_rope_turns_interleaved_pairs_and_tells_late_positions_apart_in_bfloat16():
    x, positions = torch.randn(B, T, 3, 8, dtype=torch.float64), torch.arange(5, 5 + T)
    turned = matmla.rope(x, positions, 100.0)
    for b, t, h in itertools.product(range(B), range(T), range(3)):
        assert error(turned[b, t, h], oracle_rope(x[b, t, h], 5 + t, 100.0)) < TIGHT
    late = torch.tensor([1000, 1001])
    turned = matmla.rope(torch.ones(1, 2, 1, 8, dtype=torch.bfloat16), late, 1e4)
    assert turned.dtype == torch.bfloat16
    assert error(turned.double(), matmla.rope(torch.ones(1, 2, 1, 8).double(), late, 1e4)) < 1e-2


@every_nested
def test_m_heads_are_a_separate_model_of_the_first_m_heads_and_cost_as_much(attention):
    model, tokens = make(attention), some_tokens()
    plain = {"nested_mha": "mha", "matmla": "mla"}.get(attention, attention)
    for m in budgets_of(attention)[1:]:
        config = dataclasses.replace(model.config, attention=plain, n_h=m)
        small, state = matmla.GPT(config).double(), model.state_dict()
        first = {
            name: state[name][tuple(map(slice, p.shape))] for name, p in small.state_dict().items()
        }
        small.load_state_dict(first)
        assert error(model(tokens, heads=m)[0], small(tokens)[0]) < TIGHT
        assert operations(model, tokens, heads=m) == operations(small, tokens)


@every_latent
def test_cache_holds_the_normed_latent_and_the_rotated_key(attention):
    model, tokens = make(attention, n_layer=1), some_tokens(1)
    a, (cache,) = model.blocks[0].attention, chunked(model, tokens, [4, 7], [6, 6])[1]
    for t, token in enumerate(tokens[0]):
        x = oracle_rmsnorm(model.embed.weight[token], model.blocks[0].norm_attention)
        c_KV, k_R = cache.rows[0, t].split((14, 8))
        assert error(c_KV, oracle_rmsnorm(a.W_DKV.weight @ x, a.norm_KV)) < TIGHT, (
            "c_KV is cached after its norm"
        )
        assert error(k_R, oracle_rope(a.W_KR.weight @ x, t, 500.0)) < TIGHT, (
            "k_R is cached after RoPE"
        )


@every_variant
def test_cache_bytes_are_numbers_per_token_times_everything(attention):
    numbers = 14 + 8 if attention in LATENT else 2 * 10 * (3 if "gqa" in attention else 6)
    for dtype, size in ((torch.float64, 8), (torch.bfloat16, 2)):
        cache = make(attention, dtype).new_cache(3, 17)
        assert cache.nbytes == numbers * 2 * size * 17 * 3 and cache.length == 0
        assert cache.nbytes == sum(layer.rows.untyped_storage().nbytes() for layer in cache)


@every_nested
def test_full_cache_has_one_size_and_content_whatever_the_budget(attention):
    model = make(attention, n_layer=1)
    few = fit(attention, [2])[0]
    if attention != "nested_mha":
        assert model.new_cache(1, 9, heads=few).nbytes == model.new_cache(1, 9).nbytes
    at_few, at_6 = (chunked(model, some_tokens(), [T], [m])[1][0].rows for m in (few, 6))
    assert torch.equal(at_few, at_6) and at_6.all()


def test_nested_mha_ragged_cache_is_smaller_and_cannot_grow():
    model, tokens = make("nested_mha"), some_tokens()
    full, ragged = model.new_cache(B, T), model.new_cache(B, T, heads=4)
    assert ragged.nbytes * 6 == full.nbytes * 4
    for cache in (full, ragged):
        model(tokens[:, :9], heads=4, cache=cache)
    with pytest.raises(ValueError, match=r"6 heads asked.* \[1, 2, 3, 4\]"):
        model(tokens[:, 9:], heads=6, cache=ragged)
    smaller = [model(tokens[:, 9:], heads=2, cache=cache)[0] for cache in (full, ragged)]
    assert error(*smaller) < TIGHT  # down is possible
    by_layer = model.new_cache(B, T, heads=[4, 1])
    assert by_layer.nbytes * 12 == full.nbytes * 5
    with pytest.raises(ValueError, match=r"2 heads asked.* \[1\]"):
        model(tokens, heads=[4, 2], cache=by_layer)
    assert by_layer.length == 0, "the first layer took the tokens in"


@every_variant
def test_a_cache_that_is_rewound_goes_on_as_if_the_rest_had_never_been(attention):
    model, tokens = make(attention), some_tokens()
    cache = model.new_cache(B, T)
    model(tokens.flip(1), cache=cache)
    cache.rewind(0)
    model(tokens[:, :4], cache=cache)
    model(tokens[:, :5], cache=cache)
    cache.rewind(4)
    assert error(model(tokens[:, 4:], cache=cache)[0], model(tokens)[0][:, 4:]) < TIGHT


@every_variant
def test_overfull_cache_is_refused_and_stays_usable(attention):
    model, tokens = make(attention), some_tokens()
    cache = model.new_cache(B, 10)
    before = model(tokens[:, :8], cache=cache)[0]
    with pytest.raises(ValueError, match="11 .* 10"):
        model(tokens[:, 8:], cache=cache)
    assert cache.length == 8
    after = model(tokens[:, 8:10], cache=cache)[0]
    assert error(torch.cat((before, after), 1), model(tokens[:, :10])[0]) < TIGHT


@pytest.mark.parametrize(
    "attention, heads, numbers",
    [
        ("matmla", 0, "0 6"),
        ("matmla", 7, "7 6"),
        ("matmla", -1, "-1 6"),
        ("nested_mha", 7, "7 6"),
        ("mha", 4, "4 6"),
        ("gqa", 4, "4 6"),
        ("mla", 4, "4 6"),
        ("nested_gqa", 4, "4 [3, 6]"),
        ("mla", (6, 4), "4 6"),
        ("matmla", (3, 7), "7 6"),
        ("matmla", (3, 4, 5), "3 2"),
        ("matmla", (), "0 2"),
        ("matmla", "4", "'4' 6"),
        ("matmla", 4.0, "4.0 6"),
        ("matmla", True, "True 6"),
        ("matmla", (4, None), "None 6"),
        ("matmla", [4], "1 2"),
        ("matmla", [6, 7], "7 6"),
        ("matmla", [6, [4]], "[4] 6"),
    ],
)
def test_wrong_heads_are_refused_with_both_numbers(attention, heads, numbers):
    model = make(attention)
    for cache in (None, model.new_cache(B, T)):
        with pytest.raises(ValueError) as refusal:
            model(some_tokens(), heads=heads, cache=cache)
        assert all(n in str(refusal.value) for n in numbers.split())
        assert cache is None or cache.length == 0


@pytest.mark.parametrize(
    "use, numbers",
    [
        (lambda model: model(some_tokens(length=17)), "17 16"),
        (
            lambda model: [
                model(some_tokens(), cache=cache) for cache in [model.new_cache(B, 99)] * 2
            ],
            "11 16",
        ),
        (lambda model: model(some_tokens(3), cache=model.new_cache(2, T)), "3 2"),
        (lambda model: model.generate(some_tokens(length=0), 3), "0"),
        (lambda model: model.generate(some_tokens(), 3, schedule=[6, 4]), "2 3"),
        (lambda model: model.generate(some_tokens(), 2, heads=6, schedule=[6, 4]), "2 6"),
        (lambda model: model(some_tokens()[0]), "[11] B"),
        (lambda model: next(model.stream(some_tokens(), 3, schedule=[6, 4, 7])), "7 6"),
        (lambda model: next(model.stream(some_tokens(), 2, schedule=[6, (4, 2, 1)])), "2 3"),
        (lambda model: next(model.stream(some_tokens(), 2, schedule=[6, [4, 2, 1]])), "3 2"),
        (lambda model: model.new_cache(2, T).rewind(-1), "0 -1"),
        (lambda model: model.new_cache(2, T).rewind(1), "0 1"),
        (lambda model: model(some_tokens() + 30), "0..36"),
        (lambda model: model(some_tokens() - 1), "0..36"),
        (lambda model: model.new_cache(2, -1), "2 -1"),
        (lambda model: make("mla", norm_eps=-1e-6), "norm_eps -1e-06"),
        (lambda model: make("mla", rope_base=-500.0), "rope_base -500.0"),
        (lambda model: matmla.sample(torch.zeros(1, 5), -1.0), "-1.0 0"),
        (lambda model: matmla.sample(torch.zeros(1, 5), top_k=0), "0 1"),
        (lambda model: matmla.sample(torch.zeros(1, 5), top_p=1.5), "1.5 1"),
        (lambda model: make("gqa", n_kv=4), "6 4"),
        (lambda model: make("mla", d_R=7), "7 even"),
        (lambda model: make("mha", d_h=9), "9 even"),
        (lambda model: make("mla", d_c=0), "0 d_c"),
        (lambda model: make("mhla"), "mhla matmla"),
    ],
)
def test_wrong_use_is_refused_with_both_numbers(use, numbers):
    with pytest.raises(ValueError) as refusal:
        use(make("matmla"))
    assert all(n in str(refusal.value) for n in numbers.split()), refusal.value


def test_loss_is_the_mean_cross_entropy_and_float32_also_of_bfloat16_logits():
    model, targets = make("mla"), some_tokens()
    logits = torch.randn(B, T, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = -sum(
        logits.double()[b, t].log_softmax(0)[targets[b, t]] for b in range(B) for t in range(T)
    ) / (B * T)
    loss = model.loss(logits, targets)
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-5
    assert model(targets)[1] is None and model(targets, targets)[1].dtype == torch.float64


def test_input_and_output_embedding_are_one_matrix_unless_told_otherwise():
    for tie in (True, False):
        model = make("mla", tie=tie)
        model(some_tokens(), some_tokens(seed=2))[1].backward()
        shared = model.embed.weight.data_ptr() == model.unembed.weight.data_ptr()
        embeddings = [p for p in model.parameters() if p.shape == (37, 40)]
        assert shared == tie and len(embeddings) == 2 - tie


@every_variant
def test_weights_are_drawn_at_0_02_and_smaller_where_they_add_to_the_residual(attention):
    torch.manual_seed(0)
    model = matmla.GPT(matmla.Config(attention=attention))  # 5 layers, which add 10 times
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 10**0.5 if "W_O" in name or "W_down" in name else 0.02
            assert abs(p.std() / std - 1) < 0.1 and abs(p.mean()) < std / 10, name
        else:
            assert (p == 1).all(), name


@every_variant
def test_greedy_generation_equals_recomputing_the_prefix(attention):
    """The prompt is read with the first heads of a schedule, new token i predicted with the i-th.

    Also where two sequences differ, and where two layers do.
    """
    model, tokens, n = make(attention), some_tokens(length=5), 11
    one = fit(attention, [6, 4, 1, 6, 2, 3, 6, 5, 1, 6, 4]) if attention in NESTED else [6] * n
    two = fit(attention, [1, 6] * 5 + [4]) if attention in NESTED else [6] * n
    schedules = {
        "same": (one, one, one),
        "sequences": (list(zip(one, two)), one, two),
        "layers": (
            [list(pair) for pair in zip(one, two)],
            list(zip(one, two)),
            list(zip(one, two)),
        ),
    }
    for schedule, *sequences in schedules.values():
        text = model.generate(tokens, n, schedule=schedule, temperature=0)
        assert torch.equal(text[:, :5], tokens) and text.shape == (B, 5 + n)
        for heads, sequence in zip(sequences, text):
            predicted = oracle(model, sequence[None, :-1], [heads[0]] * 5 + heads[1:])[0].argmax(-1)
            assert torch.equal(predicted[4:], sequence[5:])


def test_generation_goes_on_past_the_context_and_repeats_with_its_seed():
    model = make("matmla")
    for length in (1, 15, 16, 17, 40):
        tokens = some_tokens(length=length)
        seeded = (torch.Generator().manual_seed(3) for _ in range(2))
        a, b = (model.generate(tokens, 20, generator=draw) for draw in seeded)
        assert a.shape == (B, length + 20) and torch.equal(a, b)
        assert torch.equal(a[:, :length], tokens)


def test_the_end_of_a_long_prompt_counts_and_the_context_is_used_to_its_last_token():
    model, prompt = make("matmla"), some_tokens(length=40)
    text = model.generate(prompt, 2, temperature=0)
    beginning_does_not = model(prompt[:, -16:])[0][:, -1].argmax(-1)
    half_is_forgotten = model(text[:, -9:-1])[0][:, -1].argmax(-1)
    assert torch.equal(beginning_does_not, text[:, -2])
    assert torch.equal(half_is_forgotten, text[:, -1])
    text = model.generate(prompt[:, :10], 8, temperature=0)  # 16, and 2 more
    predicted = model(text[:, :16])[0].argmax(-1)
    assert torch.equal(predicted[:, 9:], text[:, 10:17]), "the full context is to be read whole"
    assert torch.equal(model(text[:, 9:17])[0][:, -1].argmax(-1), text[:, 17])


def test_ten_million_tokens_are_asked_for_at_once():
    next(make("matmla").stream(some_tokens(), 10**7, heads=4))
    next(make("matmla").stream(some_tokens(), 10**6, schedule=[4] * 10**6))


def test_temperature_0_and_top_k_1_and_a_tiny_top_p_are_greedy():
    logits = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).round(
        decimals=1
    )  # with ties
    greedy = torch.from_numpy(logits.numpy().argmax(-1))[:, None]  # the first of them
    for settings in (0,), (1.0, 1), (0.7, None, 1e-6), (0.7, None, 1e-60):
        assert torch.equal(matmla.sample(logits, *settings), greedy)
    top = logits.topk(5).values[:, -1:]  # at any temperature
    for temperature in (1e-300, 1e-30, 1e39, math.inf):
        assert (logits.gather(1, matmla.sample(logits, temperature, 5)) >= top).all()


@pytest.mark.parametrize(
    "temperature, top_k, top_p, left",
    [
        (1.0, None, 1.0, [0, 1, 2, 3, 4]),
        (1.0, 3, 1.0, [1, 3, 4]),
        (1.0, None, 0.6, [1, 3]),
        (1.0, None, 0.66, [1, 3, 4]),
        (1.0, 2, 0.3, [1]),
        (0.5, None, 1.0, [0, 1, 2, 3, 4]),
        (0.5, None, 0.6, [1, 3]),  # 0.58 + 0.23: before temperature it would be 0.4 + 0.25
        (0.5, None, 0.57, [1]),  # and so these two tokens, not one
        (1.0, 3, 0.75, [1, 3]),  # of three 0.47 + 0.29; of all, 0.4 + 0.25 + 0.2 would be needed
    ],
)
def test_sampling_takes_temperature_then_top_k_then_top_p(temperature, top_k, top_p, left):
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    draw = torch.Generator().manual_seed(0)
    tokens = matmla.sample(p.log().expand(20000, 5), temperature, top_k, top_p, draw)
    weights = p[left] ** (1 / temperature)
    expected = torch.zeros(5).index_copy(0, torch.tensor(left), weights / weights.sum())
    assert (torch.bincount(tokens[:, 0], minlength=5) / 20000 - expected).abs().max() < 0.015


def test_only_tokens_that_stayed_are_sampled_whatever_the_device_draws(monkeypatch):
    """On a device whose noise can be 0, multinomial has returned the last place, whatever its p."""
    logits = torch.tensor([[-math.inf, 3.0, -math.inf, 1.0, 2.0, -200.0]])
    monkeypatch.setattr(
        torch, "multinomial", lambda p, n, generator: torch.tensor([[p.shape[1] - 1]])
    )
    for top_k, top_p, allowed in (
        (None, 1.0, {1, 3, 4}),
        (2, 1.0, {1, 4}),
        (None, 0.9, {1, 4}),
        (None, 0.5, {1}),
    ):
        assert matmla.sample(logits, 1.0, top_k, top_p).item() in allowed, (top_k, top_p)


def test_bfloat16_logits_are_drawn_in_float32():
    """Each of 1,000 equal tokens has its chance, which bfloat16 would round away."""
    logits = torch.zeros(20000, 1001, dtype=torch.bfloat16)
    logits[:, 0] = 6.90625  # about as likely as the others together
    draw = torch.Generator().manual_seed(0)
    tokens = matmla.sample(logits, top_p=0.75, generator=draw)
    first = math.exp(6.90625) / (math.exp(6.90625) + 1000)
    kept = math.ceil((0.75 - first) * (math.exp(6.90625) + 1000))
    assert abs(tokens.max() - kept) <= 2
    assert abs((tokens == 0).float().mean() - first / 0.75) < 0.015
