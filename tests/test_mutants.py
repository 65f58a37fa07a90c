"""Tests of the tests: break matmla.py, and a named test fails; give a wrong answer to an exercise, and it is named."""

import ast
import inspect
import os
import re
import subprocess
import sys

import pytest

import exercises
import test_matmla as proofs
from tests.grading import ATTEND, REFERENCE, WRONG, edited, load

MATMLA = (exercises.HERE / "matmla.py").read_text("utf-8")
MUTANTS = [    # what, begin of the name of the test that must fail, its arguments, text of matmla.py, new text
    ("RoPE turns halves", "rope_turns", (), *WRONG[1][1][1:]),
    ("RoPE counts in bfloat16", "rope_turns", (), *WRONG[1][3][1:]),
    ("a token sees the next", "any_chunking", ("mha",), "<= positions[:, None]", "<= positions[:, None] + 1"),
    ("RoPE starts at 0 in every chunk", "any_chunking", ("gqa",), *WRONG[11][0][1:]),
    ("what is read absorbed comes out through W_UK", "any_chunking", ("mla",), *WRONG[10][3][1:]),
    ("keys are cached before RoPE", "logits_equal_oracle", ("mha", 0), *WRONG[4][0][1:]),
    ("c_KV is cached before its norm", "cache_holds_the_normed", ("mla",), *WRONG[7][0][1:]),
    ("k_R is cached before RoPE", "cache_holds_the_normed", ("matmla",), *WRONG[7][1][1:]),
    ("the scale forgets d_R", "softmax_scale", ("mla",), "(c.d_h + c.d_R) ** -0.5", "c.d_h ** -0.5"),
    ("W_O is sliced from its end", "m_heads_are_a_separate_model", ("matmla",), *WRONG[9][5][1:]),
    ("all heads are computed", "m_heads_are_a_separate_model", ("matmla",), *WRONG[3][2][1:]),
    ("GQA leaves as much as MHA", "cache_bytes", ("gqa",), *WRONG[12][2][1:]),
    ("parts come back in another order", "tuple_of_budgets", ("nested_mha", (4, 6, 1)), *WRONG[11][3][1:]),
    ("equal parts count as one", "tuple_of_budgets", ("matmla", (6, 6, 4)), "len(list(same)) *", "1 *"),
    ("only the first part learns", "gradients_of_a_divided_batch", ("matmla",),
     "torch.cat(parts)", "torch.cat([parts[0], *(part.detach() for part in parts[1:])])"),
    ("a full cache is written with few heads", "full_cache_is_the_same", ("nested_mha",),
     "most if cache else max(budgets))", "max(budgets)); rows = F.pad(rows, (0, 120 - rows.shape[2]))"),
    ("the ragged cache may grow", "nested_mha_ragged", (), "cache.heads if cache else self.n_h", "self.n_h"),
    ("a cache counts what it refuses", "overfull_cache", ("mla",),
     "        if len(new) != batch", "        self.length = stop\n        if len(new) != batch"),
    ("0 heads are allowed", "wrong_heads", ("matmla", 0, "0 6"), "1 if self.nested", "0 if self.nested"),
    ("cross-entropy in bfloat16", "loss_is", (), "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),
    ("no weight tying", "input_and_output_embedding", (), "if config.tie:", "if False:"),
    ("residual weights are not scaled", "weights_are_drawn", ("mla",), "0.02 / (2 * config.n_layer) ** 0.5", "0.02"),
    ("weights are ten times too large", "weights_are_drawn", ("mha",), "0.02", "0.2"),
    ("a long prompt keeps its beginning", "the_end_of", (), "tokens[:, -context:]", "tokens[:, :context]"),
    ("the context is left early", "the_end_of", (), "cache.length == context", "cache.length >= context - 1"),
    ("a schedule is checked on the way", "all_budgets", (), "self.blocks[0].attention.check(m,", "print("),
    ("top_p before temperature", "sampling_takes", (0.5, None, 0.57, [1]), "p.cumsum(-1) - p < top_p",
     "(t := logits[:, :top_k].softmax(-1)).cumsum(-1) - t < top_p"),
    ("top_k after top_p", "sampling_takes", (1.0, 3, 0.75, [1, 3]), "[:, :top_k].softmax(-1)", ".softmax(-1)",
     "< top_p)", "< top_p) * (torch.arange(p.shape[1]) < (top_k or p.shape[1]))"),
    ("top_p cuts one too many", "sampling_takes", (1.0, None, 0.6, [1, 3]), "(-1) - p < top_p", "(-1) < top_p"),
    ("a draw takes what top_p removed", "a_token_of_probability_0", (), "(ends <= u)", "(ends.flip(-1) >= u)"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_broken_matmla_fails_the_test_that_names_it(mutant, monkeypatch):
    _, test, arguments, *edits = mutant
    (test,) = [value for name, value in vars(proofs).items() if name.startswith(f"test_{test}")]
    arguments += (monkeypatch,) if "monkeypatch" in inspect.signature(test).parameters else ()
    test(*arguments)
    monkeypatch.setattr(proofs, "matmla", load(edited(MATMLA, edits)))
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        test(*arguments)


def verdict(number, answers):
    """What the grader says: "done", or why not."""
    try:
        proofs.grade(number, answers)
        return "done"
    except (pytest.fail.Exception, pytest.skip.Exception) as said:
        return str(said)


@pytest.mark.parametrize("number", WRONG)
def test_wrong_answers_fail_with_what_is_wrong_in_words(number):
    assert len(WRONG[number]) >= 3
    for why, *edits in WRONG[number]:
        said = verdict(number, edited(REFERENCE, edits))
        assert re.match(rf"my_matmla.py:\d+: exercise {number}, ", said) and why in said, (why, said)


EMPTY = exercises.blank(MATMLA)


@pytest.mark.parametrize("number, functions", [*enumerate(exercises.EXERCISES.values(), 1)])
def test_reference_passes_and_a_blank_is_not_begun_and_each_answer_put_back_passes_alone(number, functions):
    assert verdict(number, REFERENCE) == "done"
    assert verdict(number, EMPTY).endswith("not begun")
    assert verdict(number, put_back(functions)) == "done"
    if len(functions) > 1:
        said = verdict(number, put_back(list(functions)[1:]))
        assert f"half done, {next(iter(functions))} still to be written" in said


def put_back(functions):
    tree, answers = ast.parse(EMPTY), exercises.definitions(ast.parse(REFERENCE))
    for name in functions:
        exercises.definitions(tree)[name].body = answers[name].body
    return ast.unparse(tree)


TURNED = ATTEND.replace("bthw", "bhtw").replace('"bhtw,bshw', '"bthw,bshw')


@pytest.mark.parametrize("number, old, new, words", [
    (1, "-1).flatten(-2)\n", "-1).flatten(-2).double()\n", "the dtype is torch.float64, but torch.bfloat16 is right"),
    (2, "def to_heads(", f"{TURNED}def to_heads(", "[2, 6, 4, 7], but [2, 4, 6, 7] is right"),
    (2, *WRONG[2][1][1:], "first and last token seen by each of the last 4 of 11 tokens: "),
    (2, "def to_heads(", ATTEND.replace("* scale", "* 2 * scale") + "def to_heads(", "it is 2 times what is right"),
    (3, "return F.linear(x, W.weight[", "F.linear(x, W.weight[", "None, but a tensor is right"),
    (5, "raise ValueError(f\"{len(new)} x", "str(f\"{len(new)} x", "a ValueError for one row too many: not so"),
    (9, "c_KV, k_R = rows.split(", "c_KV, k_R = rows.chop(", "AttributeError: 'Tensor' object has no attribute 'chop'"),
    (10, "q_C, q_R = self.queries(x, positions, m)\n", "return self.read(x, rows, positions, m)\n", "less than half"),
    (11, "< self.short", "< 0", "how 3, 2, 6 tokens through a cache are read"),
])
def test_grader_says_where_and_which_dtype_shape_tokens_factor_or_cost(number, old, new, words):
    answers = edited(REFERENCE, (old, new))
    said = verdict(number, answers)
    assert words in said
    line = answers.splitlines()[int(re.match(r"my_matmla.py:(\d+): ", said)[1]) - 1]
    assert ".chop(" in line if "chop" in words else line.lstrip().startswith("def ")


def test_right_answers_by_another_road_and_with_helpers_pass():
    assert verdict(2, edited(REFERENCE, ("def to_heads(", ATTEND + "def to_heads("))) == "done"
    other = edited(REFERENCE, (                                                       # all keys, then all values
        "return torch.cat((k, v), -1).flatten(2)", "return self.both(k, v)",
        "rows = rows[..., : self.numbers(m)] ", "rows = rows.unflatten(-1, (2, -1))[..., : m * self.d_h] ",
        "rows.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1)", "rows.unflatten(-1, (-1, self.d_h)).unbind(2)",
        "class MHA(Attention):", "class MHA(Attention):\n    def both(self, *x): return torch.cat(flat(*x), -1)",
    ))
    helpers = "\nTWO = 2\nflat = lambda *x: [part.flatten(TWO) for part in x]\n"
    assert verdict(4, "from __future__ import annotations\n" + other + helpers) == "done"


def pytest_says(folder, text=None):
    if text is not None:
        (folder / "mine.py").write_text(text, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "test_matmla.py", "-k", "exercise", "-p", "no:cacheprovider"]
    env = os.environ | {"MATMLA": str(folder / "mine")}
    done = subprocess.run(command, cwd=exercises.HERE, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_command_line_grades_only_what_is_there(tmp_path):
    status, said = pytest_says(tmp_path)
    assert status != 0 and "nothing to grade" in said
    status, said = pytest_says(tmp_path, EMPTY)
    assert said.rstrip().endswith("0 of 14 done")
    status, said = pytest_says(tmp_path, EMPTY.replace("def attend(q", "def attend(q:"))
    assert status == 1 and said.count("FAILED") == 1 and re.search(r"mine.py:\d+: SyntaxError", said)
    assert said.rstrip().endswith("0 of 14 done")


def test_exercises_are_written_once_and_hold_no_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exercises.py", str(tmp_path / "copy.py")])
    exercises.main()
    empty = (tmp_path / "copy.py").read_text("utf-8")
    with pytest.raises(SystemExit) as refusal:
        exercises.main()
    assert refusal.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    for answer in ("d_c * ", "W_UKᵀ q_C)", "groupby(", "heads=tuple("):
        assert answer not in empty
    assert load(empty).GPT(load(empty).Config())
