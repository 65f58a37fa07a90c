"""Tests of the tests: break matmla.py, and a named test fails; give a wrong answer to an exercise, and it is named."""

import ast
import re
import subprocess
import sys

import pytest

import exercises
import test_matmla as proofs
from tests.grading import AT_THE_END, MATMLA, REFERENCE, WRONG, edited, load

BLANK = exercises.blank(MATMLA)
ANSWERS = exercises.definitions(ast.parse(AT_THE_END + MATMLA))    # attend is that of matmla.py, not of REFERENCE
MUTANTS = [    # begin of the name of the test that must fail, its arguments, what is wrong, text of matmla.py, new text
    ("rope_turns", (), *WRONG[1][1]),
    ("any_chunking", ("mha",), *WRONG[2][1]),
    ("any_chunking", ("gqa",), *WRONG[11][0]),
    ("any_chunking", ("mla",), *WRONG[10][3]),
    ("logits_equal_oracle", ("mha", 0), *WRONG[4][0]),
    ("cache_holds_the_normed", ("mla",), *WRONG[7][0]),
    ("cache_holds_the_normed", ("matmla",), *WRONG[7][1]),
    ("softmax_scale", ("mla", "monkeypatch"), "scale without d_R", "(c.d_h + c.d_R) ** -0.5", "c.d_h ** -0.5"),
    ("m_heads_are_a_separate_model", ("matmla",), *WRONG[9][5]),
    ("m_heads_are_a_separate_model", ("matmla",), *WRONG[3][3]),
    ("cache_bytes", ("gqa",), *WRONG[12][2]),
    ("tuple_of_budgets", ("nested_mha", (4, 6, 1)), *WRONG[11][3]),
    ("tuple_of_budgets", ("matmla", (6, 6, 4)), "equal parts count as one", "len(list(same)) *", "1 *"),
    ("gradients_of", ("matmla",), "only one part learns", "(parts)", "(parts[:1] + [p.detach() for p in parts[1:]])"),
    ("nested_mha_ragged", (), "the ragged cache may grow", "cache.heads if cache else self.n_h", "self.n_h"),
    ("loss_is", (), "cross-entropy in bfloat16", "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),
    ("input_and_output_embedding", (), "no weight tying", "if config.tie:", "if False:"),
    ("weights_are_drawn", ("mla",), "residual weights like the rest", "0.02 / (2 * config.n_layer) ** 0.5", "0.02"),
    ("weights_are_drawn", ("mha",), "all weights ten times too large", "0.02", "0.2"),
    ("the_end_of", (), "a long prompt keeps its beginning", "tokens[:, -context:]", "tokens[:, :context]"),
    ("the_end_of", (), "the end of the context is forgotten early", "== context:", ">= context - 1:"),
    ("all_budgets", (), "a schedule is checked on the way", "self.blocks[0].attention.check(m,", "print("),
    ("sampling", (0.5, None, 0.57, [1]), "top_p before temperature", "p.cumsum(-1) - p < top_p",
     "(t := logits[:, :top_k].softmax(-1)).cumsum(-1) - t < top_p"),
    ("sampling", (1.0, 3, 0.75, [1, 3]), "top_k after top_p", "[:, :top_k]", "", "ends = p.", "ends = p[:, :top_k]."),
    ("a_token_of", ("monkeypatch",), "a draw takes what top_p removed", "(ends <= u)", "(ends.flip(-1) >= u)"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant[2] for mutant in MUTANTS])
def test_broken_matmla_fails_the_test_that_names_it(mutant, monkeypatch):
    name, arguments, _, *edits = mutant
    (test,) = [value for key, value in vars(proofs).items() if key.startswith(f"test_{name}")]
    arguments = [monkeypatch if argument == "monkeypatch" else argument for argument in arguments]
    test(*arguments)
    monkeypatch.setattr(proofs, "matmla", load(edited(MATMLA, edits)))
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        test(*arguments)


GRADED = [(number, *wrong) for number in WRONG for wrong in WRONG[number]] + [    # and what else the grader says
    (1, "the dtype is torch.float64, but torch.bfloat16 is right", "-1).flatten(-2)\n", "-1).flatten(-2).double()\n"),
    (2, "it is 2 times what is right", " * scale", " * 2 * scale"),
    (3, "the shape is [2, 11, 60], but [2, 11, 6, 10] is right", ".unflatten(-1, (m, width))", ""),
    (3, "None, but a tensor is right", "return F.linear(x, W.weight[", "F.linear(x, W.weight["),
    (9, "'Tensor' object has no attribute 'chop'", "c_KV, k_R = rows.split(", "c_KV, k_R = rows.chop("),
    (10, "less than half", "q_C, q_R = self.queries(x, positions, m)\n", "return self.read(x, rows, positions, m)\n"),
]


@pytest.mark.parametrize("case", GRADED, ids=[f"{case[0]}: {case[1]}" for case in GRADED])
def test_wrong_answers_fail_with_a_line_and_what_is_wrong_in_words(case):
    number, words, *edits = case
    answers = edited(REFERENCE, edits)
    with pytest.raises(pytest.fail.Exception, match=re.escape(words)) as failure:
        proofs.grade(number, answers)
    line = re.match(rf"my_matmla.py:(\d+): exercise {number}, ", str(failure.value))[1]
    assert ("rows.chop(" if "chop" in words else "def ") in answers.splitlines()[int(line) - 1]


@pytest.mark.parametrize("number, functions", [*enumerate(exercises.EXERCISES.values(), 1)])
def test_reference_passes_and_each_answer_put_back_into_the_blank_passes_alone(number, functions):
    tree = ast.parse(BLANK)
    for name in functions:
        exercises.definitions(tree)[name].body = ANSWERS[name].body
    proofs.grade(number, REFERENCE)
    proofs.grade(number, ast.unparse(tree))


def test_a_right_answer_by_another_road_and_with_helpers_passes():
    edits = "return torch.cat((k, v), -1).flatten(2)", "return self.join(v, k)", "k, v = rows.unf", "v, k = rows.unf"
    method = "class MHA(Attention):\n    LAST = -1\n    def join(self, *x): return flat(x, self.LAST)\n"
    helper = "\nflat = lambda x, axis: torch.cat(x, axis).flatten(2)\n"
    proofs.grade(4, edited(REFERENCE, (*edits, "class MHA(Attention):\n", method)) + helper)


def test_command_line_writes_once_without_an_answer_and_grades_what_is_there(tmp_path, monkeypatch, capsys):
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
    assert not [answer for answer in ("d_c * ", "W_UKᵀ q_C)", "groupby(", "heads=tuple(") if answer in BLANK]
    mine.write_text(BLANK + AT_THE_END, "utf-8")
    status, said = subprocess.getstatusoutput(command)
    assert "half done, Attention.forward still to be written" in said and said.endswith("3 of 14 done")
    mine.write_text("\ndef (\n" + BLANK, "utf-8")
    status, said = subprocess.getstatusoutput(command)
    assert said.count("FAILED") == 1 and "mine.py:2: SyntaxError" in said and said.endswith("0 of 14 done")
