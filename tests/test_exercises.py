"""Tests of the exercises: right answers pass, wrong ones are named, and the command line says what is done."""

import ast
import re
import subprocess
import sys

import pytest

import exercises
import test_matmla as proofs
from tests.grading import AT_THE_END, MATMLA, REFERENCE, WRONG, load

BLANK = exercises.blank(MATMLA)
GRADED = [
    (number, why, *edit) for number, wrong in WRONG.items() for why, edit in wrong.items()
] + [
    (
        1,
        "the dtype is torch.float64, but torch.bfloat16 is right",
        "-1).flatten(-2)\n",
        "-1).flatten(-2).double()\n",
    ),
    (2, "it is 2 times what is right", "scale=scale", "scale=2 * scale"),
    (3, "the shape is [2, 11, 60], but [2, 11, 6, 10] is right", ".unflatten(-1, (m, width))", ""),
    (
        9,
        "'Tensor' object has no attribute 'chop'",
        "c_KV, k_R = rows.split(",
        "c_KV, k_R = rows.chop(",
    ),
    (9, "`attend`, which got what this returned", "attend(q, k, v_C", "attend(q, k[..., :3], v_C"),
    (
        7,
        "off by nan, in token 0",
        "k_R = to_heads(self.W_KR",
        "c_KV[:, 0] = torch.nan; k_R = to_heads(self.W_KR",
    ),
    (
        10,
        "less than half",
        "q_C, q_R = self.queries(x, positions, m)\n",
        "return self.read(x, rows, positions, m)\n",
    ),
]


@pytest.mark.parametrize(
    "number, words, old, new", GRADED, ids=[f"{number}: {words}" for number, words, *_ in GRADED]
)
def test_wrong_answers_fail_with_a_line_and_what_is_wrong_in_words(number, words, old, new):
    assert old in REFERENCE, "matmla.py no longer says this"
    answers = REFERENCE.replace(old, new)
    with pytest.raises(pytest.fail.Exception, match=re.escape(words)) as failure:
        proofs.grade(number, answers)
    line = re.match(rf"my_matmla.py:(\d+): exercise {number}, ", str(failure.value))[1]
    where = next((new for new in ("rows.chop(", "k[..., :3]") if new in answers), "def ")
    assert where in answers.splitlines()[int(line) - 1]


@pytest.mark.parametrize("number, functions", [*enumerate(exercises.EXERCISES.values(), 1)])
def test_reference_passes_and_each_answer_put_back_into_the_blank_passes_alone(number, functions):
    tree, answers = ast.parse(BLANK), exercises.definitions(ast.parse(REFERENCE))
    for name in functions:
        exercises.definitions(tree)[name].body = answers[name].body
    assert load(REFERENCE).absorb_below(512, 128) == 512 / 3  # DeepSeek-V3's
    proofs.grade(number, REFERENCE)
    proofs.grade(number, ast.unparse(tree))


def test_command_line_writes_once_without_an_answer_and_grades_what_is_there(
    tmp_path, monkeypatch, capsys
):
    mine = tmp_path / "mine.py"
    monkeypatch.setenv("MATMLA", str(mine))
    monkeypatch.setattr(sys, "argv", ["exercises.py", str(mine)])
    command = f'cd "{exercises.HERE}" && "{sys.executable}" -m pytest -q test_matmla.py -k "exercise or rope_turns"'
    status, said = subprocess.getstatusoutput(command)
    assert status != 0 and "nothing to grade" in said
    exercises.main()
    with pytest.raises(SystemExit, match="2"):
        exercises.main()
    assert mine.read_text("utf-8") == BLANK and capsys.readouterr().err.count("\n") == 1
    assert not [
        answer for answer in ("d_c * ", "W_UKᵀ q_C)", "groupby(", "heads=tuple(") if answer in BLANK
    ]
    train = f'"{sys.executable}" "{exercises.HERE}/train.py" --tokens 300000 >/dev/null'
    said = subprocess.getstatusoutput(f'cd "{tmp_path}" && MATMLA=mine PYTHONPATH=. {train}')
    assert said == (2, "train.py: exercise 11: the mixed objective")
    mine.write_text(BLANK + AT_THE_END, "utf-8")
    status, said = subprocess.getstatusoutput(command)
    assert "half done, Attention.forward still to be written" in said and said.endswith(
        "2 of 14 done"
    )
    mine.write_text("\ndef (\n" + BLANK, "utf-8")
    status, said = subprocess.getstatusoutput(command)
    assert (
        said.count("FAILED") == 1
        and "mine.py:2: SyntaxError" in said
        and said.endswith("0 of 14 done")
    )
