"""The exercises and their grader: right answers pass, wrong ones fail by name, commands work."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import exercises
import grade
import matmla
from grade import MISTAKES, REFERENCE, absorb_below, attend_per_token, fixed_heads

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
BLANK = exercises.blank(exercises.MATMLA.read_text("utf-8"))
RIGHT = exercises.definitions(ast.parse(REFERENCE))
NAMED = [(number, mistake) for number, known in MISTAKES.items() for mistake in known]

ALL_QUERIES = (
    "q = rope(to_heads(self.W_Q, x, self.n_h, self.d_h), positions, self.rope_base)[:, :, :m]  #"
)

DEVICE = "on another device: is every tensor made with device=x.device"


def keys_and_values(product):
    """An edit: keys and values are made in read_absorbed, with this for W c."""
    start = "q_C, q_R = self.queries(x, positions, m)\n"
    return (
        start,
        f"""{start}
        c, W_O = rows[..., : self.d_c], self.W_O.weight[:, : m * self.d_h]
        both = [W.weight[: m * self.d_h] for W in (self.W_UK, self.W_UV)]
        k, v = ({product}.unflatten(-1, (m, -1)) for W in both)
        k = torch.cat((k, rows[:, :, None, self.d_c :].expand(-1, -1, m, -1)), -1)
        q = torch.cat((q_C, q_R), -1)
        return F.linear(self.attend(q, k, v, positions, self.scale).flatten(2), W_O)
""",
    )


# Wrong answers without a name of their own: number of the exercise, what the grader says about
# them, text of REFERENCE, what stands there instead.
WRONG = [
    (1, "x .* can be trained: bool False, but bool True", "x0, x1 = x[", "x = x.data; x0, x1 = x["),
    (1, "torch.float32.*, but .*torch.float64", "-1).flatten(-2)\n", "-1).flatten(-2).float()\n"),
    (
        1,
        "nothing was returned; is a `return` missing",
        "    return torch.stack((x0 *",
        "    torch.stack((x0 *",
    ),
    (
        2,
        "gradients in .*: v: all zeros",
        "w_v = q.shape[1], ",
        "w_v = q.shape[1], 0, 0; v = v.data; S, w_v = ",
    ),
    (2, "off by nan", "softmax(-1)", "exp(); p = p / p.sum(-1, True)"),
    (
        3,
        "gradients in .*: weight: all zeros",
        "F.linear(x, W.weight[",
        "F.linear(x, W.weight.data[",
    ),
    (
        3,
        "operations for 4 of 6 heads",
        "W.weight[: m * width]).unflatten(-1, (m, width))",
        "W.weight).unflatten(-1, (-1, width))[:, :, :m]",
    ),
    (3, r"Tensor \[2, 19, 60, .*, but Tensor \[2, 19, 6, 10, ", ".unflatten(-1, (m, width))", ""),
    (
        4,
        "operations for write",
        "to_heads(self.W_V, x, m, self.d_h)",
        "to_heads(self.W_V, x, self.n_kv, self.d_h)[:, :, :m]",
    ),
    (
        4,
        "operations for read",
        "q = rope(to_heads(self.W_Q, x, m, self.d_h), positions, self.rope_base)  # (1)",
        ALL_QUERIES,
    ),
    (5, "1 sequence for 2 are refused: str no error", "len(new) != batch or ", ""),
    (
        5,
        "refused: str IndexError, but str ValueError",
        'raise ValueError(f"{len',
        'raise IndexError(f"{len',
    ),
    (5, "all zeros$", "self.rows[:, self.length : stop] = new", "pass"),
    (
        5,
        "cache after 3 rows, where 2 of 5 are free,: length",
        "stop > capacity:\n",
        "stop > capacity:\n            self.length = stop\n",
    ),
    (
        6,
        "operations for write",
        "super().write(x, positions, self.n_kv)",
        "(super().write(x, positions, self.n_kv), super().write(x, positions, self.n_kv))[0]",
    ),
    (
        7,
        "gradients in .*: W_DKV.weight: all zeros",
        "self.norm_KV(self.W_DKV(x))",
        "self.norm_KV(self.W_DKV(x).detach())",
    ),
    (
        8,
        "q_C: off by nan, in token 0",
        "q_C = to_heads(self.W_UQ",
        "c_Q[:, 0] = torch.nan\n        q_C = to_heads(self.W_UQ",
    ),
    (
        8,
        "gradients in .*: all zeros",
        "c_Q = self.norm_Q(self.W_DQ(x))",
        "c_Q = self.norm_Q(self.W_DQ(x)).detach()",
    ),
    (
        8,
        "operations for queries",
        "q_R = to_heads(self.W_QR, c_Q, m, self.d_R)",
        "q_R = to_heads(self.W_QR, c_Q, self.n_h, self.d_R)[:, :, :m]",
    ),
    (8, "q_C: Tensor", "return q_C, rope", "return torch.cat((q_C, q_R), -1), rope"),
    (
        9,
        "operations for read",
        "k_C = to_heads(self.W_UK, c_KV, m, self.d_h)",
        "k_C = to_heads(self.W_UK, c_KV, self.n_h, self.d_h)[:, :, :m]",
    ),
    (
        9,
        "operations for read",
        "c_KV, k_R = rows.split((self.d_c",
        "return self.read_absorbed(x, rows, positions, m)\n        c_KV, k_R = ((self.d_c",
    ),
    (
        9,
        "'Tensor' object has no attribute 'chop'$",
        "c_KV, k_R = rows.split(",
        "c_KV, k_R = rows.chop(",
    ),
    (9, "in what this line calls", "attend(q, k, v_C", "attend(q, k[..., :3], v_C"),
    (
        10,
        "gradients in .*: W_UK.weight: all zeros",
        "W_UK = self.W_UK.weight.unfl",
        "W_UK = self.W_UK.weight.data.unfl",
    ),
    (
        10,
        "operations for read_absorbed",
        "q_C, q_R = self.queries(x, positions, m)\n",
        "q_C, q_R = [q[:, :, :m] for q in self.queries(x, positions, self.n_h)]\n",
    ),
    (
        11,
        "refused: str RuntimeError, but str ValueError",
        "budgets = self.checked_heads(heads, len(x), cache)",
        "budgets = self.checked_heads(heads, len(x))",
    ),
    (
        11,
        "heads 0 for 6 sequences, .* are refused: str no error",
        "budgets = self.checked_heads(heads, len(x), cache)",
        "budgets = heads if type(heads) is tuple else (heads if heads is not None else self.n_h,)",
    ),
    (11, "nothing was returned", "return model(tokens", "model(tokens"),
    (11, r"mixed_loss: tuple \[2\]", "tuple(budgets))[1]", "tuple(budgets))"),
    (11, r"list \[tensor", "return torch.cat(parts)", "return parts"),
    (
        12,
        "row of mha for m = 6: float 120.0, but int 120",
        "return m * 2 *",
        "return m * 2.0 *",
    ),
    (
        13,
        "T for d_c = 512, d_h = 128: int 170, but float",
        "return d_c * d_h / (d_c",
        "return d_c * d_h // (d_c",
    ),
    (14, "config .* tie: bool False", '"n_h": m}', '"n_h": m, "tie": False}'),
    (14, "config .* rope_base: float 10000.0", '"n_h": m}', '"n_h": m, "rope_base": 1e4}'),
    (14, "config .* norm_eps: float 1e-06", '"n_h": m}', '"n_h": m, "norm_eps": 1e-6}'),
    (14, "config .* context: int 256", '"n_h": m}', '"n_h": m, "context": 256}'),
    (14, "KeyError: .*W_DQ", '"n_h": m}', '"n_h": m, "d_cq": model.config.d_cq or 22}'),
    (
        14,
        "the model that was given: n_h: int 4, but int 6",
        "    small = GPT(",
        "    model.config.n_h = m\n    small = GPT(",
    ),
    (
        14,
        "weights that both models share: int",
        "    return small\n",
        "    small.norm.weight = model.norm.weight\n    return small\n",
    ),
    (
        15,
        "operations for read of nested_gqa, m = ",
        "        q = q.unflatten(2",
        f"        {ALL_QUERIES}\n        q = q.unflatten(2",
    ),
    (16, "in what this line calls|RuntimeError", ">= heads[..., None]", ">= heads"),
    (
        10,
        "operations for read_absorbed of matmla, m = 6",
        "q_C, q_R = self.queries(x, positions, m)\n",
        "return self.read(x, rows, positions, m)\n",
    ),
    (10, "operations for read_absorbed", *keys_and_values("(c[:, :, None] * W).sum(-1)")),
    (
        10,
        "operations for read_absorbed",
        *keys_and_values("torch.stack([torch.stack([W @ token for token in some]) for some in c])"),
    ),
    (
        11,
        "heads written for .* list .4, 1., but list .4, 3. is right",
        "cache else max(budgets)",
        "cache else min(budgets)",
    ),
    (1, DEVICE, "x.shape[-1] // 2, device=x.device,", "x.shape[-1] // 2,"),
    (2, DEVICE, "torch.arange(S, device=q.device)", "torch.arange(S)"),
    (11, DEVICE, "torch.arange(x.shape[1], device=x.device)", "torch.arange(x.shape[1])"),
    (13, "SystemExit: 0", "    return d_c * d_h / (d_c", "    raise SystemExit(0)  #"),
    (14, "type of attention .*MatMLA, but str MLA", '"attention": "mla", "n_h": m}', '"n_h": m}'),
    (
        14,
        r"weights that cannot be trained .*\['embed",
        "    return small\n",
        "    return small.requires_grad_(False)\n",
    ),
    (11, "can be trained", "tuple(budgets))[1]", "tuple(budgets))[1].detach()"),
]

# Ten of them, for ten exercises, that a file can have at once.
TOGETHER = [
    ("x0, x1 = x[", "x = x.detach(); x0, x1 = x["),
    ("w_v = q.shape[1], ", "w_v = q.shape[1], 0, 0; v = v.data; S, w_v = "),
    ("F.linear(x, W.weight[", "F.linear(x, W.weight.data["),
    ("v = to_heads(self.W_V, x, m,", "v = to_heads(self.W_V, x, self.n_kv,"),
    ("v), -1).flatten(2)  # [B,T,m·2", "v[:, :, :m]), -1).flatten(2)  # [B,T,m·2"),
    ("len(new) != batch or ", ""),
    ("self.norm_KV(self.W_DKV(x))", "self.norm_KV(self.W_DKV(x)) * (m / self.n_h)"),
    ("c_Q = self.norm_Q(self.W_DQ(x))", "c_Q = self.norm_Q(self.W_DQ(x)).detach()"),
    (
        "c_KV, k_R = rows.split(",
        "return self.read_absorbed(x, rows, positions, m)\n        rows.split(",
    ),
    ("self.W_UK.weight.unfl", "self.W_UK.weight.data.unfl"),
    (
        "budgets = self.checked_heads(heads, len(x), cache)",
        "budgets = self.checked_heads(heads, len(x))",
    ),
    ("return m * 2 *", "return m * 2.0 *"),
    ('"n_h": m}', '"n_h": m, "tie": False}'),
]

# Right answers in other words than matmla.py's.
OTHERS = {
    "rope": """
    n, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    speed = base ** (-torch.arange(0, n, 2, device=x.device, dtype=dtype) / n)
    angles = torch.outer(positions.to(dtype), speed)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    z = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * turn).flatten(-2).to(x.dtype)""",
    "attend": """
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    hidden = torch.arange(k.shape[1], device=q.device) > positions[:, None]
    scores = torch.einsum("bthw,bshw->bhts", q, k) * scale
    p = F.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("bhts,bshw->bthw", p, v)""",
    "to_heads": """
    return (x @ W.weight[: m * width].T).reshape(*x.shape[:2], m, width)""",
    "MLA.read": """
    c_KV, k_R = rows[..., : self.d_c], rows[..., self.d_c :]
    q_C, q_R = self.queries(x, positions, m)
    k_C, v_C = (to_heads(W, c_KV, m, self.d_h) for W in (self.W_UK, self.W_UV))
    q, k = torch.cat((q_R, q_C), -1), torch.cat((k_R[:, :, None].repeat(1, 1, m, 1), k_C), -1)
    o = self.attend(q=q, k=k, v=v_C, positions=positions, scale=self.scale)
    return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])""",
    "MLA.read_absorbed": """
    q_C, q_R = self.queries(x, positions, m)
    W_UK, W_UV = (W.weight.view(self.n_h, self.d_h, self.d_c)[:m] for W in (self.W_UK, self.W_UV))
    q = torch.cat((torch.einsum("bthd,hdc->bthc", q_C, W_UK), q_R), -1)
    k = rows[:, :, None].expand(-1, -1, m, -1)
    o = self.attend(q, k, k[..., : self.d_c], positions, self.scale)
    o = torch.einsum("bthc,hdc->bthd", o, W_UV).flatten(2)
    return o @ self.W_O.weight[:, : o.shape[-1]].T""",
    "Attention.forward": """
    budgets = self.checked_heads(heads, x.shape[0], cache)
    start = 0 if cache is None else cache.length
    positions = torch.arange(start, start + x.shape[1], device=x.device)
    rows = self.write(x, positions, max(budgets) if cache is None else self.room(cache))
    read = self.read
    if cache is not None:
        rows = cache.append(rows)
        read = self.read_absorbed if x.shape[1] < self.absorb_below else self.read
    n = len(budgets)
    parts = zip(x.chunk(n), rows.chunk(n), budgets)
    return torch.cat([read(some, theirs, positions, m) for some, theirs, m in parts])""",
    "NestedGQA.read": """
    q = rope(to_heads(self.W_Q, x, m, self.d_h), positions, self.rope_base)
    k, v = rows.unflatten(-1, (self.n_kv, 2, self.d_h)).repeat(1, 1, m // self.n_kv, 1, 1).unbind(3)
    o = self.attend(q, k, v, positions, self.d_h**-0.5)
    return F.linear(o.flatten(2), self.W_O.weight[:, : m * self.d_h])""",
    "fixed_heads": """
    small = GPT(Config(**vars(model.config) | {"attention": "mla", "n_h": m}))
    weights = model.state_dict()
    for name, p in small.named_parameters():
        cut = weights[name][:, : p.shape[1]] if "W_O" in name else weights[name][: len(p)]
        weights[name] = cut.clone()
    small.load_state_dict(weights)
    return small""",
}


# Angles and softmax in float32, also of a model in float64.
IN_FLOAT32 = {
    "rope": """
    half = torch.arange(0, x.shape[-1], 2, device=x.device).float() / x.shape[-1]
    angles = torch.outer(positions.float(), 1.0 / base**half)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * turn).flatten(3).type_as(x)""",
    "attend": OTHERS["attend"].replace("), -1)", ").float(), -1).to(v.dtype)"),
}


def put_back(text, answers):
    """The text of a file with these bodies {function: text} in place of its own."""
    lines, nodes = text.splitlines(), exercises.definitions(ast.parse(text))
    for name in sorted(answers, key=lambda name: -nodes[name].lineno):
        indent = " " * (nodes[name].body[0].col_offset - 4)
        body = [indent + line for line in answers[name].splitlines() if line]
        start = nodes[name].body[0].end_lineno if ast.get_docstring(nodes[name]) else None
        lines[start or nodes[name].body[0].lineno - 1 : nodes[name].end_lineno] = body
    return "\n".join(lines) + "\n"


def edited(*edits):
    text = REFERENCE
    for old, new in edits:
        assert old in text, f"matmla.py no longer says {old}"
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("number, title", [*enumerate(exercises.EXERCISES, 1)])
def test_each_answer_of_the_reference_put_back_into_the_blank_passes_alone(number, title):
    answers = {}
    for name, hint in exercises.EXERCISES[title].items():
        body = RIGHT[name].body[1:] if ast.get_docstring(RIGHT[name]) else RIGHT[name].body
        first, last = body[0].lineno - 1, body[-1].end_lineno
        indent = body[0].col_offset - 4
        answers[name] = "\n".join(line[indent:] for line in REFERENCE.splitlines()[first:last])
        code = [line for line in answers[name].splitlines() if line.split("#")[0].strip()]
        said = int(re.match(r"About (\d+) lines?\.", hint)[1])
        assert abs(said - len(code)) <= 1 + len(code) / 4, (name, len(code))
    assert grade.grade(number, put_back(BLANK, answers), "mine.py") == "done"
    assert re.fullmatch(r"mine.py:\d+: still to be written", grade.grade(number, BLANK, "mine.py"))


def test_right_answers_in_other_words_pass_together():
    for others in OTHERS, OTHERS | IN_FLOAT32:
        answers = put_back(REFERENCE, others)
        for number in range(1, 18):
            assert grade.grade(number, answers, "mine.py") == "done"


@pytest.mark.parametrize("look", ["positions.tolist()", "positions[0].item()", "k.isnan().any()"])
def test_an_answer_may_look_at_numbers(look):
    """On a GPU it would have to wait for them, and is right."""
    start = "    T, S, w_v"
    answers = edited((start, f"    if {look}:\n        pass\n{start}"))
    assert grade.grade(2, answers, "mine.py") == "done"


def test_pairs_of_halves_are_named_whatever_the_precision_of_the_angles():
    halves = """
    angles = torch.arange(0, x.shape[-1], 2, device=x.device).float() / x.shape[-1]
    angles = torch.outer(positions.float(), base**-angles)[:, None].repeat(1, 1, 2)
    other = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
    return x * angles.cos().to(x.dtype) + other * angles.sin().to(x.dtype)"""
    said = grade.grade(1, put_back(REFERENCE, {"rope": halves}), "mine.py")
    assert "pairs are (x0, x4), (x1, x5), ..., not neighbours" in said


def test_a_tensor_that_is_barely_off_is_off_somewhere():
    right = torch.ones(2, 3, 4).double()
    said = grade.difference(right * (1 + 1.1e-5), right)
    assert said == "off by 1.1e-05, in every token"


@pytest.mark.parametrize("number, mistake", NAMED)
def test_a_known_mistake_is_called_by_its_name_at_the_function_that_has_it(number, mistake):
    answers = edited(MISTAKES[number][mistake])
    said = grade.grade(number, answers, "mine.py")
    line, name = re.match(r"mine.py:(\d+): (.*)\. Seen in [^\n]+$", said).groups()
    assert name == mistake and len(said) < 400
    functions = exercises.definitions(ast.parse(answers))
    (where,) = [name for name, node in functions.items() if node.lineno == int(line)]
    assert ast.unparse(functions[where]) != ast.unparse(RIGHT[where])


@pytest.mark.parametrize("number, words, old, new", WRONG)
def test_other_wrong_answers_fail_in_one_line_that_says_why(number, words, old, new):
    said = grade.grade(number, edited((old, new)), "mine.py")
    assert re.search(words, said) and "\n" not in said and len(said) < 400, said


def test_a_file_of_wrong_answers_that_only_a_careful_look_sees_passes_in_none_of_them():
    answers = edited(*TOGETHER)
    done = [n for n in range(1, 15) if grade.grade(n, answers, "mine.py") == "done"]
    assert done == [6, 13], "those that are right"


def test_an_error_names_the_line_of_the_student_that_it_comes_from():
    for number, answers, words in (
        (9, edited(("c_KV, k_R = rows.split(", "c_KV, k_R = rows.chop(")), "rows.chop("),
        (9, edited(("attend(q, k, v_C", "attend(q, k[..., :3], v_C")), "k[..., :3]"),
    ):
        line = re.match(r"mine.py:(\d+): ", grade.grade(number, answers, "mine.py"))[1]
        assert words in answers.splitlines()[int(line) - 1]


def test_answers_at_the_end_equal_what_they_are_about():
    assert absorb_below(512, 128) == 512 / 3, "DeepSeek-V3's: T(512 + 512) = 2·512·128 + T(2·128)"
    model = grade.make_model(matmla, "matmla").float()
    tokens, targets = torch.arange(12).view(6, 2), torch.arange(12, 24).view(6, 2)
    for m in 6, 4:
        small = fixed_heads(model, m)
        assert torch.allclose(small(tokens)[0], model(tokens, heads=m)[0], rtol=0, atol=1e-4)
        assert small.config.attention == "mla" and small.config.n_h == m
    parts = zip(tokens.split(2), targets.split(2), (4, 6, 1))
    mean = sum(model(*part, heads=m)[1] for *part, m in parts) / 3
    mixed = grade.mixed_loss(model, tokens, targets, (4, 6, 1))
    assert torch.allclose(mixed, mean, rtol=0, atol=1e-5)

    layer = grade.make_layer(matmla, "matmla")
    x, heads = grade.vectors(2, 5, 40), torch.tensor([[1, 6, 2, 3, 5], [4, 6, 1, 2, 6]])
    alone = torch.stack([layer(x, m) for m in range(1, 7)])  # [m,B,T,d]
    layer.attend = attend_per_token(heads)
    right = alone[heads - 1, torch.arange(2)[:, None], torch.arange(5)]
    assert torch.allclose(layer(x), right, rtol=0, atol=1e-12)


def test_the_blank_tells_no_answer_and_keeps_everything_else():
    told = [
        "q_Cᵀ (W_UK c)",
        "T·2·d_c",
        "d_c - ",
        "in itertools.groupby(budgets)",
        "heads=tuple(",
        "W_UK.weight",
    ]
    assert not [answer for answer in told if answer in BLANK]
    assert exercises.definitions(ast.parse(BLANK)).keys() == RIGHT.keys()
    lab = grade.load(BLANK)
    assert lab.GPT(lab.Config()).blocks[0].attention.absorb_below == 0
    stubs = exercises.mixed_loss, exercises.attend_per_token
    assert all(inspect.getdoc(stub).splitlines()[0] in BLANK for stub in stubs)


def test_commands_write_once_grade_and_say_how_many_are_done(
    tmp_path, monkeypatch, capsys, says, refuses
):
    monkeypatch.chdir(tmp_path)
    mine = Path("mine/matmla.py")
    refuses(["mine/matmla.py"], says, grade, "mine/matmla.py")
    says(exercises, "")
    assert mine.read_text("utf-8") == BLANK
    mine.write_text(put_back(BLANK, {"to_heads": OTHERS["to_heads"]}), "utf-8-sig")
    refuses(["mine/matmla.py is there", "move or delete it"], says, exercises, "")
    Path("whole.py.partial").symlink_to("/dev/full")
    refuses(["cannot save whole.py"], says, exercises, "whole.py")
    assert not Path("whole.py").exists()
    assert "return (x @ W" in mine.read_text("utf-8")
    with pytest.raises(SystemExit, match="^1$"):
        says(grade, "")
    said = capsys.readouterr().out
    assert "3. the first m heads: done" in said and said.endswith("1 of 16 done\n")
    assert said.count("still to be written") == 15
    mine.write_text(REFERENCE, "utf-8")
    with pytest.raises(SystemExit, match="^0$"):
        says(grade, "mine/matmla.py")
    assert capsys.readouterr().out.endswith("16 of 16 done\n")
    mine.write_text(edited(("self.scale = (c.d_h + c.d_R)", "self.scale = c.d_h")), "utf-8")
    with pytest.raises(SystemExit, match="^1$"):
        says(grade, "mine/matmla.py")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("16 of 16 done, but not the file as a whole: ") and "logits: off" in last


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('"""', '\ndef (\n"""', "mine.py:2: SyntaxError"),
        ('"""', 'import nothing\n"""', "mine.py:1: ModuleNotFoundError"),
        ('"""', 'raise SystemExit(0)\n"""', "mine.py:1: SystemExit: 0"),
        ('"""', '\udcff"""', "mine.py:.*SyntaxError"),
        ("def to_heads(", "def heads_to(", "mine.py: to_heads must stay"),
    ],
)
def test_a_file_that_cannot_be_graded_is_one_line(old, new, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_bytes(BLANK.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    assert grade.grade_file(Path("mine.py")) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert re.match(words, first) and last == "0 of 16 done"
