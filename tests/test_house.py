"""The house: every file small enough to be read, imports between ours in one direction, a README that is true."""

import ast
import re
import textwrap
from pathlib import Path

import walkthrough

HERE = Path(__file__).parent.parent
HOUSE = {    # file: the most lines it may have, and what it may import of ours
    "matmla": (440, ""), "pretrained": (125, "matmla"), "decode": (160, "matmla"), "walkthrough": (155, "matmla"),
    "data": (170, "pretrained"), "common": (170, "matmla pretrained data"), "train": (330, "common matmla data"),
    "report": (115, "common data"), "sample": (90, "common decode"), "export": (120, "common matmla pretrained"),
    "bench_cache": (230, "common matmla data train decode"), "transmla": (330, "common matmla pretrained data"),
    "exercises": (130, "")}
LINES = {path.name: path.read_text("utf-8").splitlines()
         for pattern in ("*.py", "*.md", "tests/*.py", "assets/*.py") for path in HERE.glob(pattern)}
NODES = {name: [*ast.walk(ast.parse("\n".join(LINES[f"{name}.py"])))] for name in HOUSE}


def test_every_file_and_line_is_at_most_as_long_as_it_may_be():
    sizes, tests = {name: len(lines) for name, lines in LINES.items()}, [path.name for path in HERE.glob("tests/*.py")]
    most, other = {f"{name}.py": size for name, (size, _) in HOUSE.items()}, {"README.md": 260, "RESULTS.md": 300,
        "TEACHING.md": 120, "test_matmla.py": 650, "conftest.py": 25, "beside_transformers.py": 31}
    assert not {name: sizes[name] for name, size in (most | other).items() if sizes[name] > size}
    assert sum(sizes[name] for name in most) <= 2500 and sum(sizes[name] for name in tests) <= 900
    assert sizes.keys() <= {*most, *other, *tests, "my_matmla.py"}
    for name in (name for name in LINES if name.endswith(".py")):
        assert max(map(len, LINES[name])) <= (110 if name == "matmla.py" else 120), name
    lengths = {node.name: node.end_lineno - node.lineno for node in NODES["matmla"] if hasattr(node, "bases")}
    assert max(map(lengths.get, ("MHA", "NestedMHA", "GQA", "Latent", "MLA", "MatMLA"))) < 45, "more than one screen"


def test_imports_between_our_files_go_down_only():
    for name, (_, below) in HOUSE.items():
        imported = {alias.name for node in NODES[name] if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in NODES[name] if isinstance(node, ast.ImportFrom)}
        assert imported & HOUSE.keys() <= set(below.split()), name


def test_the_readme_shows_what_the_walkthrough_prints_on_two_screens(capsys):
    walkthrough.walk()
    printed = capsys.readouterr().out
    shown = "\n".join(LINES["README.md"]).split("a right angle:\n\n")[1].split("\n\n## ")[0]
    assert textwrap.dedent(shown) in printed
    text = "\n".join(line for file in ("README.md", "RESULTS.md", "TEACHING.md") for line in LINES[file])
    assert all((HERE / name).exists() for name in {*re.findall(r"[\w/]+\.py\b", text)} - {"my_matmla.py"})
    assert len(printed.splitlines()) <= 80 and max(map(len, printed.splitlines())) <= 100
