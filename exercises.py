"""
Write mine/matmla.py: a copy of matmla.py with the bodies of 16 exercises left for you to write.

    python exercises.py
    python grade.py mine/matmla.py      says what is done, what is wrong, and where

Any order is fine: an exercise is graded with the rest of the file as it was. Once 1 to 12 are done,
your file trains. `python -m` looks for matmla.py in the folder that you are in, first of all:

    cd mine && PYTHONPATH=.. python -m train
"""

import ast
import inspect
from pathlib import Path

from common import Parser, UserError, write_whole

MATMLA = Path(__file__).with_name("matmla.py")
EXERCISES = {  # title: {function: hint}
    "RoPE": {
        "rope": "About 6 lines. Angles in float32 at least, the result in x.dtype, all on x.device."
    },
    "softmax attention": {
        "attend": "About 10 lines. Query i stands at positions[i], and sees no token behind that."
    },
    "the first m heads": {
        "to_heads": "About 1 line. What other heads would make must not be computed."
    },
    "multi-head attention": {
        "MHA.write": "About 3 lines. A row goes head by head: the key of a head, then its value.",
        "MHA.read": "About 5 lines. Rows may hold more heads than m. Call self.attend. GQA, too.",
    },
    "the cache": {
        "Cache.append": "About 7 lines. ValueError, and no change at all, for what does not fit."
    },
    "grouped queries": {
        "GQA.write": "About 1 line. A row goes group by group: its key, then its value."
    },
    "the latent and the decoupled key": {"Latent.write": "About 4 lines. A row is c_KV, then k_R."},
    "latent queries": {
        "MLA.queries": "About 4 lines. Return two tensors, q_C and q_R, ready to meet their keys."
    },
    "latent attention": {
        "MLA.read": "About 8 lines. Make every key and value. Call self.attend with self.scale."
    },
    "absorption": {
        "MLA.read_absorbed": "About 9 lines. The same by self.attend, but make no key and no value."
    },
    "the mixed objective": {
        "Attention.forward": "About 12 lines. What is done once for all, and what for each part?",
        "mixed_loss": "About 1 line. What do the parts share? What is the loss of each?",
    },
    "cache arithmetic": {
        "MHA.row_width": "About 1 line.",
        "GQA.row_width": "About 1 line.",
        "Latent.row_width": "About 1 line.",
    },
    "where absorption stops paying": {
        "absorb_below": "About 1 line. Make k_C and v_C and use them T times, or use c_KV T times?"
    },
    "MatMLA at m heads is an MLA": {
        "fixed_heads": "About 4 lines. Which weights belong to heads, on which axis, how wide?"
    },
    "nested GQA": {
        "NestedGQA.read": "About 6 lines. `self.attend` lets *neighbouring* heads share a key."
    },
    "a budget for every token": {
        "attend_per_token": "About 6 lines. Define a function here, and return it."
    },
}
SECRETS = {  # what else in matmla.py tells an answer: what stands there instead
    """
    absorbed: q_Cᵀ (W_UK c) = (W_UKᵀ q_C)ᵀ c    Σ_s p_s (W_UV c_s) = W_UV (Σ_s p_s c_s)""": "",
    """
        # A head reads a cached token for T new ones: absorbed in T·2·d_c multiplications; expanded
        # in 2·d_c·d_h, to make k_C and v_C, and T·2·d_h, to use them. At this T they are equal.
        self.absorb_below = c.d_c * c.d_h / (c.d_c - c.d_h) if c.d_c > c.d_h else torch.inf""": """
        self.absorb_below = 0  # after exercise 13: absorb_below(c.d_c, c.d_h)""",
}


def mixed_loss(model, tokens, targets, budgets):
    """Mean loss for targets [B, T], where every equal part of the batch has its own budget.

    budgets: a tuple, one for each part, in order. The model runs once, for all of them together.
    """


def absorb_below(d_c, d_h):
    """The number T of new tokens, a float, at which both ways to read the cache cost the same.

    Fewer are cheaper to read absorbed. math.inf if absorbed is the cheaper for every T. Count the
    multiplications of one head for one cached token: those that make k_C and v_C, and those of the
    scores and sums. Leave out what is the same both ways (d_R) or does not grow with the cache.
    """


def fixed_heads(model, m):
    """A new model of attention "mla" with n_h = m, which computes what a MatMLA does with m heads.

    model: the MatMLA, a GPT, left as it is. The new one has all its other sizes, weights of its own
    and none that m heads do not use.
    """


def attend_per_token(heads):
    """An `attend` for a layer of MatMLA, with which each token works with a budget of its own.

    heads [B, T]: how many. The layer works with all heads, and what a token's idle heads read is
    set to zero before W_O: section 5.3 of [1]. block.attention.attend = attend_per_token(heads)
    """


def definitions(tree):
    """Every function, method and class of a syntax tree by its name: "rope", "MHA", "MHA.write"."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            for name, inner in definitions(node).items():
                found[f"{node.name}.{name}"] = inner
    return found


def blank(text):
    """The text of matmla.py as exercises: functions keep signature and docstring, not the body."""
    for secret, instead in SECRETS.items():
        assert secret in text, f"matmla.py no longer says {secret}"
        text = text.replace(secret, instead)
    for function in mixed_loss, absorb_below, fixed_heads, attend_per_token:
        text += "\n\n" + inspect.getsource(function)

    lines = text.splitlines()
    nodes = definitions(ast.parse(text))
    edits = []
    for number, (title, functions) in enumerate(EXERCISES.items(), 1):
        for name, hint in functions.items():
            first = nodes[name].body[0]
            indent = " " * first.col_offset
            todo = [f"# {hint}", f'raise NotImplementedError("exercise {number}: {title}")']
            start = first.end_lineno if ast.get_docstring(nodes[name]) else first.lineno - 1
            edits.append((start, nodes[name].end_lineno, [indent + line for line in todo]))
    for start, end, todo in sorted(edits, reverse=True):  # from the end, so that numbers hold
        lines[start:end] = todo
    return "\n".join(lines) + "\n"


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise UserError(f"{path} is there, maybe with your answers: move or delete it first")
    text = blank(MATMLA.read_text("utf-8"))
    write_whole(path, lambda file: file.write(text.encode()))
    print(f"{len(EXERCISES)} exercises are in {path}. To grade: python grade.py {path}", flush=True)


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", nargs="?", type=Path, default="mine/matmla.py", help="to write")
    parser.run(write, parser.parse_args().file)


if __name__ == "__main__":
    main()
