"""
Grade a copy of matmla.py in which exercises.py left blanks.

    python grade.py mine/matmla.py

An exercise is graded in a copy of matmla.py in which only its functions are yours. It is run at
small sizes, and everything that it leaves is compared with what matmla.py leaves: results, types,
gradients, how much is computed. A result that a known mistake leaves is called by its name.
Once all are done, the file as a whole is compared, too. The last line says how many are done; the
exit status is 0 only if all are, and the whole.
"""

import ast
import functools
import inspect
import itertools
import math
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import Parser
from exercises import EXERCISES, MATMLA, definitions
from matmla import GPT, Config, attend

# All sizes differ from each other and from the defaults: what is confused with another is seen.
SIZES = dict(
    vocab_size=37,
    context=29,
    n_layer=2,
    d=40,
    n_h=6,
    n_kv=3,
    d_h=10,
    d_c=34,
    d_cq=22,
    d_R=8,
    d_ff=36,
    budgets=(6, 4, 1),
    rope_base=100.0,
    norm_eps=0.01,
    tie=False,
)
VARIANTS = "mha", "nested_mha", "gqa", "nested_gqa", "mla", "matmla"
B, S = 2, 19  # sequences, tokens
# Relative to the norm. Angles or a softmax in float32 are right, also where all else is in float64.
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.01}
ENOUGH, FEW = 1.25, 1000  # times the operations of matmla.py, and these


# ------------------------------------------------ the answers to what exercises.py adds at the end


def mixed_loss(model, tokens, targets, budgets):
    return model(tokens, targets, heads=tuple(budgets))[1]


def absorb_below(d_c, d_h):
    return d_c * d_h / (d_c - d_h) if d_c > d_h else float("inf")


def fixed_heads(model, m):
    small = GPT(Config(**vars(model.config) | {"attention": "mla", "n_h": m}))
    for name, p in small.state_dict().items():
        p.copy_(model.state_dict()[name][tuple(slice(n) for n in p.shape)])
    return small


def attend_per_token(heads):
    def attend_some(q, k, v, positions, scale):
        o = attend(q, k, v, positions, scale)  # [B,T,n_h,w_v]
        idle = torch.arange(o.shape[2], device=o.device) >= heads[..., None]  # [B,T,n_h]
        return o.masked_fill(idle[..., None], 0)

    return attend_some


ANSWERS = mixed_loss, absorb_below, fixed_heads, attend_per_token
REFERENCE = "\n\n".join([MATMLA.read_text("utf-8"), *map(inspect.getsource, ANSWERS)])
FAR = 10**6  # its lines count from here, so that an error can be told to be in a student's line
OURS = definitions(ast.increment_lineno(ast.parse(REFERENCE), FAR))


# ------------------------------------------------ what is looked at, exercise by exercise


@dataclass
class Finding:
    """Something that a file of answers leaves, and what is wrong with it."""

    what: str  # in words
    value: object
    function: str = ""  # whose it is; else that of the exercise's first function
    step: int = 0  # the place in the order of what is looked at
    problem: str | None = None


class Operations(int):
    """What matrix products take, and products number by number."""


def look(what, owner, function, given):
    """Findings of a call. owner: the module that has the function; given: {name: argument}."""
    numbers = {
        name: x.clone().requires_grad_()
        for name, x in given.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    given = given | numbers
    call = getattr(owner, function)
    name = call.__qualname__
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        result = call(*given.values())
    if name in NAMES and isinstance(result, tuple) and len(result) == len(NAMES[name]):
        result = dict(zip(NAMES[name], result))
    parts = [*result.values()] if isinstance(result, dict) else [result]
    yield Finding(what, result, name)
    yield Finding(f"operations for {what}", Operations(counter.get_total_flops()), name)
    yield Finding(f"whether {what} can be trained", all(x.requires_grad for x in parts), name)

    # Gradients for all weights, and for the numbers that were given.
    modules = [x for x in (owner, *given.values()) if isinstance(x, nn.Module)]
    leaves = dict(itertools.chain(*(x.named_parameters() for x in modules), numbers.items()))
    gradients = torch.autograd.grad(
        parts,
        [*leaves.values()],
        [vectors(*x.shape) for x in parts],
        allow_unused=True,
        materialize_grads=True,
    )
    yield Finding(
        f"gradients in {what} (lost by .data, .detach() or no_grad?)",
        dict(zip(leaves, gradients)),
        name,
    )


NAMES = {"MLA.queries": ("q_C", "q_R"), "GPT.forward": ("logits", "loss")}  # of what is returned

# What the counter does not know: a CPU's kernel for attention, from the shapes of q, k and v, and
# other ways to write a matrix product, such as a product number by number on four axes.
COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])
    ),
    torch.ops.aten.mul: lambda *factors, out_shape: (
        math.prod(out_shape) * (len(out_shape) > 3) * all(isinstance(x, tuple) for x in factors)
    ),
    torch.ops.aten.mv: lambda W, *_, **__: 2 * math.prod(W),
    torch.ops.aten.dot: lambda x, *_, **__: 2 * math.prod(x),
}


def vectors(*shape, seed=0):
    """Normal numbers, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(math.prod(shape) + seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def make_model(lab, attention, **sizes):
    """In float64, with weights that make attention far from uniform, and norms that are not 1."""
    model = lab.GPT(lab.Config(attention=attention, **SIZES | sizes)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(vectors(*p.shape, seed=i) * (0.3 if p.dim() == 2 else 1))
    return model


def make_layer(lab, attention, **sizes):
    return make_model(lab, attention, **sizes).blocks[0].attention


def refusal(function, *arguments):
    """In which error a call ends."""
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__
    return "no error"


def layer_looks(lab, attention, function, budgets, room=6, per_token=False, **sizes):
    """Findings of write, queries or a way to read, for few tokens, one and many.

    room: for how many heads the rows were written. per_token: with attend_per_token.
    """
    layer = make_layer(lab, attention, **sizes)
    if (attention, function) == ("matmla", "write"):
        more, fewer = (layer.write(vectors(B, S, 40), torch.arange(S), m) for m in (6, 3))
        yield Finding("whether rows for 6 and 3 heads are the same", not difference(fewer, more))
    for m, T in itertools.product(budgets, (4, 1, S)):
        what = f"{function} of {attention}, m = {m}{sizes or ''}, for the last {T} of {S} tokens"
        given = {"x": vectors(B, T, 40)}
        if "read" in function:
            given["rows"] = vectors(B, S, layer.row_width(room))
        given |= {"positions": torch.arange(S - T, S), "m": m}
        if per_token:
            heads = torch.arange(B * T).view(B, T) * 5 % 6 + 1
            layer.attend = lab.attend_per_token(heads)
            what += f", heads {heads.tolist()}"
        yield from look(what, layer, function, given)
    if "read" in function:
        layer.attend = lambda *given, **named: -attend(*given, **named)
        yield from look(f"{function} where self.attend is another", layer, function, given)


def layers(*looks, lab):
    """Findings of layers. looks: arguments of layer_looks, by name."""
    for arguments in looks:
        yield from layer_looks(lab, **arguments)


def rope(lab):
    for base, positions in (100.0, [0, 1, 2, 3]), (7.0, [5, 6, 8, 11]):
        yield from look(
            f"x at positions {positions} for base {base:g}",
            lab,
            "rope",
            {"x": vectors(B, 4, 3, 8), "positions": torch.tensor(positions), "base": base},
        )
    ones, late = torch.ones(1, 2, 1, 8, dtype=torch.bfloat16), torch.tensor([1000, 1001])
    yield Finding("x at positions 1000 and 1001 in bfloat16", lab.rope(ones, late, 1e4))


def softmax_attention(lab):
    one_hot = torch.eye(S).double()[None, :, None]  # these values show the softmax weights
    for T, g in (4, 3), (1, 1), (S, 3), (4, 1):
        q, k, positions = vectors(B, T, 6, 24), vectors(B, S, g, 24), torch.arange(S - T, S)
        p = lab.attend(q, k, one_hot.expand(B, S, g, S), positions, 0.3)
        what = f"of the last {T} of {S} tokens, where 6 heads have {g} keys"
        yield Finding(f"shape of the result {what}", None if p is None else shape(p))
        seen = [(row > 0).nonzero().flatten().tolist() for row in p[0, :, 0]]
        yield Finding(f"first and last token seen {what}", [row[:1] + row[-1:] for row in seen])
        given = {"q": q, "k": k, "v": vectors(B, S, g, 7), "positions": positions, "scale": 0.3}
        yield from look(f"the result {what}", lab, "attend", given)
    y = lab.attend(1000 * q, k, given["v"], positions, 0.3)
    yield Finding("the result for scores of thousands", y)


def first_heads(lab):
    W = make_layer(lab, "mla").W_UQ
    for m, width in (6, 10), (4, 10), (1, 10), (2, 15):
        yield from look(
            f"{m} of {60 // width} heads",
            lab,
            "to_heads",
            {"W": W, "x": vectors(B, S, 22), "m": m, "width": width},
        )


def the_cache(lab):
    rows, memory = vectors(B, 6, 7), torch.zeros(B, 5, 7, dtype=torch.float64)
    cache = lab.Cache(memory)
    for first, last in (0, 2), (2, 3), (3, 4):
        so_far = cache.append(rows[:, first:last].requires_grad_())
        returned = None if so_far is None else so_far.clone()  # the cache goes on
        yield Finding(f"what is returned after {last} rows", returned)
        yield Finding(
            f"the cache after {last} rows",
            {"length": cache.length, "memory": memory.clone(), "rows": cache.rows.clone()},
        )
        yield Finding(f"whether gradients are kept after {last} rows", so_far.requires_grad)
    for what, new in (
        ("2 rows, where 2 of 5 are free,", rows[:, :2]),
        ("3 rows, where 2 of 5 are free,", rows[:, :3]),
        ("1 sequence for 2", rows[:1, :2]),
        ("4 sequences for 2", rows[:, :2].repeat(2, 1, 1)),
    ):
        cache = lab.Cache(torch.zeros(B, 5, 7))
        yield Finding(
            "what a float32 cache returns of float64 rows", str(cache.append(rows[:, :3]).dtype)
        )
        yield Finding(f"with which error {what} are refused", refusal(cache.append, new))
        yield Finding(f"the cache after {what}", {"length": cache.length, "rows": cache.rows})


def mixed_objective(lab):
    x = vectors(6, S, 40)
    layer, used = make_layer(lab, "mla"), []
    layer.read = lambda x, *_: used.append("read") or x
    layer.read_absorbed = lambda x, *_: used.append("absorbed") or x
    layer.absorb_below = 3
    cache = lab.Cache(x.new_zeros(6, S, layer.row_width(6)))
    for T in 1, 1, 2, 1, 3, 11:
        layer(x[:, :T], None, cache)
    layer(x[:, :2])
    yield Finding("how 1, 1, 2, 1, 3, 11 tokens with a cache, 2 without, are read below 3", used)

    layer, asked = make_layer(lab, "nested_mha"), []
    row = layer.row_width(4)
    layer.write = lambda x, positions, m: asked.append(m) or x.new_ones(*x.shape[:2], row)
    for cache in lab.Cache(x.new_zeros(6, S, row)), None:
        layer(x, (1, 3, 1), cache)
    yield Finding(
        "heads written for (1, 3, 1), with a cache for 4, then without", [*dict.fromkeys(asked)]
    )

    for attention, heads, room in (
        ("matmla", (4, 6, 1), 6),
        ("matmla", (6, 6, 1, 1, 4, 6), 6),
        ("nested_mha", (4, 6, 1), 6),
        ("nested_mha", (4, 1, 4), 4),
    ):
        layer = make_layer(lab, attention)
        what = f"6 sequences of {attention}, heads {heads}"
        yield from look(what, layer, "forward", {"x": x, "heads": heads})
        cache = lab.Cache(x.new_zeros(6, S, layer.row_width(room)))
        chunks = zip("123", x.split([8, 1, 10], 1), (1, heads, room))
        y = {f"chunk {i}": layer(chunk, budgets, cache) for i, chunk, budgets in chunks}
        yield Finding(f"{what}, in chunks of 8, 1 and 10 tokens, with room for {room} heads", y)

    for heads, room in itertools.product((0, 5, 7, 2.0, (4, 7), (4, 4, 4, 4), ()), (6, 4)):
        cache = lab.Cache(x.new_zeros(6, S, layer.row_width(room)))
        what = f"heads {heads} for 6 sequences, with room for {room} heads,"
        yield Finding(f"with which error {what} are refused", refusal(layer, x, heads, cache))
        yield Finding(f"length of the cache after {what}", cache.length)

    model, runs = make_model(lab, "matmla"), []
    model.embed.register_forward_hook(lambda *_: runs.append(1))
    tokens = vectors(6, S).argsort()
    yield from look(
        "mixed_loss",
        lab,
        "mixed_loss",
        {"model": model, "tokens": tokens, "targets": tokens.flip(0), "budgets": (4, 6, 1)},
    )
    yield Finding("how often mixed_loss runs the model", len(runs), "mixed_loss")


def cache_arithmetic(lab):
    for attention in VARIANTS:
        width = make_layer(lab, attention).row_width
        for m in 6, 3:
            yield Finding(f"row of {attention} for m = {m}", width(m), width.__qualname__)


def where_absorption_stops(lab):
    for d_c, d_h in (512, 128), (14, 10), (40, 12), (8, 10), (10, 10):
        yield Finding(f"T for d_c = {d_c}, d_h = {d_h}", lab.absorb_below(d_c, d_h))


def fewer_heads(lab):
    tokens = vectors(B, S).argsort()
    for m, changes in (6, {}), (4, {"d_cq": 0}), (1, {"tie": True}):
        model = make_model(lab, "matmla", **changes).float()
        small = lab.fixed_heads(model, m)
        what = f"of the model of {m} of 6 heads{changes or ''}"
        yield Finding(f"the type of attention {what}", type(small.blocks[0].attention).__name__)
        yield Finding(f"the config {what}", vars(small.config) | {"budgets": None})
        yield Finding("the model that was given", vars(model.config) | model.state_dict())
        yield Finding(f"the weights {what}", dict(small.named_parameters()))
        yield Finding(
            f"weights that cannot be trained {what}",
            [name for name, p in small.named_parameters() if not p.requires_grad],
        )
        yield Finding(f"logits {what}", small(tokens)[0])
        memory = [{p.untyped_storage().data_ptr() for p in x.parameters()} for x in (model, small)]
        yield Finding("number of weights that both models share", len(memory[0] & memory[1]))


def whole_file(lab):
    tokens = vectors(B, S).argsort()
    for attention in VARIANTS:
        model = make_model(lab, attention)
        heads = (3, 6) if attention in ("nested_mha", "nested_gqa", "matmla") else 6
        what = f"{attention} of the whole file, heads {heads}"
        yield from look(
            what, model, "forward", {"tokens": tokens, "targets": tokens.flip(0), "heads": heads}
        )
        cache = model.new_cache(B, S)
        chunks = zip("123", tokens.split([8, 1, 10], 1))
        y = {f"chunk {i}": model.step(chunk, heads, cache) for i, chunk in chunks}
        yield Finding(f"{what}, with a cache", y)
        text = model.generate(tokens[:, :4], 9, heads, temperature=0)
        yield Finding(f"what {what}, generates", text.tolist())


def run_on_another_device(lab):
    """An error if a tensor of the CPU takes part: the device "meta" is like a GPU without data.

    An answer that looks at a number cannot go on there, which is no mistake.
    """
    for attention in "nested_mha", "nested_gqa", "matmla":
        with torch.device("meta"):
            model = lab.GPT(lab.Config(attention=attention, **SIZES | {"n_layer": 1}))
            tokens, cache = torch.zeros(B, S, dtype=torch.long), model.new_cache(B, S)
        try:
            model(tokens)
            model.step(tokens[:, 1:], None, cache)
            model.step(tokens[:, :1], None, cache)
        except (RuntimeError, NotImplementedError) as error:
            if "expected device" in str(error) or "same device" in str(error):
                raise


LOOKS = [  # in the order of EXERCISES, then at the whole file
    rope,
    softmax_attention,
    first_heads,
    functools.partial(
        layers,
        dict(attention="nested_mha", function="write", budgets=(6, 4, 1)),
        dict(attention="nested_mha", function="read", budgets=(6, 4, 1)),
        dict(attention="nested_mha", function="read", budgets=(4, 1), room=4),
        dict(attention="gqa", function="read", budgets=(6,)),
    ),
    the_cache,
    functools.partial(
        layers,
        dict(attention="nested_gqa", function="write", budgets=(6, 3)),
        dict(attention="gqa", function="read", budgets=(6,)),
    ),
    functools.partial(layers, dict(attention="matmla", function="write", budgets=(6, 4, 1))),
    functools.partial(
        layers,
        dict(attention="matmla", function="queries", budgets=(6, 4, 1)),
        dict(attention="matmla", function="queries", budgets=(4, 1), d_cq=0),
    ),
    functools.partial(layers, dict(attention="matmla", function="read", budgets=(6, 4, 1))),
    functools.partial(
        layers, dict(attention="matmla", function="read_absorbed", budgets=(6, 4, 1))
    ),
    mixed_objective,
    cache_arithmetic,
    where_absorption_stops,
    fewer_heads,
    functools.partial(layers, dict(attention="nested_gqa", function="read", budgets=(6, 3))),
    functools.partial(
        layers,
        dict(attention="matmla", function="read", budgets=(6,), per_token=True),
        dict(attention="matmla", function="read_absorbed", budgets=(6,), per_token=True),
        dict(attention="mha", function="read", budgets=(6,), per_token=True),
    ),
    whole_file,
]


# ------------------------------------------------ the mistakes that are known by what they leave

W_O = "self.W_O.weight[:, : m * self.d_h]", "self.W_O.weight[:, -m * self.d_h :]"
LATENT = "self.norm_KV(self.W_DKV(x))"
KEY = "to_heads(self.W_UK, c_KV, m, self.d_h)"
ALL_SO_FAR = "torch.arange(rows.shape[1]), self.rope_base)"  # positions of the rows

NOT_SELF = {
    "self.attend is not used, though a layer may be given another": ("self.attend(", "attend(")
}
QUERIES_AT_0 = "_Q, x, m, self.d_h), positions", "_Q, x, m, self.d_h), torch.arange(x.shape[1])"
VISIBLE = "visible = torch.arange(S, device=q.device) <= positions[:, None]"
FORMULA = f"""{VISIBLE}
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthw,bshw->bhts", q, k) * scale
    return torch.einsum("bhts,bshw->bthw", SOFTMAX, v)"""

MISTAKES = {  # exercise: {what is wrong: (text of REFERENCE, what stands there instead)}
    1: {
        "pairs are (x0, x4), (x1, x5), ..., not neighbours": (
            "x[..., 0::2], x[..., 1::2]",
            "x.chunk(2, -1); return torch.cat((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1)",
        ),
        "the pairs turn backwards": ("angle.sin()", "-angle.sin()"),
        "the angles do not use `base`": ("base ** (-2 * i", "10000.0 ** (-2 * i"),
        "bfloat16 cannot tell late positions apart": (
            "torch.promote_types(x.dtype, torch.float32)",
            "x.dtype",
        ),
    },
    2: {
        "tokens see those after them": ("<= positions[:, None]", "<= S + 0 * positions[:, None]"),
        "tokens see the one after them": ("<= positions[:, None]", "<= positions[:, None] + 1"),
        "tokens do not see themselves": ("<= positions[:, None]", "< positions[:, None]"),
        "queries stand at 0, 1, ..., not at positions": (
            "<= positions[:, None]",
            "<= torch.arange(T)[:, None]",
        ),
        "the scores are not scaled": ("scale=scale", "scale=1.0"),
        "the scores are scaled by 1/√w, not by `scale`": ("scale=scale", "scale=q.shape[-1]**-0.5"),
        "the scores are divided by `scale`": ("scale=scale", "scale=1 / scale"),
        "softmax runs over the queries, not over the tokens that they see": (
            VISIBLE,
            FORMULA.replace("SOFTMAX", "scores.masked_fill(~visible, -torch.inf).softmax(-2)"),
        ),
        "softmax runs over the heads, not over the tokens that they see": (
            VISIBLE,
            FORMULA.replace("SOFTMAX", "scores.masked_fill(~visible, -torch.inf).softmax(1)"),
        ),
        "the mask comes after softmax, so that the rest is no longer 1": (
            VISIBLE,
            FORMULA.replace("SOFTMAX", "scores.softmax(-1).masked_fill(~visible, 0)"),
        ),
        "heads h, h + g, ... share a key, not neighbours": (
            "q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)\n",
            "q.transpose(1, 2), *(x.transpose(1, 2).repeat(1, 2, 1, 1) for x in (k, v))\n",
        ),
    },
    3: {
        "these are the last heads, not the first": ("[: m * width]", "[-m * width :]"),
        "rows h, h + m, ... are taken for head h, not neighbours": (
            "(m, width))",
            "(width, m)).transpose(-1, -2)",
        ),
        "tokens and heads are mixed": (
            ".unflatten(-1, (m, width))",
            ".reshape(len(x), m, -1, width).transpose(1, 2)",
        ),
    },
    4: {
        "the keys are not turned by RoPE": (
            "_K, x, m, self.d_h), positions",
            "_K, x, m, self.d_h), 0 * positions",
        ),
        "the values are turned by RoPE": (
            "v = to_heads(self.W_V, x, m, self.d_h)",
            "v = rope(to_heads(self.W_V, x, m, self.d_h), positions, self.rope_base)",
        ),
        "all keys stand before all values": (
            "(k, v), -1).flatten(2)",
            "(k.flatten(2), v.flatten(2)), -1)",
        ),
        "a value stands before its key": ("torch.cat((k, v), -1)", "torch.cat((v, k), -1)"),
        "the scores are not scaled: 1/√d_h": ("self.d_h**-0.5", "1.0"),
        "the scale is 1/d_h, not 1/√d_h": ("self.d_h**-0.5", "1 / self.d_h"),
        "the scores are multiplied by √d_h, not divided": ("self.d_h**-0.5", "self.d_h**0.5"),
        "the queries stand at 0, 1, ..., not at positions": QUERIES_AT_0,
        "the queries are not turned by RoPE": (
            "_Q, x, m, self.d_h), positions",
            "_Q, x, m, self.d_h), 0 * positions",
        ),
        "key and value of a head are swapped": (
            "k, v = rows.unflatten(-1, (-1, 2 * self.d_h))",
            "v, k = rows.unflatten(-1, (-1, 2 * self.d_h))",
        ),
        "W_O is cut to its last columns, not its first": W_O,
        **NOT_SELF,
    },
    5: {
        "these are the new rows, not all so far": ("return self.rows[:, :stop]", "return new"),
        "this is the whole memory, not the rows so far": ("self.rows[:, :stop]", "self.rows"),
        "the rows are put together anew, not stored in the memory that is there": (
            "self.rows[:, self.length : stop] = new",
            "self.rows = torch.cat((self.rows[:, : self.length], new), 1)",
        ),
        "these are the last rows of the memory, not the first": ("[:, :stop]", "[:, -stop:]"),
        "rows that fit are refused": ("stop > capacity", "stop >= capacity"),
        "rows that no longer fit are not refused": (
            "stop > capacity",
            "new.shape[1] > capacity",
        ),
        "the new rows are not counted": ("self.length = stop", "pass"),
        "the first rows are overwritten": ("self.length : stop]", ": new.shape[1]]"),
    },
    6: {
        "all keys stand before all values": (
            "positions, self.n_kv)",
            "positions, self.n_kv).unflatten(-1, (-1, 2, self.d_h)).transpose(2, 3).flatten(2)",
        ),
        "every head has a key and value of its own, not every group": (
            "super().write(x, positions, self.n_kv)",
            "super().write(x, positions, self.n_kv).repeat_interleave(m // self.n_kv, -1)",
        ),
        "the row depends on m": ("positions, self.n_kv)", "positions, m // 2)"),
        "a value stands before its key": (
            "positions, self.n_kv)",
            "positions, self.n_kv).unflatten(-1, (-1, 2, self.d_h)).flip(3).flatten(2)",
        ),
        "the keys are not turned by RoPE": ("positions, self.n_kv)", "0 * positions, self.n_kv)"),
    },
    7: {
        "the latent is cached before its norm": (LATENT, "self.W_DKV(x)"),
        "the norm has no weight, unlike norm_KV": (
            LATENT,
            "F.rms_norm(self.W_DKV(x), (self.d_c,), eps=self.norm_KV.eps)",
        ),
        "this norm takes the mean away, unlike norm_KV": (
            LATENT,
            "F.layer_norm(self.W_DKV(x), (self.d_c,), self.norm_KV.weight, eps=self.norm_KV.eps)",
        ),
        "the row depends on m, but no head writes it": (LATENT, LATENT + " * m"),
        "the whole row is turned by RoPE, but the latent must know no position": (
            "torch.cat((c_KV, k_R), -1)",
            "rope(torch.cat((c_KV, self.W_KR(x)), -1)[:, :, None], "
            "positions, self.rope_base).flatten(2)",
        ),
        "the latent is turned by RoPE, but must know no position": (
            LATENT,
            f"rope({LATENT}.unsqueeze(2), positions, self.rope_base).flatten(2)",
        ),
        "k_R is cached before RoPE": ("rope(k_R, positions", "rope(k_R, 0 * positions"),
        "k_R is turned backwards": ("rope(k_R, positions", "rope(k_R, -positions"),
        "k_R is turned twice": ("rope(k_R, positions", "rope(k_R, 2 * positions"),
        "RoPE starts at 0, not at positions[0]": (
            "rope(k_R, positions",
            "rope(k_R, positions - positions[0]",
        ),
        "the base of RoPE is not self.rope_base": (
            "rope(k_R, positions, self.rope_base)",
            "rope(k_R, positions, 10000.0)",
        ),
        "k_R is normed, but only the latent has a norm": (
            "rope(k_R, positions, self.rope_base)",
            "rope(F.rms_norm(k_R, (self.d_R,)), positions, self.rope_base)",
        ),
        "k_R stands before c_KV": ("torch.cat((c_KV, k_R), -1)", "torch.cat((k_R, c_KV), -1)"),
    },
    8: {
        "the latent of the queries is not normed": ("norm_Q(self.W_DQ(x))", "W_DQ(x)"),
        "the norm has no weight, unlike norm_Q": (
            "self.norm_Q(self.W_DQ(x))",
            "F.rms_norm(self.W_DQ(x), (self.W_UQ.weight.shape[1],), eps=self.norm_Q.eps)",
        ),
        "the latent is turned by RoPE, but must know no position": (
            "self.norm_Q(self.W_DQ(x))",
            "rope(self.norm_Q(self.W_DQ(x)).unsqueeze(2), positions, self.rope_base).flatten(2)",
        ),
        "q_R is not turned by RoPE": ("rope(q_R, positions", "rope(q_R, 0 * positions"),
        "q_R is turned backwards": ("rope(q_R, positions", "rope(q_R, -positions"),
        "RoPE starts at 0, not at positions[0]": (
            "rope(q_R, positions",
            "rope(q_R, positions - positions[0]",
        ),
        "the base of RoPE is not self.rope_base": (
            "rope(q_R, positions, self.rope_base)",
            "rope(q_R, positions, 10000.0)",
        ),
        "q_C is turned by RoPE, too": (
            "return q_C, rope",
            "return rope(q_C, positions, self.rope_base), rope",
        ),
        "q_R comes before q_C": (
            "return q_C, rope(q_R, positions, self.rope_base)",
            "return rope(q_R, positions, self.rope_base), q_C",
        ),
        "these are the last heads of W_UQ, not the first": (
            "to_heads(self.W_UQ, c_Q, m, self.d_h)",
            "to_heads(self.W_UQ, c_Q, self.n_h, self.d_h)[:, :, -m:]",
        ),
        "all heads have the q_R of the first": (
            "to_heads(self.W_QR, c_Q, m, self.d_R)",
            "to_heads(self.W_QR, c_Q, 1, self.d_R).expand(-1, -1, m, -1)",
        ),
        "the queries are scaled, which `attend` does": (
            "return q_C, ",
            "return q_C * self.scale, ",
        ),
    },
    9: {
        "the scale is 1/√d_h, not 1/√(d_h + d_R)": (
            "v_C, positions, self.scale",
            "v_C, positions, self.d_h**-0.5",
        ),
        "the scores are not scaled": ("v_C, positions, self.scale", "v_C, positions, 1.0"),
        "the scale lacks the root: it is 1/√(d_h + d_R)": (", self.scale", ", self.scale**2"),
        "the scores are multiplied by √(d_h + d_R), not divided": (
            ", self.scale",
            ", 1 / self.scale",
        ),
        "k_R is turned by RoPE again, though it was before it was cached": (
            "k_R.unsqueeze(2)",
            "rope(k_R.unsqueeze(2), " + ALL_SO_FAR,
        ),
        "the latent is turned by RoPE, but must know no position": (
            "k_C = ",
            "c_KV = rope(c_KV.unsqueeze(2), " + ALL_SO_FAR + ".flatten(2); k_C = ",
        ),
        "k_C is turned by RoPE": (KEY, f"rope({KEY}, {ALL_SO_FAR}"),
        "the whole key is turned by RoPE": (
            "torch.cat((k_C, k_R), -1)",
            "rope(torch.cat((k_C, k_R), -1), " + ALL_SO_FAR,
        ),
        "q_C is turned by RoPE": (
            "q = torch.cat(self.queries(x, positions, m), -1)",
            "q_C, q_R = self.queries(x, positions, m); "
            "q = torch.cat((rope(q_C, positions, self.rope_base), q_R), -1)",
        ),
        "q_R is turned by RoPE again": (
            "q = torch.cat(self.queries(x, positions, m), -1)",
            "q_C, q_R = self.queries(x, positions, m); "
            "q = torch.cat((q_C, rope(q_R, positions, self.rope_base)), -1)",
        ),
        "k_C and v_C are swapped": (
            "k = torch.cat((k_C, k_R), -1)",
            "k_C, v_C = v_C, k_C; k = torch.cat((k_C, k_R), -1)",
        ),
        "the scores know no position: k_R is missing": ("k_R.unsqueeze(2)", "0 * k_R.unsqueeze(2)"),
        "c_KV is normed again, though it was before it was cached": (
            "k_C = ",
            "c_KV = self.norm_KV(c_KV); k_C = ",
        ),
        "these are the last heads of W_UK, not the first": (
            KEY,
            "to_heads(self.W_UK, c_KV, self.n_h, self.d_h)[:, :, -m:]",
        ),
        "W_O is cut to its last columns, not its first": W_O,
        **NOT_SELF,
    },
    10: {
        "the scale is 1/√(d_c + d_R), not 1/√(d_h + d_R)": (", self.scale", ", q.shape[-1]**-0.5"),
        "the scale is 1/√d_h, not 1/√(d_h + d_R)": (", self.scale", ", self.d_h**-0.5"),
        "the scores are not scaled": (", self.scale", ", 1.0"),
        "the scale lacks the root: it is 1/√(d_h + d_R)": (", self.scale", ", self.scale**2"),
        "the scores are multiplied by √(d_h + d_R), not divided": (
            ", self.scale",
            ", 1 / self.scale",
        ),
        "W_UK and W_UV are swapped": ("q_latent = ", "W_UK, W_UV = W_UV, W_UK; q_latent = "),
        "the query goes into the latent through W_UV, not W_UK": (
            'bthc", q_C, W_UK',
            'bthc", q_C, W_UV',
        ),
        "what was read leaves the latent through W_UK, not W_UV": (
            'bthd", o, W_UV',
            'bthd", o, W_UK',
        ),
        "the query in the latent is turned by RoPE": (
            "(q_latent, q_R)",
            "(rope(q_latent, positions, self.rope_base), q_R)",
        ),
        "q_C is turned by RoPE": (
            'bthc", q_C, W_UK',
            'bthc", rope(q_C, positions, self.rope_base), W_UK',
        ),
        "the rows are turned by RoPE, but k_R was already, and the latent must not be": (
            "rows.unsqueeze(2)",
            "rope(rows.unsqueeze(2), " + ALL_SO_FAR,
        ),
        "the scores know no position: q_R is missing": ("(q_latent, q_R)", "(q_latent, 0 * q_R)"),
        "q_R stands before the query in the latent, but k_R stands behind c_KV": (
            "(q_latent, q_R)",
            "(q_R, q_latent)",
        ),
        "c_KV is normed again, though it was before it was cached": (
            "rows.unsqueeze(2)",
            "torch.cat((self.norm_KV(rows[..., : self.d_c]), rows[..., self.d_c :]), -1)"
            ".unsqueeze(2)",
        ),
        "rows h, h + n_h, ... of W_UK are taken for head h, not neighbours": (
            "W_UK = self.W_UK.weight.unflatten(0, (-1, self.d_h))[:m]",
            "W_UK = self.W_UK.weight.unflatten(0, (self.d_h, -1)).transpose(0, 1)[:m]",
        ),
        "these are the last heads, not the first": ("d_h))[:m]", "d_h))[-m:]"),
        "W_O is cut to its last columns, not its first": W_O,
        **NOT_SELF,
        "keys and values are made after all": (
            "q_C, q_R = self.queries(x, positions, m)\n",
            "return self.read(x, rows, positions, m)\n",
        ),
        "values are made after all, though no keys": (
            "k = rows.unsqueeze(2)",
            "k = rows.unsqueeze(2).expand(-1, -1, m, -1); "
            "v = to_heads(self.W_UV, rows[..., : self.d_c], m, self.d_h); "
            "o = self.attend(q, k, v, positions, self.scale).flatten(2); "
            "return F.linear(o, self.W_O.weight[:, : m * self.d_h])",
        ),
        "W_UQ and W_UK are multiplied at every call": (
            "q_latent = ",
            "W_UQ = self.W_UQ.weight.unflatten(0, (-1, self.d_h))[:m]; "
            'W = torch.einsum("hdj,hdc->hjc", W_UQ, W_UK); '
            'q_latent = torch.einsum("btj,hjc->bthc", self.norm_Q(self.W_DQ(x)), W)  #',
        ),
    },
    11: {
        "all parts are read with the budget of the first": (
            "rows[first:last], positions, m)",
            "rows[first:last], positions, budgets[0])",
        ),
        "the parts are put together in another order": ("cat(parts)", "cat(parts[::-1])"),
        "all parts read the rows of the first sequences": (
            "rows[first:last]",
            "rows[: last - first]",
        ),
        "with a cache, positions start at 0, not at its length": (
            "(cache.length if cache else 0)",
            "0",
        ),
        "positions start where the new tokens end": (
            "(cache.length if cache else 0)",
            "(cache.length + x.shape[1] if cache else 0)",
        ),
        "only the new rows are read, not all so far": (
            "rows = cache.append(rows) if cache else rows",
            "cache and cache.append(rows)",
        ),
        "as many tokens as absorb_below are read absorbed, not only fewer": (
            "x.shape[1] < self.absorb_below",
            "x.shape[1] <= self.absorb_below",
        ),
        "any number of tokens is read absorbed, not only fewer than absorb_below": (
            "cache and x.shape[1] < self.absorb_below",
            "cache",
        ),
        "few tokens are read absorbed even without a cache": (
            "cache and x.shape[1] < self.absorb_below",
            "x.shape[1] < self.absorb_below",
        ),
        "only a single token is read absorbed, not all that are fewer than absorb_below": (
            "x.shape[1] < self.absorb_below",
            "x.shape[1] == 1",
        ),
        "the tokens in the cache decide how to read, not how many are new": (
            "x.shape[1] < self.absorb_below",
            "rows.shape[1] < self.absorb_below",
        ),
        "rows are written for all heads, also into a cache that has room for fewer": (
            "self.room(cache) if cache",
            "self.n_h if cache",
        ),
        "the cache gets rows of the largest budget, not of its room": (
            "self.room(cache) if cache else max",
            "max",
        ),
        "rows are written for all heads, also those that no budget reads": (
            "max(budgets)",
            "self.n_h",
        ),
        "nothing is read absorbed, not even few tokens with a cache": (
            "self.read_absorbed if cache and x.shape[1] < self.absorb_below else self.read",
            "self.read",
        ),
        "this is the sum of the parts' losses, not their mean": (
            "return model(",
            "return len(budgets) * model(",
        ),
        "the model runs for every part, not once for all": (
            "model(tokens, targets, heads=tuple(budgets))[1]",
            "sum(model(*x, m)[1] / 3 for *x, m in zip(tokens.split(2), targets.split(2), budgets))",
        ),
        "all parts are read with all heads": (", heads=tuple(budgets))[1]", ")[1]"),
    },
    12: {
        "a head leaves a key and a value, not one of them": ("return m * 2 *", "return m *"),
        "heads leave keys and values here, not groups": ("return self.n_kv * 2", "return m * 2"),
        "a group leaves a key and a value, not one of them": (
            "return self.n_kv * 2 *",
            "return self.n_kv *",
        ),
        "k_R is missing, which is cached, too": ("return self.d_c + self.d_R", "return self.d_c"),
        "the row depends on m, but no head writes it": (
            "return self.d_c + self.d_R",
            "return self.d_c * m // self.n_h + self.d_R",
        ),
    },
    13: {
        "only one of k_C and v_C is made, not both": ("/ (d_c - d_h)", "/ (d_c - d_h) / 2"),
        "only scores or sums are counted, not both": ("/ (d_c - d_h)", "/ (d_c - d_h) * 2"),
        "nothing is counted for the use of k_C and v_C": ("d_c * d_h / (d_c - d_h)", "float(d_h)"),
        "for a latent no wider than a head, absorbed is always the cheaper": (
            'float("inf")',
            "0.0",
        ),
    },
    14: {
        "these are the last heads, not the first": ("slice(n) for", "slice(-n, None) for"),
        "W_O is cut to its last columns, not its first": (
            "slice(n) for",
            "slice(*(-n, None) if 'W_O' in name else (n,)) for",
        ),
        "the weights of the norms are not copied": ("p.copy_(", "p.dim() == 2 and p.copy_("),
    },
    15: {
        "the queries stand at 0, 1, ..., not at positions": QUERIES_AT_0,
        "neighbouring heads read one group, not heads h, h + n_kv, ...": (
            "        q = q.unflatten(2, (-1, self.n_kv)).transpose(2, 3).flatten(2, 3)",
            "        return MHA.read(self, x, rows, positions, m)",
        ),
        "what was read is in the order of groups, not of heads as W_O wants it": (
            "o = o.unflatten(2, (self.n_kv, -1)).transpose(2, 3)",
            "o",
        ),
        "the queries are not turned by RoPE": (
            "_Q, x, m, self.d_h), positions",
            "_Q, x, m, self.d_h), 0 * positions",
        ),
        "key and value of a group are swapped": (
            "k, v = rows.unflatten(-1, (-1, 2 * self.d_h))",
            "v, k = rows.unflatten(-1, (-1, 2 * self.d_h))",
        ),
        "W_O is cut to its last columns, not its first": W_O,
        **NOT_SELF,
    },
    16: {
        "one head too many works": (">= heads[..., None]", "> heads[..., None]"),
        "the first heads are idle, not the last": (">= heads[..., None]", "< heads[..., None]"),
        "queries of idle heads are zero, so these still read the mean of all values": (
            "        o = attend(q, k, v, positions, scale)",
            "        some = torch.arange(q.shape[2]) < heads[..., None]\n"
            "        return attend(q * some[..., None], k, v, positions, scale)",
        ),
        "all tokens have the budget of the first": (
            "heads[..., None]  #",
            "heads[:, :1, None]  #",
        ),
    },
}


# ------------------------------------------------ grading


def grade(number, answers, file):
    """What to say about an exercise: "done", or where it is wrong, and what is.

    number: of the exercise, or one more for the whole file. answers: the text of the file, or its
    bytes. file: its name.
    """
    functions = [*EXERCISES.values(), OURS][number - 1]
    tree = ast.parse(answers)
    lines = {name: node.lineno for name, node in definitions(tree).items()}
    line = min(lines[name] for name in functions)
    try:
        wrong = first_wrong(number, load(graft(tree, functions), file))
    except (Exception, SystemExit) as error:
        return in_their_line(error, file, line)
    if not wrong:
        return "done"
    line = lines[wrong.function] if wrong.function in functions else line
    for mistake in MISTAKES.get(number, ()):
        known = mistaken(number, mistake)
        if known and known.step == wrong.step and alike(known.value, wrong.value):
            return f"{file}:{line}: {mistake}. Seen in {wrong.what}: {wrong.problem}"
    return f"{file}:{line}: {wrong.what}: {wrong.problem}"


def first_wrong(number, lab):
    """The first Finding that differs from that of REFERENCE, or None."""
    findings = LOOKS[number - 1](lab=lab)
    for step, (found, right) in enumerate(zip(findings, expected(number))):
        found.step, found.problem = step, difference(found.value, right.value)
        if found.problem:
            return found
    run_on_another_device(lab)
    return None


@functools.cache
def expected(number):
    return [*LOOKS[number - 1](lab=load(REFERENCE))]


@functools.cache
def mistaken(number, mistake):
    """The first wrong Finding of REFERENCE with this mistake in it; None if an error comes."""
    try:
        return first_wrong(number, load(REFERENCE.replace(*MISTAKES[number][mistake])))
    except Exception:
        return None


def load(source, file="matmla.py"):
    """A module of this source, a text or a syntax tree."""
    module = types.ModuleType("matmla")
    exec(compile(source, file, "exec"), vars(module))
    return module


def graft(tree, names):
    """Make all of a student's syntax tree OURS, except the functions `names` and what is new."""
    theirs = definitions(tree)
    for name, ours in OURS.items():
        fields = dict(vars(ours))
        if isinstance(ours, ast.ClassDef):
            # Its methods are names of their own. Of two values of a class, the second counts.
            values = [line for line in ours.body if not isinstance(line, ast.FunctionDef)]
            fields["body"] = theirs[name].body + values
        if name not in names:
            vars(theirs[name]).update(fields)
    return tree


def difference(found, right):
    """What is wrong with `found`, in words, or None."""
    if found is None and right is not None:
        return "nothing was returned; is a `return` missing?"
    if type(found) is not type(right) or shape(found) != shape(right):
        return f"{in_words(found)}, but {in_words(right)} is right"
    if isinstance(right, dict):
        problems = {name: difference(found[name], right[name]) for name in right}
        return next((f"{name}: {problem}" for name, problem in problems.items() if problem), None)
    if isinstance(right, Tensor):
        return tensor_difference(found.detach().double(), right.detach().double(), right.dtype)
    if isinstance(right, Operations):
        too_many = f"{found}, but {right} are enough; is something computed that is not used?"
        return too_many if found > ENOUGH * right + FEW else None
    same = math.isclose(found, right) if isinstance(right, float) else found == right
    return None if same else f"{in_words(found)}, but {in_words(right)} is right"


def alike(known, wrong):
    """Whether one mistake can have left both."""
    return known == wrong if isinstance(known, Operations) else not difference(known, wrong)


def tensor_difference(found, right, dtype):
    """The same for tensors of one shape, computed in this dtype."""
    off = ((found - right).norm() / right.norm()).item() if found.ne(right).any() else 0
    if off < CLOSE[dtype]:
        return None
    if not found.dim():
        return f"{found:.6g}, but {right:.6g} is right"
    if not found.any():
        return "all zeros"
    # More than they may be off in the mean; or nan.
    wrong = ~((found - right).abs() < CLOSE[dtype] * right.square().mean().sqrt())
    where = []
    for axis, name in enumerate(("sequence", "token", "head")[: found.dim() - 1]):
        places = wrong.transpose(0, axis).flatten(1).any(1).nonzero().flatten().tolist()
        if len(places) < found.shape[axis]:
            where.append(f"{name} {', '.join(map(str, places))}")
    return f"off by {off:.1e}, in {' and '.join(where) or 'every token'}"


def shape(x):
    """What two values must share to be compared number by number."""
    if isinstance(x, (dict, tuple)):
        return [*x] if isinstance(x, dict) else [len(x)]
    return [*x.shape, x.dtype] if isinstance(x, Tensor) else []


def in_words(x):
    """A value in a few words."""
    words = " and ".join(x) if isinstance(x, dict) else f"{type(x).__name__} {shape(x) or x}"
    return " ".join(words.split())[:90]


def in_their_line(error, file, line=1):
    """An error of a student's file, with the last line of theirs on its way; else with this one."""
    message = " ".join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
    if isinstance(error, NotImplementedError):
        message = "still to be written"
    if " meta" in message:  # see run_on_another_device
        message += " (on another device: is every tensor made with device=x.device?)"
    frames = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
    theirs = [number for number in frames if number < FAR]
    if isinstance(error, SyntaxError):
        theirs.append(error.lineno)
    if frames and frames[-1] > FAR:
        here = "in what this line calls" if theirs else "where matmla.py uses what this returned"
        message += f", {here}"
    return f"{file}:{[line, *theirs][-1]}: {message}"


def obstacle(answers, file):
    """Why the file cannot be graded at all, in one line, or None."""
    try:
        load(answers, file)
    except (Exception, SystemExit) as error:
        return in_their_line(error, file)
    gone = OURS.keys() - definitions(ast.parse(answers)).keys()
    return f"{file}: {', '.join(sorted(gone))} must stay" if gone else None


def grade_file(path):
    """Print the grade of every exercise. Returns the exit status: 0 if all are done, else 1."""
    answers = path.read_bytes()
    problem = obstacle(answers, str(path))
    if problem:
        print(problem)
    done = 0
    for number, title in enumerate([] if problem else EXERCISES, 1):
        said = grade(number, answers, str(path))
        print(f"{number}. {title}: {said}", flush=True)
        done += said == "done"
    said = grade(len(LOOKS), answers, str(path)) if done == len(EXERCISES) else ""
    but = f", but not the file as a whole: {said}" if said not in ("done", "") else ""
    print(f"{done} of {len(EXERCISES)} done{but}", flush=True)
    return 0 if said == "done" else 1


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", nargs="?", type=Path, default="mine/matmla.py", help="to grade")
    parser.exit(parser.run(grade_file, parser.parse_args().file))


if __name__ == "__main__":
    main()
