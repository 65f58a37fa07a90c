"""How a file of answers is read, compared with matmla.py, and which mistakes are known by their result."""

import ast
import functools
import traceback
import types

import exercises

AT_THE_END = '''
def mixed_loss(model, tokens, targets, budgets):
    return model(tokens, targets, heads=tuple(budgets))[1]

def absorb_below(d_c, d_h):
    return d_c * d_h / (d_c - d_h) if d_c > d_h else float("inf")

def fixed_heads(model, m):
    small = GPT(Config(**vars(model.config) | {"attention": "mla", "n_h": m}))
    for name, p in small.state_dict().items():
        p.copy_(model.state_dict()[name][tuple(slice(n) for n in p.shape)])
    return small
'''
MATMLA = (exercises.HERE / "matmla.py").read_text("utf-8")
REFERENCE = MATMLA + AT_THE_END
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
        line = getattr(failure, "lineno", None) or [1, *lines][-1]
        return f"{file}:{line}: {type(failure).__name__}: {getattr(failure, 'msg', failure)}"


NO_ROPE, LAST = "the keys are not turned by RoPE", "these are the last heads, not the first"
LAST_COLUMNS = "W_O is cut to its last columns, not its first"

MISTAKES = {    # exercise: {text of the reference: {what stands there instead: what is wrong with that}}
    1: {"x[..., 0::2], x[..., 1::2]": {
            "x.chunk(2, -1); return torch.cat((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1)":
            "pairs are (x0, x1), (x2, x3), ..., not (x0, x4), (x1, x5), ..."},
        "angle.sin()": {"-angle.sin()": "the pairs turn backwards"},
        "torch.promote_types(x.dtype, torch.float32)": {"x.dtype": "bfloat16 cannot tell late positions apart"}},
    2: {"<= positions[:, None]": {"<= S + 0 * positions[:, None]": "tokens see those after them",
            "<= positions[:, None] + 1": "tokens see the one after them",
            "<= torch.arange(T)[:, None]": "queries stand at positions, not at 0, 1, ..."},
        "scale=scale": {"scale=1.0": "scores are not scaled"}},
    3: {"[: m * width]": {"[-m * width :]": LAST},
        "(m, width))": {"(width, m)).transpose(-1, -2)": "the rows of a head lie next to each other"},
        ".unflatten(-1, (m, width))": {".reshape(len(x), m, -1, width).transpose(1, 2)": "tokens and heads are mixed"}},
    4: {"_K, x, m, self.d_h), positions": {"_K, x, m, self.d_h), 0 * positions": NO_ROPE},
        "self.d_h**-0.5": {"1.0": "the softmax scale is 1/√d_h, not 1"},
        "[:, : m * self.d_h]": {"[:, -m * self.d_h :]": LAST_COLUMNS}},
    5: {"return self.rows[:, :stop]": {"return new": "these are the new rows, not all so far"},
        "self.length = stop": {"pass": "the new rows are not counted"},
        "self.length : stop]": {": new.shape[1]]": "the first rows are overwritten"}},
    6: {"positions, self.n_kv)": {"positions, self.n_kv).unflatten(-1, (-1, 2, self.d_h)).transpose(2, 3).flatten(2)":
            "all keys stand before all values",
            "positions, self.n_kv).unflatten(-1, (self.n_kv, -1)).repeat_interleave(m // self.n_kv, 2).flatten(2)":
            "heads are to share keys and values, but each has its own", "0 * positions, self.n_kv)": NO_ROPE}},
    7: {"norm_KV(self.W_DKV(x))": {"W_DKV(x)": "the latent is cached before its norm"},
        "rope(k_R, positions": {"rope(k_R, 0 * positions": "k_R is cached before RoPE",
            "rope(k_R, positions - positions[0]": "RoPE starts at 0, not at the tokens' positions"}},
    8: {"norm_Q(self.W_DQ(x))": {"W_DQ(x)": "the latent of the queries is not normed"},
        "rope(q_R, positions": {"rope(q_R, 0 * positions": "q_R is not turned by RoPE"},
        "c_Q, m, self.d_h)": {"c_Q, self.n_h, self.d_h)[:, :, -m:]": LAST}},
    9: {"v_C, positions, self.scale": {"v_C, positions, self.d_h**-0.5":
            "the softmax scale is 1/√(d_h + d_R), not 1/√d_h"},
        "k_R.unsqueeze(2)": {"rope(k_R.unsqueeze(2), torch.arange(rows.shape[1]), self.rope_base)":
            "k_R is turned by RoPE again, though it was before it was cached"},
        "[:, : m * self.d_h]": {"[:, -m * self.d_h :]": LAST_COLUMNS}},
    10: {"_c], positions, self.scale": {"_c], positions, q.shape[-1]**-0.5":
             "the softmax scale is 1/√(d_h + d_R), not 1/√(d_c + d_R), here too"},
         "q_C, W_UK)": {"q_C, W_UV)": "the query goes into the latent through W_UK, not W_UV"},
         "d_h))[:m]": {"d_h))[-m:]": LAST}},
    11: {"(cache.length if cache else 0)": {"0": "with a cache, positions go on from its length"},
         "return model(": {"return len(budgets) * model(": "this is the sum of the parts' losses, not their mean"},
         "model(tokens, targets, heads=tuple(budgets))[1]": {
             "sum(model(*x, m)[1] / 3 for *x, m in zip(tokens.split(2), targets.split(2), budgets))":
             "the model runs once for every part"}},
    12: {"return m * 2": {"return m": "a head leaves its key, and its value"},
         "return self.n_kv * 2": {"return m * 2": "groups leave keys and values, not heads"},
         "return self.d_c + self.d_R": {"return self.d_c": "k_R is cached, too"}},
    13: {"d_c * d_h / (d_c - d_h)": {"d_c * d_h / (d_c - d_h) / 2": "both k_C and v_C have to be made",
             "d_c * d_h / (d_c - d_h) * 2": "scores and sums are to be counted, whichever way"},
         'float("inf")': {"0": "a latent no wider than a head is always the cheaper"}},
    14: {"slice(n) for": {"slice(-n, None) for": LAST,
             "slice(*(-n, None) if 'W_O' in name else (n,)) for": LAST_COLUMNS},
         "p.copy_(": {"p.dim() == 2 and p.copy_(": "the norms are not those of the model"}},
}
WRONG = {    # exercise: [(what is wrong, text of the reference, what stands there instead)]
    number: [(why, old, new) for old, wrong in places.items() for new, why in wrong.items()]
    for number, places in MISTAKES.items()}
