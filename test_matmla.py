"""
What a reader of matmla.py wants to see proven. First the oracle, which shares nothing with it: loops over heads and
positions in float64, written from the equations of DeepSeek-V2 (arXiv:2405.04434) and RoFormer (arXiv:2104.09864).

    python -m pytest test_matmla.py                  the proofs
    python -m pytest test_matmla.py -k exercise      grades my_matmla.py, which exercises.py writes
"""

import ast
import copy
import dataclasses
import itertools
import math
import traceback

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import exercises
import matmla
from tests.grading import FAR, REFERENCE, WRONG, graft, load

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
VARIANTS = "mha", "nested_mha", "gqa", "mla", "matmla"
NESTED, LATENT = ["nested_mha", "matmla"], ["mla", "matmla"]
TIGHT = 1e-10  # float64: rounding only
LOOSE = 1e-5  # float32

# All sizes differ, so that a swapped axis cannot go unseen.
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
)
B, T = 2, 11


def randomized(module, seed=0):
    """With weights large enough that attention is far from uniform, and norms that are not all ones."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 1))
    return module


def make(attention, dtype=torch.float64, lab=None, **sizes):
    lab = lab or matmla
    return randomized(lab.GPT(lab.Config(attention=attention, **SIZES | sizes)).to(dtype))


def some_tokens(batch=B, length=T, seed=1):
    return torch.randint(
        SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def budgets_of(attention):
    return (6, 4, 1) if attention in NESTED else (6,)


def readers(model):
    """Set every layer to read a cache naively, then absorbed, where it can."""
    for short in (0, math.inf) if model.config.attention in LATENT else (0,):
        for block in model.blocks:
            block.attention.absorb_below = short
        yield


def chunked(model, tokens, lengths, heads):
    """Logits of tokens [B, T] fed through a cache in chunks, each with its own heads; and the cache."""
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
    """v [width] at position t: every pair (v0, v1), (v2, v3), ... times a 2×2 rotation. RoFormer (15)."""
    out = []
    for i in range(len(v) // 2):
        angle = t * base ** (-2 * i / len(v))
        out.append(math.cos(angle) * v[2 * i] - math.sin(angle) * v[2 * i + 1])
        out.append(math.sin(angle) * v[2 * i] + math.cos(angle) * v[2 * i + 1])
    return torch.stack(out)


def oracle_rmsnorm(v, norm):
    return v / math.sqrt((v @ v).item() / len(v) + norm.eps) * norm.weight


def part(W, i, width):
    """The rows of W that belong to head i."""
    return W.weight[i * width : (i + 1) * width]


def oracle_attention(a, c, h, m):
    """One layer. h: list of T vectors [d]; m: how many heads each of the T queries has. Returns T vectors [d]."""
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
            j = i // (c.n_h // c.n_kv) if c.attention == "gqa" else i
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
    """Logits [B, T, vocab_size]. heads: an int, or one for each of the T tokens."""
    c = model.config
    heads = [heads] * tokens.shape[1] if isinstance(heads, int) else heads
    logits = []
    for sequence in tokens:
        x = [model.embed.weight[t] for t in sequence]
        for block in model.blocks:
            u = oracle_attention(
                block.attention, c, [oracle_rmsnorm(v, block.norm_attention) for v in x], heads
            )
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
def test_budget_changes_within_a_sequence_equal_oracle(attention):
    """Written with all heads, continued with few, then with all again, on one cache."""
    model, tokens = make(attention), some_tokens(1)
    for lengths, heads in (
        ([4, 3, 4], [6, 2, 6]),
        ([1] * T, [1, 6, 3] * 3 + [5, 1]),
        ([2, 8, 1], [1, 4, 6]),
    ):
        expected = oracle(
            model, tokens, [m for length, m in zip(lengths, heads) for _ in range(length)]
        )
        for _ in readers(model):
            assert error(chunked(model, tokens, lengths, heads)[0], expected) < TIGHT


@every_nested
@pytest.mark.parametrize("heads", [(4, 6, 1, 1, 6, 2), (4, 6, 1), (6, 6, 4), (3, 5), (2,)])
def test_tuple_of_budgets_equals_each_sequence_alone(attention, heads):
    model, tokens = make(attention), some_tokens(6)
    parts = tokens.chunk(len(heads))
    alone = [model(part, heads=m)[0] for part, m in zip(parts, heads)]
    assert error(model(tokens, heads=heads)[0], torch.cat(alone)) < TIGHT
    for _ in readers(model):  # through a cache, where budgets change on the way
        alone = [
            chunked(model, part, [6, 1, 4], [m, n, 6])[0]
            for part, m, n in zip(parts, heads, heads[::-1])
        ]
        assert (
            error(chunked(model, tokens, [6, 1, 4], [heads, heads[::-1], 6])[0], torch.cat(alone))
            < TIGHT
        )


@every_nested
def test_gradients_of_a_divided_batch_equal_those_of_separate_ones(attention):
    tokens, targets = some_tokens(6), some_tokens(6, seed=2)
    for heads in (4, 6, 1), (6, 6, 4):
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
    model, tokens, plain = (
        make(attention),
        some_tokens(),
        {"nested_mha": "mha", "matmla": "mla"}[attention],
    )
    for m in (1, 4):
        config = dataclasses.replace(model.config, attention=plain, n_h=m)
        small, state = matmla.GPT(config).double(), model.state_dict()
        small.load_state_dict(
            {
                name: state[name][tuple(map(slice, p.shape))]
                for name, p in small.state_dict().items()
            }
        )
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
        assert error(k_R, oracle_rope(a.W_KR.weight @ x, t, 10000.0)) < TIGHT, (
            "k_R is cached after RoPE"
        )


@every_variant
def test_cache_bytes_are_numbers_per_token_times_everything(attention):
    numbers = 14 + 8 if attention in LATENT else 2 * 10 * (3 if attention == "gqa" else 6)
    for dtype, size in ((torch.float64, 8), (torch.bfloat16, 2)):
        cache = make(attention, dtype).new_cache(3, 17)
        assert cache.nbytes == numbers * 2 * size * 17 * 3 and cache.length == 0
        assert cache.nbytes == cache[0].rows.untyped_storage().nbytes()  # all layers share it


@every_nested
def test_full_cache_has_one_size_and_content_whatever_the_budget(attention):
    model = make(attention, n_layer=1)
    assert attention == "nested_mha" or {
        model.new_cache(1, 9, heads=m).nbytes for m in range(1, 7)
    } == {22 * 9 * 8}
    at_4, at_6 = (chunked(model, some_tokens(), [T], [m])[1][0].rows for m in (4, 6))
    assert torch.equal(at_4, at_6) and at_4.all()


def test_nested_mha_ragged_cache_is_smaller_and_cannot_grow():
    model, tokens = make("nested_mha"), some_tokens()
    full, ragged = model.new_cache(B, T), model.new_cache(B, T, heads=4)
    assert ragged.nbytes * 6 == full.nbytes * 4
    for cache in (full, ragged):
        model(tokens[:, :9], heads=4, cache=cache)
    with pytest.raises(ValueError, match=r"6 heads asked.* 1\.\.4 "):
        model(tokens[:, 9:], heads=6, cache=ragged)
    smaller = [
        model(tokens[:, 9:], heads=2, cache=cache)[0] for cache in (full, ragged)
    ]  # down is possible
    assert error(*smaller) < TIGHT


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
        ("mla", (6, 4), "4 6"),
        ("matmla", (3, 7), "7 6"),
        ("matmla", (3, 4, 5), "3 2"),
        ("matmla", (), "0 2"),
    ],
)
def test_wrong_heads_are_refused_with_both_numbers(attention, heads, numbers):
    model = make(attention)
    for cache in (None, model.new_cache(B, T)):
        with pytest.raises(ValueError) as refusal:
            model(some_tokens(), heads=heads, cache=cache)
        assert all(n in str(refusal.value) for n in numbers.split()) and (
            cache is None or cache.length == 0
        )


@pytest.mark.parametrize(
    "use, numbers",
    [
        (lambda model: model(some_tokens(length=17)), "17 16"),
        (
            lambda model: [
                model(some_tokens(), cache=cache) for cache in [model.new_cache(B, 99)] * 2
            ],
            "22 16",
        ),
        (lambda model: model(some_tokens(3), cache=model.new_cache(2, T)), "3 2"),
        (lambda model: model.generate(some_tokens(length=0), 3), "0"),
        (lambda model: model.generate(some_tokens(), 3, heads=[6, 4]), "2 3"),
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
        assert (
            shared == tie and len([p for p in model.parameters() if p.shape == (37, 40)]) == 2 - tie
        )


@every_variant
def test_weights_are_drawn_at_0_02_and_smaller_where_they_add_to_the_residual(attention):
    torch.manual_seed(0)
    model = matmla.GPT(matmla.Config(attention=attention))  # 4 layers, which add 8 times
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 8**0.5 if "W_O" in name or "W_down" in name else 0.02
            assert abs(p.std() / std - 1) < 0.1 and abs(p.mean()) < std / 10, name
        else:
            assert (p == 1).all(), name


@every_variant
def test_greedy_generation_equals_recomputing_the_prefix(attention):
    """The prompt is read with the first heads, new token i is predicted with heads[i], also those of each sequence."""
    model, tokens, n = make(attention), some_tokens(length=5), 11
    one, two = [6, 4, 1, 6, 2, 3, 6, 5, 1, 6, 4], [1, 6] * 5 + [4]
    for a, b in ((one, one), (one, two)) if attention in NESTED else (([6] * n, [6] * n),):
        text = model.generate(tokens, n, heads=a if a is b else list(zip(a, b)), temperature=0)
        assert torch.equal(text[:, :5], tokens) and text.shape == (B, 5 + n)
        for heads, sequence in zip((a, b), text):
            predicted = oracle(model, sequence[None, :-1], [heads[0]] * 5 + heads[1:])[0].argmax(-1)
            assert torch.equal(predicted[4:], sequence[5:])


def test_generation_goes_on_past_the_context_and_repeats_with_its_seed():
    model = make("matmla")
    for length in (1, 15, 16, 17, 40):
        tokens = some_tokens(length=length)
        a, b = (
            model.generate(tokens, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2)
        )
        assert (
            a.shape == (B, length + 20) and torch.equal(a, b) and torch.equal(a[:, :length], tokens)
        )


def test_the_end_of_a_long_prompt_counts_and_the_context_is_used_to_its_last_token():
    model, prompt = make("matmla"), some_tokens(length=40)
    text = model.generate(prompt, 2, temperature=0)
    assert torch.equal(
        model(prompt[:, -16:])[0][:, -1].argmax(-1), text[:, -2]
    )  # its beginning does not
    assert torch.equal(model(text[:, -9:-1])[0][:, -1].argmax(-1), text[:, -1])  # half is forgotten
    text = model.generate(prompt[:, :10], 8, temperature=0)  # 16, and 2 more
    predicted = model(text[:, :16])[0].argmax(-1)
    assert torch.equal(predicted[:, 9:], text[:, 10:17]), (
        "the full context must still be read as a whole"
    )
    assert torch.equal(model(text[:, 9:17])[0][:, -1].argmax(-1), text[:, 17])


def test_all_budgets_of_a_schedule_are_checked_before_the_first_token():
    for schedule, numbers in (([6, 4, 7], r"7 .* 1\.\.6 "), ([6, (4, 2, 1)], "2 .* 3")):
        with pytest.raises(ValueError, match=numbers):
            next(make("matmla").stream(some_tokens(), len(schedule), heads=schedule))


def test_temperature_0_and_top_k_1_and_a_tiny_top_p_are_greedy():
    logits = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).round(
        decimals=1
    )  # with ties
    greedy = torch.from_numpy(logits.numpy().argmax(-1))[:, None]  # the first of them
    for settings in (0,), (1.0, 1), (0.7, None, 1e-6):
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


def test_a_token_of_probability_0_is_never_sampled(monkeypatch):
    """Neither by a draw at the ends of its range, nor because the last stretch is rounded away."""
    logits = torch.tensor([[-math.inf, 3.0, -math.inf, 1.0, 2.0, -200.0]])
    for u in (0.0, torch.finfo(torch.float32).tiny, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.full(shape, u))
        for top_k, top_p, allowed in (
            (None, 1.0, {1, 3, 4}),
            (2, 1.0, {1, 4}),
            (None, 0.9, {1, 4}),
            (None, 0.5, {1}),
        ):
            assert matmla.sample(logits, 1.0, top_k, top_p).item() in allowed, (u, top_k, top_p)


# ---------------------------------------------------------------- the grading of exercises.py


def difference(found, expected):
    """What is wrong with `found`, or None."""
    if not isinstance(expected, torch.Tensor):
        return (
            None
            if found == expected
            else "not so"
            if expected is True
            else f"{found}, but {expected} is right"
        )
    if not isinstance(found, torch.Tensor):
        return f"{found}, but a tensor is right"
    for what, x, right in (
        ("shape", [*found.shape], [*expected.shape]),
        ("dtype", found.dtype, expected.dtype),
    ):
        if x != right:
            return f"the {what} is {x}, but {right} is right"
    a, b = found.double(), expected.double()
    off = ((a - b).norm() / b.norm()).item() if a.ne(b).any() else 0
    if off < {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.01}[expected.dtype]:
        return None
    if off < 1e-6:
        return f"off by {off:.1e}, as if it were computed in float32"
    factor = ((a * b).sum() / (b * b).sum()).item()
    if (a - factor * b).norm() < 1e-6 * a.norm():
        return f"it is {factor:.4g} times what is right"
    where = []
    for axis, name in enumerate(("sequence", "token", "head")[: a.dim() - 1]):
        places = (
            (~((a - b).abs() <= 1e-6))
            .transpose(0, axis)
            .flatten(1)
            .any(1)
            .nonzero()
            .flatten()
            .tolist()
        )
        where += [f"{name} {', '.join(map(str, places))}"] if len(places) < a.shape[axis] else []
    return f"off by {off:.1e}, in {' and '.join(where) or 'every token'}"


def obstacle(answers, file):
    """Why the file cannot be graded at all, in one line, or None."""
    try:
        load(answers, file)
        gone = exercises.definitions(ast.parse(REFERENCE)).keys() - exercises.definitions(
            ast.parse(answers)
        )
        return f"{file}:1: {', '.join(sorted(gone))} must stay" if gone else None
    except Exception as failure:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(failure.__traceback__)
            if frame.filename == file
        ]
        line = getattr(failure, "lineno", None) or [1, *lines][-1]
        return f"{file}:{line}: {type(failure).__name__}: {getattr(failure, 'msg', failure)}"


def mistake(number, step, found):
    """In words: the known wrong answer that gives just this, or nothing."""
    for why, edit in WRONG[number].items() if not isinstance(found, bool) else ():
        try:
            _, theirs = next(
                itertools.islice(looks(number, load(REFERENCE.replace(*edit))), step, None)
            )
            if difference(found, theirs) is None:
                return f"{why}: "
        except Exception:  # that one does not come so far
            continue
    return ""


def grade(number, answers, file="my_matmla.py"):
    """Pass; or skip, if nothing was written; or fail with one line that says where, and what is wrong."""
    title, hints = list(exercises.EXERCISES.items())[number - 1]
    nodes = exercises.definitions(ast.parse(answers))
    blank = [name for name in hints if exercises.is_blank(nodes[name])]
    if len(blank) == len(hints):
        pytest.skip(f"exercise {number}, {title}: not begun")
    line, problem = (
        nodes[(blank or list(hints))[0]].lineno,
        f"half done, {' and '.join(blank)} still to be written",
    )
    try:
        theirs = () if blank else looks(number, load(graft(answers, hints), file))
        for step, ((what, found), (_, expected)) in enumerate(
            zip(theirs, looks(number, load(REFERENCE)))
        ):
            if problem := difference(found, expected):
                problem = f"{what}: {mistake(number, step, found)}{problem}"
                break
    except Exception as failure:
        frames = [
            frame for frame in traceback.extract_tb(failure.__traceback__) if frame.filename == file
        ]
        line = ([line] + [frame.lineno for frame in frames if frame.lineno < FAR])[-1]
        after = (
            f", in `{frames[-1].name}`, which got what this returned"
            if frames and frames[-1].lineno > FAR
            else ""
        )
        problem = f"{type(failure).__name__}: {failure}{after}"
    if problem:
        pytest.fail(f"{file}:{line}: exercise {number}, {title}: {problem}", pytrace=False)


def vectors(*shape):
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(math.prod(shape))
    )


def shape(x):
    return list(getattr(x, "shape", [])) or x


def refused(call, *arguments):
    try:
        call(*arguments)
    except ValueError:
        return True
    return False


def layer(lab, attention, **sizes):
    return randomized(
        lab.ATTENTION[attention](lab.Config(attention=attention, **SIZES | sizes)).double()
    )


def layers(lab, short=0, **variants):
    for attention, budgets in variants.items():
        a, x = layer(lab, attention), vectors(B, T, 40)
        a.absorb_below = short
        for m in budgets:
            yield f"{attention} with {m} of 6 heads", a(x, m)
            cache = lab.Cache(x.new_zeros(B, T, a.row_width(6)))
            found = torch.cat([a(chunk, m, cache) for chunk in x.split([6, 1, 4], 1)], 1)
            yield f"{attention} with {m} of 6 heads, 6 + 1 + 4 tokens through a cache", found
        a(x).sum().backward()
        reached = [name for name, p in a.named_parameters() if p.grad is not None]
        yield f"weights of {attention} that training reaches", reached


def looks(number, lab):
    """What a grader looks at, one after the other: its name, and its value in `lab`. That of matmla.py is right."""
    titles = list(exercises.EXERCISES)
    match titles[number - 1]:
        case "RoPE":
            for start in (0, 5):
                yield (
                    f"from position {start}",
                    lab.rope(vectors(B, 4, 3, 8), torch.arange(start, start + 4), 100.0),
                )
            late, ones = torch.tensor([1000, 1001]), torch.ones(1, 2, 1, 8, dtype=torch.bfloat16)
            yield "positions 1000 and 1001 in bfloat16", lab.rope(ones, late, 1e4)
        case "softmax attention":
            q, k, v, one_hot = (
                vectors(B, T, 6, 16),
                vectors(B, T, 3, 16),
                vectors(B, T, 3, 7),
                torch.eye(T).double(),
            )
            for n in (4, 1, T):

                def read(values):
                    return lab.attend(q[:, -n:], k, values, torch.arange(T - n, T), 0.3)

                tokens = f"of the last {n} of {T} tokens"
                yield f"shape of the result {tokens}", shape(read(v))
                p = read(one_hot[None, :, None].expand(B, T, 3, T))  # these values show the weights
                seen = [row.nonzero().flatten().tolist() for row in p[0, :, 0]]
                yield (
                    f"first and last token seen by each {tokens}",
                    [row[:1] + row[-1:] for row in seen],
                )
                yield f"sum of the softmax weights {tokens}", p.sum(-1)
                yield f"scores before softmax {tokens}", (p[..., : T - n + 1] / p[..., :1]).log()
                yield f"softmax weights {tokens}", p
                yield f"result {tokens}", read(v)
        case "the first m heads":
            W = randomized(torch.nn.Linear(40, 60, bias=False).double())
            for m, width in ((6, 10), (4, 10), (1, 10), (2, 15)):
                yield f"{m} of {60 // width} heads", lab.to_heads(W, vectors(B, T, 40), m, width)
            cost, enough = (
                operations(lab.to_heads, W, vectors(B, T, 40), 1, 10),
                2 * B * T * 40 * 10,
            )
            yield "operations for 1 of 6 heads", max(cost, enough)
        case "multi-head attention":
            yield (
                "shape of rows",
                shape(layer(lab, "mha").write(vectors(B, T, 40), torch.arange(T), 6)),
            )
            yield from layers(lab, mha=[6], nested_mha=[6, 4, 1], gqa=[6])
        case "the cache":
            memory, rows = vectors(B, 5, 7), vectors(B, 6, 7)
            cache = lab.Cache(memory)
            for first, last in ((0, 2), (2, 3), (3, 5)):
                so_far = cache.append(rows[:, first:last])
                yield f"length after {last} rows", cache.length
                yield f"what it returns after {last} rows", so_far
                yield f"the memory that was given, after {last} rows", memory
            for what, new in (
                ("one row too many", rows[:, 5:]),
                ("another batch", rows.repeat(2, 1, 1)[:, :0]),
            ):
                yield f"a ValueError for {what}", refused(cache.append, new)
                yield f"length after {what}", cache.length
                yield f"the memory after {what}", memory
        case "grouped queries":
            yield (
                "shape of rows",
                shape(layer(lab, "gqa").write(vectors(B, T, 40), torch.arange(T), 6)),
            )
            yield from layers(lab, gqa=[6])
        case "the latent and the decoupled key":
            rows = layer(lab, "mla").write(vectors(B, 4, 40), torch.arange(5, 9), 6)
            yield "shape of rows", shape(rows)
            yield "c_KV", rows[..., :14]
            yield "k_R", rows[..., 14:]
        case "latent queries":
            for d_cq, m in itertools.product((22, 0), (6, 4)):
                q_C, q_R = layer(lab, "matmla", d_cq=d_cq).queries(
                    vectors(B, 4, 40), torch.arange(5, 9), m
                )
                yield f"q_C of {m} heads, d_cq = {d_cq}", q_C
                yield f"q_R of {m} heads, d_cq = {d_cq}", q_R
        case "latent attention":
            yield from layers(lab, mla=[6], matmla=[4, 1])
        case "absorption":
            yield from layers(lab, math.inf, mla=[6], matmla=[4, 1])
            a, given = (
                layer(lab, "mla"),
                (vectors(B, 1, 40), vectors(B, 60, 22), torch.tensor([59]), 6),
            )
            cost, naive = operations(a.read_absorbed, *given), operations(a.read, *given)
            yield (
                f"a token after 60 takes {cost} operations, less than half of the naive {naive}",
                2 * cost < naive,
            )
        case "the mixed objective":
            yield from layers(lab, mha=[6], nested_mha=[6, 4, 1], matmla=[6, 4, 1])
            for attention, heads in itertools.product(NESTED, ((4, 6, 1), (6, 6, 1, 1, 4, 6))):
                a, x, what = (
                    layer(lab, attention),
                    vectors(6, T, 40),
                    f"6 sequences of {attention}, heads = {heads}",
                )
                yield what, a(x, heads)
                cache = lab.Cache(x.new_zeros(6, T, a.row_width(6)))
                yield (
                    f"{what}, in chunks",
                    torch.cat([a(chunk, heads, cache) for chunk in x.split([6, 1, 4], 1)], 1),
                )
            for wrong in (7, (4, 7), (4, 4, 4, 4)):
                yield (
                    f"a ValueError for 6 sequences of 6 heads, heads = {wrong}",
                    refused(a, x, wrong),
                )
            a, cache, used = layer(lab, "mla"), lab.Cache(x.new_zeros(6, T, 22)), []
            a.absorb_below, a.read, a.read_absorbed = (
                3,
                *(
                    lambda x, *_, name=name: (used.append(name), x)[1]
                    for name in ("read", "absorbed")
                ),
            )
            for chunk in x.split([3, 2, 6], 1):
                a(chunk, 6, cache)
            yield "how 3, 2, 6 tokens through a cache are read where short is 3", used
            model, runs = make("matmla", lab=lab), []
            model.embed.register_forward_hook(lambda *_: runs.append(1))
            loss = lab.mixed_loss(model, some_tokens(6), some_tokens(6, seed=2), (4, 6, 1))
            yield "mixed_loss with budgets (4, 6, 1)", loss
            yield "how often mixed_loss runs the model", len(runs)
            loss.backward()
            for name, p in model.named_parameters():
                yield f"gradient of {name} through mixed_loss", p.grad
        case "cache arithmetic":
            for attention, m in (
                ("mha", 6),
                ("nested_mha", 4),
                ("gqa", 6),
                ("mla", 6),
                ("matmla", 4),
            ):
                sizes = "n_h = 6, n_kv = 3, d_h = 10, d_c = 14, d_R = 8"
                yield (
                    f"{attention} with {m} heads, where {sizes}",
                    layer(lab, attention).row_width(m),
                )
        case "where absorption stops paying":
            for d_c, d_h in (512, 128), (14, 10), (40, 12), (8, 10), (10, 10):
                yield f"T for d_c = {d_c}, d_h = {d_h}", round(lab.absorb_below(d_c, d_h), 6)
        case "MatMLA at m heads is an MLA":
            model = make("matmla", torch.float32, lab)
            for m in (6, 4, 1):
                small = lab.fixed_heads(model, m)
                yield "attention and n_h of its config", (small.config.attention, small.config.n_h)
                yield f"logits with {m} heads", small(some_tokens())[0]
            for name, p in model.state_dict().items():
                yield f"{name} of the model that was given", p


ANSWERS = exercises.answers()
OBSTACLE = obstacle(ANSWERS.read_text("utf-8-sig"), ANSWERS.name) if ANSWERS.exists() else None


@pytest.mark.parametrize(
    "number", range(0 if OBSTACLE else 1, 1 if OBSTACLE else 15) if ANSWERS.exists() else []
)
def test_exercise(number):
    if OBSTACLE:
        pytest.fail(OBSTACLE, pytrace=False)
    grade(number, ANSWERS.read_text("utf-8-sig"), ANSWERS.name)
