"""The house: files small enough to be read, imports that go one way only, a README that is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import torch

import walkthrough

HERE = Path(__file__).parent.parent
HOUSE = {  # file: the most statements it may have, and what it may import of ours
    "matmla": (300, ""),
    "tokenizer": (85, ""),
    "muon": (40, ""),
    "data": (190, "tokenizer"),
    "devices": (105, "tokenizer"),
    "pretrained": (130, "matmla"),
    "common": (167, "data devices matmla pretrained tokenizer"),
    "train": (305, "common data devices matmla muon pretrained tokenizer"),
    "decode": (110, "matmla"),
    "sample": (75, "common decode devices matmla tokenizer"),
    "report": (120, "common data devices tokenizer"),
    "dial": (110, "common devices matmla report tokenizer"),
    "bench_cache": (165, "common decode devices matmla tokenizer"),
    "hub": (85, "tokenizer"),
    "transmla": (240, "common data devices hub matmla pretrained tokenizer"),
    "export": (115, "common matmla pretrained tokenizer"),
    "walkthrough": (110, "common matmla"),
    "exercises": (60, "common"),
    "grade": (355, "common exercises matmla tokenizer"),
}
NODES = {name: [*ast.walk(ast.parse((HERE / f"{name}.py").read_text("utf-8")))] for name in HOUSE}


def statements(nodes):
    """All but docstrings."""
    return sum(
        isinstance(node, ast.stmt)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in nodes
    )


def test_every_file_has_at_most_as_many_statements_as_a_reader_can_bear():
    counts = {name: statements(nodes) for name, nodes in NODES.items()}
    assert not {name: counts[name] for name, (most, _) in HOUSE.items() if counts[name] > most}
    assert sum(counts.values()) - counts["grade"] <= 2440
    assert len((HERE / "matmla.py").read_text("utf-8").splitlines()) <= 540


def test_no_function_has_more_than_45_statements():
    for name, nodes in NODES.items():
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        sizes = {function.name: statements(ast.walk(function)) - 1 for function in functions}
        assert not {name: size for name, size in sizes.items() if size > 45 and name != "walk"}, (
            name
        )


def test_imports_between_our_files_go_down_only():
    for name, (_, below) in HOUSE.items():
        imported = {
            alias.name
            for node in NODES[name]
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {node.module for node in NODES[name] if isinstance(node, ast.ImportFrom)}
        assert imported & HOUSE.keys() <= set(below.split()), name


def test_the_walkthrough_is_two_screens_long(capsys):
    walkthrough.walk()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) <= 80 and max(map(len, printed)) <= 100


def test_texts_are_short_and_name_files_that_exist():
    for name, lines in {"README": 260, "RESULTS": 320, "TEACHING": 140}.items():
        text = (HERE / f"{name}.md").read_text("utf-8")
        assert len(text.splitlines()) <= lines, name
        for file in {*re.findall(r"[\w/]+\.py\b", text)} - {"mine/matmla.py"}:
            assert (HERE / file).exists(), file


def test_the_numbers_of_the_texts_are_those_that_were_measured():
    command = [sys.executable, HERE / "assets" / "check_numbers.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_decode_step_of_the_readme_runs_and_its_two_ways_agree(capsys):
    text = (HERE / "README.md").read_text("utf-8")
    code = text.split("```python\nimport torch")[1].split("```")[0]
    try:
        exec("import torch" + code, {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(float(number) < 1e-10 for number in capsys.readouterr().out.split())
