"""The house: every file small enough to be read, and imports between ours in one direction."""

import ast
from pathlib import Path

HERE = Path(__file__).parent.parent
MOST_LINES = {
    "matmla.py": 440, "common.py": 160, "pretrained.py": 130, "decode.py": 190, "data.py": 170, "train.py": 330,
    "report.py": 150, "sample.py": 110, "bench_cache.py": 280, "transmla.py": 345, "export.py": 120,
    "walkthrough.py": 160, "exercises.py": 135, "test_matmla.py": 650, "README.md": 260,
}
MAY_IMPORT = {
    "matmla": "", "pretrained": "matmla", "decode": "matmla", "exercises": "", "walkthrough": "matmla",
    "data": "pretrained", "common": "matmla pretrained data",
    "train": "common matmla data", "report": "common data", "sample": "common data decode",
    "bench_cache": "common matmla data train decode", "transmla": "common matmla pretrained data",
    "export": "common matmla",
}


def lines(path):
    return path.read_text("utf-8").splitlines()


def test_every_file_is_at_most_as_long_as_it_may_be():
    sizes = {name: len(lines(HERE / name)) for name in MOST_LINES if (HERE / name).exists()}
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES[name]}
    assert sum(size for name, size in sizes.items() if name not in ("test_matmla.py", "README.md")) <= 2700
    assert sum(len(lines(path)) for path in (HERE / "tests").glob("*.py")) <= 1740
    assert {path.name for path in HERE.glob("*.py")} - {"conftest.py", "my_matmla.py"} <= set(MOST_LINES)


def test_no_line_is_longer_than_120_characters_and_in_matmla_110():
    for path in [*HERE.glob("*.py"), *(HERE / "tests").glob("*.py")]:
        most = 110 if path.name == "matmla.py" else 120
        long = [number for number, line in enumerate(lines(path), 1) if len(line) > most]
        assert not long, f"{path.name}: lines {long}"


def test_imports_between_our_files_go_down_only():
    for name, below in MAY_IMPORT.items():
        if (HERE / f"{name}.py").exists():
            nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text("utf-8"))))
            imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            assert imported & MAY_IMPORT.keys() <= set(below.split()), name


def test_an_attention_fits_one_screen():
    tree = ast.parse((HERE / "matmla.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in ("MHA", "NestedMHA", "GQA", "Latent", "MLA", "MatMLA"):
            assert node.end_lineno - node.lineno < 45, node.name
