"""How a file of answers is read, compared with matmla.py, and which mistakes are known by their result."""

import ast
import functools
import traceback
import types

import torch

import exercises

AT_THE_END = '''

def attend(q, k, v, positions, scale):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthw,bshw->bhts", q, k) * scale
    past = torch.arange(k.shape[1]) <= positions[:, None]
    return torch.einsum("bhts,bshw->bthw", scores.masked_fill(~past, -torch.inf).softmax(-1), v)


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
MATMLA = (exercises.HERE / "matmla.py").read_text("utf-8")
REFERENCE = MATMLA + AT_THE_END    # its attend is the one at the end, so that of matmla.py is an answer, too
FAR = 10**6    # lines of the reference count from here, so that an error can be told to be in a student's line


def graft(answers, names):
    """A student's syntax tree, in which everything but the functions `names` and new ones is the reference's."""
    tree, reference = ast.parse(answers), ast.increment_lineno(ast.parse(REFERENCE), FAR)
    theirs = exercises.definitions(tree)
    for name, node in exercises.definitions(reference).items():
        if isinstance(node, ast.ClassDef):    # its methods are names of their own; of two values, the last counts
            node.body = theirs[name].body + [line for line in node.body if not isinstance(line, ast.FunctionDef)]
        if name not in names:
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


PAIRS, NEIGHBOURS = "pairs are (x0, x1), (x2, x3), ..., not (x0, x4), (x1, x5), ...", "x[..., 0::2], x[..., 1::2]"
LAST, LAST_COLUMNS = "these are the last heads, not the first", "W_O is cut to its last columns, not its first"
SCALE, NO_ROPE = "the softmax scale is 1/√(d_h + d_R), not ", "the keys are not turned by RoPE"
STORE, RETURN = "self.rows[:, self.length : stop] = new", "return self.rows[:, :stop]"
GROUPS, ROWS = "write(x, positions, self.n_kv)", "write(x, positions, self.n_kv).unflatten(-1, (-1, 2, self.d_h))"
CHECK, COPY = "self.check(heads, len(x), most)", "p.copy_(state[name][tuple(slice(n) for n in p.shape)])"

WRONG = {    # exercise: [(what is wrong, text of the reference, what stands there instead, and so on)]
    1: [(PAIRS, NEIGHBOURS, "x.chunk(2, -1)", "x1 * cos), -1).flatten(-2)", "x1 * cos), -2).flatten(-2)"),
        (PAIRS, NEIGHBOURS, "x.chunk(2, -1)"),
        ("the pairs turn backwards", "angle.sin()", "-angle.sin()"),
        ("bfloat16 cannot tell late positions apart", "torch.promote_types(x.dtype, torch.float32)", "x.dtype",
         "positions[:, None, None] *", "positions[:, None, None].to(dtype) *"),
        ("it is computed in float32, but x is float64", "torch.promote_types(x.dtype, torch.float32)", "torch.float32"),
        ("the exponent of the base is -2i/n", "(-2 * i /", "(-i /")],
    2: [("tokens see those after them", "scores.masked_fill(~past, -torch.inf)", "scores"),
        ("tokens see the one after them", "<= positions[:, None]", "<= positions[:, None] + 1"),
        ("tokens do not see themselves", "<= positions[:, None]", "< positions[:, None].clamp(min=1)"),
        ("queries stand at positions, not at 0, 1, ...", "<= positions[:", "<= torch.arange(q.shape[1])[:"),
        ("heads take keys in turn, but neighbours share one", "repeat_interleave(q.shape[2] // x.shape[2], 2)",
         "repeat(1, 1, q.shape[2] // x.shape[2], 1)"),
        ("scores are not scaled", " * scale", ""),
        ("softmax goes over the queries, not the keys", "-torch.inf).softmax(-1)", "-torch.inf).softmax(-2)")],
    3: [(LAST, "W.weight[: m * width]", "W.weight[-m * width :]"),
        ("the rows of a head lie next to each other", "(m, width))", "(width, m)).transpose(-1, -2)"),
        ("tokens and heads are mixed", ".unflatten(-1, (m, width))", ".reshape(len(x), m, -1, width).transpose(1, 2)"),
        ("heads that were not asked for are computed", "[: m * width]", "", "(m, width))", "(-1, width))[:, :, :m]")],
    4: [(NO_ROPE, "(self.W_K, x, m, self.d_h), positions", "(self.W_K, x, m, self.d_h), 0 * positions"),
        ("the queries are not turned by RoPE", "_Q, x, m, self.d_h), positions", "_Q, x, m, self.d_h), 0 * positions"),
        ("the values are turned by RoPE", "((k, v), -1)", "((k, rope(v, positions, self.rope_base)), -1)"),
        ("the softmax scale is 1/√d_h, not 1", "self.d_h**-0.5", "1.0"),
        ("key and value are swapped", "torch.cat((k, v), -1)", "torch.cat((v, k), -1)"),
        (LAST_COLUMNS, "weight[:, : m * self.d_h]", "weight[:, -m * self.d_h :]"),
        ("the last heads of a row are read, not the first", "[..., : self.numbers(m)]", "[..., -self.numbers(m) :]")],
    5: [("these are the new rows, not all so far", RETURN, "return new"),
        ("the new rows are not counted", "        self.length = stop\n", ""),
        ("the first rows are overwritten", STORE, "self.rows[:, : new.shape[1]] = new"),
        ("this is the whole memory, also what is not in use", RETURN, "return self.rows"),
        ("the rows lie in new memory", STORE, "self.rows = self.rows.clone(); " + STORE)],
    6: [("all keys stand before all values", GROUPS, ROWS + ".transpose(2, 3).flatten(2)"),
        ("the value stands before its key", GROUPS, ROWS + ".flip(3).flatten(2)"),
        ("heads are to share keys and values, but each has its own", GROUPS,
         GROUPS + ".unflatten(-1, (self.n_kv, -1)).repeat_interleave(m // self.n_kv, 2).flatten(2)"),
        (NO_ROPE, GROUPS, "write(x, 0 * positions, self.n_kv)")],
    7: [("the latent is cached before its norm", "self.norm_KV(self.W_DKV(x))", "self.W_DKV(x)"),
        ("k_R is cached before RoPE", "rope(k_R, positions", "rope(k_R, 0 * positions"),
        ("RoPE starts at 0, not at the tokens' positions", "rope(k_R, positions", "rope(k_R, positions - positions[0]"),
        ("k_R stands before c_KV", "torch.cat((c_KV, k_R), -1)", "torch.cat((k_R, c_KV), -1)"),
        ("the latent is turned by RoPE, too", "(c_KV, k_R)",
         "(rope(c_KV[:, :, None], positions, self.rope_base)[:, :, 0], k_R)")],
    8: [("the latent of the queries is not normed", "self.norm_Q(self.W_DQ(x))", "self.W_DQ(x)"),
        ("q_R is not turned by RoPE", "rope(q_R, positions", "rope(q_R, 0 * positions"),
        ("q_C is turned by RoPE, too", "return q_C, rope(", "return rope(q_C, positions, self.rope_base), rope("),
        (LAST, "c_Q, m, self.d_h)", "c_Q, self.n_h, self.d_h)[:, :, -m:]"),
        (LAST, "c_Q, m, self.d_R)", "c_Q, self.n_h, self.d_R)[:, :, -m:]")],
    9: [(SCALE + "1/√d_h", "v_C, positions, self.scale", "v_C, positions, self.d_h**-0.5"),
        (SCALE + "1", "v_C, positions, self.scale", "v_C, positions, 1.0"),
        ("the latent is normed again", "self.d_R), -1)", "self.d_R), -1); c_KV = self.norm_KV(c_KV)"),
        ("k_R is turned by RoPE again, though it was before it was cached", "k_R = k_R.unsqueeze(2)",
         "k_R = rope(k_R.unsqueeze(2), torch.arange(rows.shape[1]), self.rope_base)"),
        ("keys are of the last heads", "K, c_KV, m, self.d_h)", "K, c_KV, self.n_h, self.d_h)[:, :, -m:]"),
        (LAST_COLUMNS, "weight[:, : m * self.d_h]", "weight[:, -m * self.d_h :]")],
    10: [(SCALE + "1/√(d_c + d_R), here too", "_c], positions, self.scale", "_c], positions, q.shape[-1]**-0.5"),
         (SCALE + "1/√d_h, here too", "_c], positions, self.scale", "_c], positions, self.d_h**-0.5"),
         ("the query goes into the latent through W_UK, not W_UV", "q_C, W_UK)", "q_C, W_UV)"),
         ("what was read comes out of the latent through W_UV, not W_UK", "o, W_UV)", "o, W_UK)"),
         (LAST, "(-1, self.d_h))[:m]", "(-1, self.d_h))[-m:]")],
    11: [("with a cache, positions go on from its length", "(cache.length if cache else 0)", "0"),
         ("every part is read with the largest budget", CHECK, f"(max({CHECK}),)"),
         ("every part is read with the first budget", CHECK, f"{CHECK}[:1]"),
         ("the parts come back in another order", "torch.cat(parts)", "torch.cat(parts[::-1])"),
         ("this is the sum of the parts' losses, not their mean", "return model(", "return len(budgets) * model("),
         ("every part is read with the first budget", "heads=tuple(budgets)", "heads=budgets[0]"),
         ("the model runs once for every part", "model(tokens, targets, heads=tuple(budgets))[1]",
          "sum(model(*x, m)[1] / 3 for *x, m in zip(tokens.split(2), targets.split(2), budgets))")],
    12: [("a head leaves its key, and its value", "return m * 2 * self.d_h", "return m * self.d_h"),
         ("of m heads, m leave something", "return m * 2 * self.d_h", "return self.n_h * 2 * self.d_h"),
         ("groups leave keys and values, not heads", "return self.n_kv * 2 * self.d_h", "return m * 2 * self.d_h"),
         ("k_R is cached, too", "return self.d_c + self.d_R", "return self.d_c"),
         ("all heads share one latent", "return self.d_c + self.d_R", "return m * (self.d_c + self.d_R)"),
         ("keys and values share one latent", "return self.d_c + self.d_R", "return 2 * self.d_c + self.d_R")],
    13: [("both k_C and v_C have to be made", "/ (d_c - d_h) if", "/ (d_c - d_h) / 2 if"),
         ("scores and sums are to be counted, whichever way", "/ (d_c - d_h) if", "/ (d_c - d_h) * 2 if"),
         ("keys and values have to be used, too, once they are made", "d_c * d_h / (d_c - d_h) if", "d_h if"),
         ("a latent no wider than a head is always the cheaper", 'else float("inf")', "else 0")],
    14: [(LAST, COPY, COPY.replace("state[name]", "(state[name].flip(0) if 'W_U' in name else state[name])")),
         (LAST_COLUMNS, COPY, COPY.replace("slice(n)", "slice(*(-n, None) if 'W_O' in name else (n,))")),
         ("the norms are not those of the model", COPY, f"if p.dim() == 2: {COPY}")],
}
