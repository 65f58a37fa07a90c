"""
Write my_matmla.py, a copy of matmla.py in which the bodies of 14 exercises are left for you to write.

    python exercises.py [FILE]
    python -m pytest test_matmla.py -k exercise      says what is done, what is wrong, and where

Any order is fine: each exercise is graded with the rest of the file as it was. A copy by another name is graded
and trained with MATMLA in front, as in: MATMLA=mine python -m pytest test_matmla.py -k exercise
"""

import argparse
import ast
import os
import re
from pathlib import Path

HERE = Path(__file__).parent
EXERCISES = {  # title: {function: hint}
    "RoPE": {"rope": "The angles want float32 at least; the result has the dtype of x."},
    "softmax attention": {
        "attend": "Query i stands at positions[i], and sees no token behind that."
    },
    "the first m heads": {"to_heads": "What other heads would make must not be computed."},
    "multi-head attention": {
        "MHA.write": "In any order that your `read` understands, also where it reads fewer heads.",
        "MHA.read": "A row may hold more than m heads. `attend` does (7).",
    },
    "the cache": {
        "Cache.append": "The memory is there already. What is refused must change nothing."
    },
    "grouped queries": {
        "GQA.write": "MHA's `read` reads it: group after group, each its key, then its value."
    },
    "the latent and the decoupled key": {"Latent.write": "A row is c_KV, then k_R."},
    "latent queries": {
        "MLA.queries": "Return two tensors, q_C and q_R, ready to be compared with keys."
    },
    "latent attention": {
        "MLA.read": "Make every key and value from the rows. self.scale is the softmax scale."
    },
    "absorption": {
        "MLA.read_absorbed": "The same, but no key or value is made: q_C and what was read change instead."
    },
    "the mixed objective": {
        "Attention.forward": "What is done once for all, what for each part? When does a cache call for read_absorbed?",
        "mixed_loss": "What do the parts share, and what is the loss of each?",
    },
    "cache arithmetic": dict.fromkeys(
        ("MHA.numbers", "GQA.numbers", "Latent.numbers"), "Of a token, in one layer."
    ),
    "where absorption stops paying": {
        "absorb_below": "Make k_C and v_C and use them T times, or use c_KV T times?"
    },
    "MatMLA at m heads is an MLA": {
        "fixed_heads": "Which weights belong to heads, on which axis, how wide?"
    },
}
AT_THE_END = '''

def mixed_loss(model, tokens, targets, budgets):
    """Mean loss over all tokens [B, T], where every equal part of the batch is read with its own number of heads.

    budgets: a tuple, one for every part, in order. The model runs once, for all of them together.
    """


def absorb_below(d_c, d_h):
    """The number T of new tokens, not rounded, at which both ways to read one latent cost the same.

    Fewer are cheaper to read absorbed. math.inf if absorbed is the cheaper for every T. Multiplications of one head
    for one cached token are counted: those that make k_C and v_C, and those of scores and sums. What is the same both
    ways (d_R), or does not grow with the cache, is not.
    """


def fixed_heads(model, m):
    """A new model with attention "mla" and n_h = m, that computes what `model`, a MatMLA, does with m heads.

    model: GPT, left as it is. The new one has its other sizes, and no weight that m heads do not use.
    """


# To think about: MatMLA says only `nested = True`. What would its cache lose, if `Latent.write` made m · d_c numbers?
'''


def answers():
    """The file that is graded: my_matmla.py, or the one that MATMLA names."""
    return HERE / f"{os.environ.get('MATMLA', 'my_matmla').removesuffix('.py')}.py"


def definitions(tree):
    """Every function, method and class of a syntax tree by its name: "rope", "MHA", "MHA.write"."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}": inner for name, inner in definitions(node).items()}
    return found


def is_blank(function):
    """Whether it still says only: raise NotImplementedError(...)."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return len(body) == 1 and ast.unparse(body[0]).startswith(
        "raise NotImplementedError('exercise "
    )


def blank(text):
    """The text of matmla.py with the exercises: functions keep signature and docstring, but not their body."""
    text = re.sub(r"\n    absorbed: .*", "", text)  # this line of MLA's docstring is an answer
    text = re.sub(
        r"self\.short = .*", "self.short = 0              # exercise 13 knows a better number", text
    )
    text = re.sub(
        r"(short = 0 .*?) T than this are read absorbed: .*\n.*",
        r"\1 than this are read absorbed",
        text,
    )
    text += AT_THE_END
    lines, nodes = text.splitlines(), definitions(ast.parse(text))
    edits = []
    for number, (title, functions) in enumerate(EXERCISES.items(), 1):
        for name, hint in functions.items():
            first = nodes[name].body[0]
            start = first.end_lineno if ast.get_docstring(nodes[name]) else first.lineno - 1
            todo = f"# {hint}", f'raise NotImplementedError("exercise {number}: {title}")'
            edits.append(
                (start, nodes[name].end_lineno, [" " * first.col_offset + line for line in todo])
            )
    for start, end, todo in sorted(edits, reverse=True):
        lines[start:end] = todo
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", nargs="?", default="my_matmla.py", help="where to write; what is there stays"
    )
    path = Path(parser.parse_args().file)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(blank((HERE / "matmla.py").read_text("utf-8")))
    except OSError as error:
        parser.exit(2, f"exercises.py: nothing was written: {error}\n")
    which = "" if path.name == "my_matmla.py" else f"MATMLA={path.stem} "
    print(
        f"{len(EXERCISES)} exercises are in {path}. To grade: {which}python -m pytest test_matmla.py -k exercise"
    )


if __name__ == "__main__":
    main()
