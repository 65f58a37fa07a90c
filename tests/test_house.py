"""The house: every file small enough to be read, and imports between ours in one direction."""

import ast
from pathlib import Path

HERE = Path(__file__).parent.parent
HOUSE = {    # file: the most lines it may have, and what it may import of ours
    "matmla": (440, ""), "pretrained": (125, "matmla"), "decode": (190, "matmla"), "walkthrough": (155, "matmla"),
    "data": (170, "pretrained"), "common": (165, "matmla pretrained data"), "train": (330, "common matmla data"),
    "report": (140, "common data"), "sample": (100, "common data decode"), "export": (120, "common matmla"),
    "bench_cache": (250, "common matmla data train decode"), "transmla": (340, "common matmla pretrained data"),
    "exercises": (130, ""),
}


def lines(path):
    return path.read_text("utf-8").splitlines()


def test_every_file_is_at_most_as_long_as_it_may_be():
    sizes = {name: len(lines(HERE / f"{name}.py")) for name in HOUSE}
    assert not {name: size for name, size in sizes.items() if size > HOUSE[name][0]}
    assert sum(sizes.values()) <= 2620 and sum(len(lines(path)) for path in HERE.glob("tests/*.py")) <= 1300
    assert len(lines(HERE / "test_matmla.py")) <= 650 and len(lines(HERE / "README.md")) <= 260
    assert {path.stem for path in HERE.glob("*.py")} <= HOUSE.keys() | {"test_matmla", "conftest", "my_matmla"}


def test_no_line_is_longer_than_120_characters_and_in_matmla_110():
    for path in [*HERE.glob("*.py"), *HERE.glob("tests/*.py")]:
        long = [i for i, line in enumerate(lines(path), 1) if len(line) > (110 if path.stem == "matmla" else 120)]
        assert not long, f"{path.name}: lines {long}"


def test_imports_between_our_files_go_down_only():
    for name, (_, below) in HOUSE.items():
        nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text("utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert imported & HOUSE.keys() <= set(below.split()), name


def test_an_attention_fits_one_screen():
    tree = ast.parse((HERE / "matmla.py").read_text("utf-8"))
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.ClassDef)}
    assert all(sizes[name] <= 45 for name in ("MHA", "NestedMHA", "GQA", "Latent", "MLA", "MatMLA")), sizes
