"""The right answers, how a file of answers is loaded among them, and which mistakes are known by their result."""

import ast
import functools
import types

import exercises

AT_THE_END = """
def mixed_loss(model, tokens, targets, budgets):
    return model(tokens, targets, heads=tuple(budgets))[1]

def absorb_below(d_c, d_h):
    return d_c * d_h / (d_c - d_h) if d_c > d_h else float("inf")

def fixed_heads(model, m):
    small = GPT(Config(**vars(model.config) | {"attention": "mla", "n_h": m}))
    for name, p in small.state_dict().items():
        p.copy_(model.state_dict()[name][tuple(slice(n) for n in p.shape)])
    return small
"""
MATMLA = (exercises.HERE / "matmla.py").read_text("utf-8")
REFERENCE = MATMLA + AT_THE_END
FAR = (
    10**6
)  # lines of the reference count from here, so that an error can be told to be in a student's line


def graft(answers, names):
    """A student's syntax tree, in which everything but the functions `names` and new ones is the reference's."""
    tree, reference = ast.parse(answers), ast.increment_lineno(ast.parse(REFERENCE), FAR)
    theirs = exercises.definitions(tree)
    for name, node in exercises.definitions(reference).items():
        if isinstance(
            node, ast.ClassDef
        ):  # its methods are names of their own; of two values, the last counts
            node.body = theirs[name].body + [
                line for line in node.body if not isinstance(line, ast.FunctionDef)
            ]
        if name not in names:
            vars(theirs[name]).update(vars(node))
    return tree


@functools.lru_cache
def load(source, file="matmla.py"):
    module = types.ModuleType("matmla")
    exec(compile(source, file, "exec"), vars(module))
    return module


NO_ROPE, LAST = "the keys are not turned by RoPE", "these are the last heads, not the first"
LAST_COLUMNS = "W_O is cut to its last columns, not its first"
WRONG = {  # exercise: {what is wrong: (text of the reference, what stands there instead)}
    1: {
        "pairs are (x0, x1), (x2, x3), ..., not (x0, x4), (x1, x5), ...": (
            "x[..., 0::2], x[..., 1::2]",
            "x.chunk(2, -1); return torch.cat((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1)",
        ),
        "the pairs turn backwards": ("angle.sin()", "-angle.sin()"),
        "bfloat16 cannot tell late positions apart": (
            "torch.promote_types(x.dtype, torch.float32)",
            "x.dtype",
        ),
    },
    2: {
        "tokens see those after them": ("<= positions[:, None]", "<= S + 0 * positions[:, None]"),
        "tokens see the one after them": ("<= positions[:, None]", "<= positions[:, None] + 1"),
        "queries stand at positions, not at 0, 1, ...": (
            "<= positions[:, None]",
            "<= torch.arange(T)[:, None]",
        ),
        "scores are not scaled": ("scale=scale", "scale=1.0"),
    },
    3: {
        LAST: ("[: m * width]", "[-m * width :]"),
        "the rows of a head lie next to each other": (
            "(m, width))",
            "(width, m)).transpose(-1, -2)",
        ),
        "tokens and heads are mixed": (
            ".unflatten(-1, (m, width))",
            ".reshape(len(x), m, -1, width).transpose(1, 2)",
        ),
    },
    4: {
        NO_ROPE: ("_K, x, m, self.d_h), positions", "_K, x, m, self.d_h), 0 * positions"),
        "the scale is 1/√d_h, not 1": ("self.d_h**-0.5", "1.0"),
        LAST_COLUMNS: ("[:, : m * self.d_h]", "[:, -m * self.d_h :]"),
    },
    5: {
        "these are the new rows, not all so far": ("return self.rows[:, :stop]", "return new"),
        "the new rows are not counted": ("self.length = stop", "pass"),
        "the first rows are overwritten": ("self.length : stop]", ": new.shape[1]]"),
    },
    6: {
        "all keys stand before all values": (
            "positions, self.n_kv)",
            "positions, self.n_kv).unflatten(-1, (-1, 2, self.d_h)).transpose(2, 3).flatten(2)",
        ),
        "heads are to share keys and values, but each has its own": (
            "positions, self.n_kv)",
            "positions, self.n_kv).unflatten(-1, (self.n_kv, -1)).repeat_interleave(m // self.n_kv, 2).flatten(2)",
        ),
        NO_ROPE: ("positions, self.n_kv)", "0 * positions, self.n_kv)"),
    },
    7: {
        "the latent is cached before its norm": ("norm_KV(self.W_DKV(x))", "W_DKV(x)"),
        "k_R is cached before RoPE": ("rope(k_R, positions", "rope(k_R, 0 * positions"),
        "RoPE starts at 0, not at positions[0]": (
            "rope(k_R, positions",
            "rope(k_R, positions - positions[0]",
        ),
    },
    8: {
        "the latent of the queries is not normed": ("norm_Q(self.W_DQ(x))", "W_DQ(x)"),
        "q_R is not turned by RoPE": ("rope(q_R, positions", "rope(q_R, 0 * positions"),
        LAST: ("c_Q, m, self.d_h)", "c_Q, self.n_h, self.d_h)[:, :, -m:]"),
    },
    9: {
        "the scale is 1/√(d_h + d_R), not 1/√d_h": (
            "v_C, positions, self.scale",
            "v_C, positions, self.d_h**-0.5",
        ),
        "k_R is turned by RoPE again, though it was before it was cached": (
            "k_R.unsqueeze(2)",
            "rope(k_R.unsqueeze(2), torch.arange(rows.shape[1]), self.rope_base)",
        ),
        LAST_COLUMNS: ("[:, : m * self.d_h]", "[:, -m * self.d_h :]"),
    },
    10: {
        "the scale is 1/√(d_h + d_R), not 1/√(d_c + d_R)": (", self.scale", ", q.shape[-1]**-0.5"),
        "the query goes into the latent through W_UK, not W_UV": (
            'bthc", q_C, W_UK',
            'bthc", q_C, W_UV',
        ),
        LAST: ("d_h))[:m]", "d_h))[-m:]"),
    },
    11: {
        "with a cache, positions go on from its length": ("(cache.length if cache else 0)", "0"),
        "this is the sum of the parts' losses, not their mean": (
            "return model(",
            "return len(budgets) * model(",
        ),
        "the model runs once for every part": (
            "model(tokens, targets, heads=tuple(budgets))[1]",
            "sum(model(*x, m)[1] / 3 for *x, m in zip(tokens.split(2), targets.split(2), budgets))",
        ),
    },
    12: {
        "a head leaves its key, and its value": ("return m * 2", "return m"),
        "groups leave keys and values, not heads": ("return self.n_kv * 2", "return m * 2"),
        "k_R is cached, too": ("return self.d_c + self.d_R", "return self.d_c"),
    },
    13: {
        "both k_C and v_C have to be made": (
            "d_c * d_h / (d_c - d_h)",
            "d_c * d_h / (d_c - d_h) / 2",
        ),
        "scores and sums are to be counted, whichever way": (
            "d_c * d_h / (d_c - d_h)",
            "d_c * d_h / (d_c - d_h) * 2",
        ),
        "a latent no wider than a head is always the cheaper": ('float("inf")', "0"),
    },
    14: {
        LAST: ("slice(n) for", "slice(-n, None) for"),
        LAST_COLUMNS: ("slice(n) for", "slice(*(-n, None) if 'W_O' in name else (n,)) for"),
        "the norms are not those of the model": ("p.copy_(", "p.dim() == 2 and p.copy_("),
    },
}
