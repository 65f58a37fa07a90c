"""How a file of answers is read, compared with matmla.py, and which mistakes are known by their result."""

import ast
import functools
import traceback
import types

import torch

import exercises

AT_THE_END = '''

def mixed_loss(model, tokens, targets, budgets):
    return model(tokens, targets, heads=tuple(budgets))[1]


def absorb_below(d_c, d_h):
    return d_c * d_h / (d_c - d_h) if d_c > d_h else float("inf")


def fixed_heads(model, m):
    small = GPT(Config(**vars(model.config) | {"attention": "mla", "n_h": m}))
    state = model.state_dict()
    for name, p in small.state_dict().items():
        p.copy_(state[name][tuple(slice(n) for n in p.shape)])
    return small
'''
REFERENCE = (exercises.HERE / "matmla.py").read_text("utf-8") + AT_THE_END
FAR = 10**6    # lines of the reference count from here, so that an error can be told to be in a student's line


def graft(answers, names):
    """A student's syntax tree, in which everything but the functions `names` and new ones is the reference's."""
    tree, reference = ast.parse(answers), ast.increment_lineno(ast.parse(REFERENCE), FAR)
    theirs, ours = exercises.definitions(tree), exercises.definitions(reference)
    for name, node in ours.items():
        if isinstance(node, ast.ClassDef):
            own = [getattr(inner, "name", "") for inner in node.body]
            new = [inner for inner in theirs[name].body if getattr(inner, "name", "") not in [*own, ""]]
            kept = [theirs[f"{name}.{n}"] if f"{name}.{n}" in names else inner for n, inner in zip(own, node.body)]
            vars(theirs[name]).update(vars(node), body=kept + new)
        elif "." not in name and name not in names:
            vars(theirs[name]).update(vars(node))
    return tree


@functools.lru_cache
def load(source, file="matmla.py"):
    module = types.ModuleType("matmla")
    exec(compile(source, file, "exec"), vars(module))
    return module


def obstacle(answers, file):
    """Why the file cannot be graded at all, in one line, or None."""
    try:
        load(answers, file)
        gone = exercises.definitions(ast.parse(REFERENCE)).keys() - exercises.definitions(ast.parse(answers))
        return f"{file}:1: {', '.join(sorted(gone))} must stay" if gone else None
    except Exception as failure:
        lines = [frame.lineno for frame in traceback.extract_tb(failure.__traceback__) if frame.filename == file]
        line = getattr(failure, "lineno", None) or (lines or [1])[-1]
        return f"{file}:{line}: {type(failure).__name__}: {getattr(failure, 'msg', failure)}"


def difference(found, expected):
    """What is wrong with `found`, or None."""
    if not isinstance(expected, torch.Tensor):
        return None if found == expected else "not so" if expected is True else f"{found}, but {expected} is right"
    if not isinstance(found, torch.Tensor):
        return f"{found}, but a tensor is right"
    if found.shape != expected.shape:
        return f"the shape is {list(found.shape)}, but {list(expected.shape)} is right"
    if found.dtype != expected.dtype:
        return f"the dtype is {found.dtype}, but {expected.dtype} is right"
    a, b = found.double(), expected.double()
    off = ((a - b).norm() / b.norm()).item() if a.ne(b).any() else 0
    if off < {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.01}[expected.dtype]:
        return None
    factor = ((a * b).sum() / (b * b).sum()).item()
    if off < 1e-6:
        return f"off by {off:.1e}, as if it were computed in float32"
    if (a - factor * b).norm() < 1e-6 * a.norm():
        return f"it is {factor:.4g} times what is right"
    wrong = (a - b).abs() > 1e-6
    where = []
    for axis, name in enumerate(("sequence", "token", "head")[: a.dim() - 1]):
        places = wrong.transpose(0, axis).flatten(1).any(1).nonzero().flatten().tolist()
        where += [f"{name} {', '.join(map(str, places))}"] if len(places) < a.shape[axis] else []
    return f"off by {off:.1e}, in {' and '.join(where) or 'every token'}"


def edited(text, edits):
    """The text with edits, which are: old, new, old, new, ..."""
    for old, new in zip(edits[::2], edits[1::2]):
        assert old in text, f"matmla.py no longer says: {old}"
        text = text.replace(old, new)
    return text


# Known mistakes. First another way to write attend, which is right until it is edited.
ATTEND = '''def attend(q, k, v, positions, scale):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthw,bshw->bhts", q, k) * scale
    past = torch.arange(k.shape[1]) <= positions[:, None]
    return torch.einsum("bhts,bshw->bthw", scores.masked_fill(~past, -torch.inf).softmax(-1), v)


'''


def attend(old, new):
    """Edits that put another attend, itself edited, behind that of matmla.py."""
    assert old in ATTEND
    return "def to_heads(", ATTEND.replace(old, new) + "def to_heads("


LAST, LAST_COLUMNS = "these are the last heads, not the first", "W_O is cut to its last columns, not its first"
PAIRS = "pairs are (x0, x1), (x2, x3), ..., not (x0, x4), (x1, x5), ..."
SCALE = "the softmax scale is 1/√(d_h + d_R), not "
X_K, X_Q, X_V = (f"to_heads(self.W_{name}, x, m, self.d_h)" for name in "KQV")
TURNED = "rope({}, positions, self.rope_base)"
NEIGHBOURS, TURN = "x[..., 0::2], x[..., 1::2]", "x1 * cos), -1).flatten(-2)"
MHA_READ, MLA_READ = "(q, k, v, positions, self.d_h**-0.5)", "(q, k, v_C, positions, self.scale)"
ABSORBED = ": self.d_c], positions, self.scale"
GROUPS = "write(x, positions, self.n_kv)"
C_KV, K_R = "self.norm_KV(self.W_DKV(x))", "rope(k_R, positions, self.rope_base).flatten(2)"
Q_C, Q_R = "to_heads(self.W_UQ, c_Q, m, self.d_h)", "to_heads(self.W_QR, c_Q, m, self.d_R)"
K_C, V_C = "to_heads(self.W_UK, c_KV, m, self.d_h)", "to_heads(self.W_UV, c_KV, m, self.d_h)"
OUT, LAST_OUT = "self.W_O.weight[:, : m * self.d_h]", "self.W_O.weight[:, -m * self.d_h :]"
CHECK, LOSS = "self.check(heads, len(x), most)", "model(tokens, targets, heads=tuple(budgets))[1]"
PARTS = "zip(*(x.chunk(len(budgets)) for x in (tokens, targets)), budgets)"
STORE, RETURN = "self.rows[:, self.length : stop] = new", "return self.rows[:, :stop]"
MHA_NUMBERS, GQA_NUMBERS = "return m * 2 * self.d_h", "return self.n_kv * 2 * self.d_h"
MLA_NUMBERS = "return self.d_c + self.d_R"
BELOW = "return d_c * d_h / (d_c - d_h) if"
COPY = "p.copy_(state[name][tuple(slice(n) for n in p.shape)])"

WRONG = {    # exercise: [(what is wrong, text of matmla.py, what stands there instead, and so on)]
    1: [
        (PAIRS, NEIGHBOURS, "x.chunk(2, -1)", TURN, TURN.replace("-1)", "-2)")),
        (PAIRS, NEIGHBOURS, "x.chunk(2, -1)"),
        ("the pairs turn backwards", "angle.sin()", "-angle.sin()"),
        ("bfloat16 cannot tell late positions apart", "torch.promote_types(x.dtype, torch.float32)", "x.dtype",
         "positions[:, None, None] *", "positions[:, None, None].to(dtype) *"),
        ("it is computed in float32, but x is float64", "torch.promote_types(x.dtype, torch.float32)", "torch.float32"),
        ("the exponent of the base is -2i/n", "(-2 * i /", "(-i /"),
    ],
    2: [
        ("tokens see those after them", *attend("scores.masked_fill(~past, -torch.inf)", "scores")),
        ("tokens see the one after them", *attend("<= positions[:, None]", "<= positions[:, None] + 1")),
        ("tokens do not see themselves", *attend("<= positions[:, None]", "< positions[:, None].clamp(min=1)")),
        ("queries stand at positions, not at 0, 1, ...", *attend("positions[:", "torch.arange(q.shape[1])[:")),
        ("heads take keys in turn, but neighbours share one", *attend("repeat_interleave(q.shape[2] // x.shape[2], 2)",
                                                                     "repeat(1, 1, q.shape[2] // x.shape[2], 1)")),
        ("scores are not scaled", *attend(" * scale", "")),
        ("softmax goes over the queries, not the keys", *attend(".softmax(-1)", ".softmax(-2)")),
    ],
    3: [
        (LAST, "W.weight[: m * width]", "W.weight[-m * width :]"),
        ("the rows of a head lie next to each other", "(m, width))", "(width, m)).transpose(-1, -2)"),
        ("heads that were not asked for are computed", "W.weight[: m * width]).unflatten(-1, (m, width))",
         "W.weight).unflatten(-1, (-1, width))[:, :, :m]"),
    ],
    4: [
        ("the keys are not turned by RoPE", TURNED.format(X_K), X_K),
        ("the queries are not turned by RoPE", TURNED.format(X_Q), X_Q),
        ("the values are turned by RoPE", X_V, TURNED.format(X_V)),
        ("the softmax scale is 1/√d_h, not 1", MHA_READ, MHA_READ.replace("self.d_h**-0.5", "1.0")),
        ("key and value are swapped", "torch.cat((k, v), -1)", "torch.cat((v, k), -1)"),
        (LAST_COLUMNS, OUT, LAST_OUT),
        ("the last heads of a row are read, not the first", "[..., : self.numbers(m)]", "[..., -self.numbers(m) :]"),
    ],
    5: [
        ("these are the new rows, not all so far", RETURN, "return new"),
        ("the new rows are not counted", "        self.length = stop\n", ""),
        ("the first rows are overwritten", STORE, "self.rows[:, : new.shape[1]] = new"),
        ("this is the whole memory, also what is not in use", RETURN, "return self.rows"),
        ("the rows lie in new memory", STORE, "self.rows = self.rows.clone(); " + STORE),
    ],
    6: [
        ("all keys stand before all values", GROUPS,
         GROUPS + ".unflatten(-1, (-1, 2, self.d_h)).transpose(2, 3).flatten(2)"),
        ("the value stands before its key", GROUPS, GROUPS + ".unflatten(-1, (-1, 2, self.d_h)).flip(3).flatten(2)"),
        ("heads are to share keys and values, but each has its own", GROUPS,
         GROUPS + ".unflatten(-1, (self.n_kv, -1)).repeat_interleave(m // self.n_kv, 2).flatten(2)"),
        ("the keys are not turned by RoPE", GROUPS, "write(x, 0 * positions, self.n_kv)"),
    ],
    7: [
        ("the latent is cached before its norm", C_KV, "self.W_DKV(x)"),
        ("k_R is cached before RoPE", K_R, "k_R.flatten(2)"),
        ("RoPE starts at 0, not at the tokens' positions", K_R, K_R.replace("positions", "positions - positions[0]")),
        ("k_R stands before c_KV", "torch.cat((c_KV, k_R), -1) ", "torch.cat((k_R, c_KV), -1) "),
        ("the latent is turned by RoPE, too", C_KV, TURNED.format(f"{C_KV}[:, :, None]") + "[:, :, 0]"),
    ],
    8: [
        ("the latent of the queries is not normed", "self.norm_Q(self.W_DQ(x))", "self.W_DQ(x)"),
        ("q_R is not turned by RoPE", "return q_C, rope(q_R, positions, self.rope_base)", "return q_C, q_R"),
        ("q_C is turned by RoPE, too", "return q_C, rope(", "return rope(q_C, positions, self.rope_base), rope("),
        (LAST, Q_C, Q_C.replace(" m,", " self.n_h,") + "[:, :, -m:]"),
        (LAST, Q_R, Q_R.replace(" m,", " self.n_h,") + "[:, :, -m:]"),
    ],
    9: [
        (SCALE + "1/√d_h", MLA_READ, MLA_READ.replace("self.scale", "self.d_h**-0.5")),
        (SCALE + "1", MLA_READ, MLA_READ.replace("self.scale", "1.0")),
        ("the latent is normed again", *(x for W in (K_C, V_C) for x in (W, W.replace("c_KV", "self.norm_KV(c_KV)")))),
        ("k_R is turned by RoPE again, though it was before it was cached", "k_R = k_R.unsqueeze(2)",
         "k_R = rope(k_R.unsqueeze(2), torch.arange(rows.shape[1]), self.rope_base)"),
        ("keys are of the last heads, not of the first", K_C, K_C.replace(" m,", " self.n_h,") + "[:, :, -m:]"),
        (LAST_COLUMNS, OUT, LAST_OUT),
    ],
    10: [
        (SCALE + "1/√(d_c + d_R), here too", ABSORBED, ABSORBED.replace("self.scale", "(self.d_c + self.d_R)**-0.5")),
        (SCALE + "1/√d_h, here too", ABSORBED, ABSORBED.replace("self.scale", "self.d_h**-0.5")),
        ("the query goes into the latent through W_UK, not W_UV", "q_C, W_UK)", "q_C, W_UV)"),
        ("what was read comes out of the latent through W_UV, not W_UK", "o, W_UV)", "o, W_UK)"),
        (LAST, "(-1, self.d_h))[:m]", "(-1, self.d_h))[-m:]"),
    ],
    11: [
        ("with a cache, positions go on from its length", "(cache.length if cache else 0)", "0"),
        ("every part is read with the largest budget", CHECK, f"(max({CHECK}),)"),
        ("every part is read with the first budget", CHECK, f"{CHECK}[:1]"),
        ("the parts come back in another order", "torch.cat(parts)", "torch.cat(parts[::-1])"),
        ("this is the sum of the parts' losses, not their mean", LOSS, f"len(budgets) * {LOSS}"),
        ("every part is read with the first budget", LOSS, "model(tokens, targets, heads=budgets[0])[1]"),
        ("the model runs once for every part", LOSS, f"sum(model(*x, m)[1] / len(budgets) for *x, m in {PARTS})"),
    ],
    12: [
        ("a head leaves its key, and its value", MHA_NUMBERS, "return m * self.d_h"),
        ("of m heads, m leave something", MHA_NUMBERS, "return self.n_h * 2 * self.d_h"),
        ("groups leave keys and values, not heads", GQA_NUMBERS, "return m * 2 * self.d_h"),
        ("k_R is cached, too", MLA_NUMBERS, "return self.d_c"),
        ("all heads share one latent", MLA_NUMBERS, "return m * (self.d_c + self.d_R)"),
        ("keys and values share one latent", MLA_NUMBERS, "return 2 * self.d_c + self.d_R"),
    ],
    13: [
        ("both k_C and v_C have to be made", BELOW, BELOW.replace(" if", " / 2 if")),
        ("scores and sums are to be counted, whichever way", BELOW, BELOW.replace(" if", " * 2 if")),
        ("keys and values have to be used, too, once they are made", BELOW, "return d_h if"),
        ("a latent no wider than a head is always the cheaper", 'else float("inf")', "else 0"),
    ],
    14: [
        (LAST, COPY, COPY.replace("state[name]", "(state[name].flip(0) if 'W_U' in name else state[name])")),
        (LAST_COLUMNS, COPY, COPY.replace("slice(n)", "slice(*(-n, None) if 'W_O' in name else (n,))")),
        ("the norms are not those of the model", COPY, f"if p.dim() == 2: {COPY}"),
    ],
}
