"""Tests of train.py: the recipe against a plain loop, interrupted and shared runs, mistakes of the user."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common    # the first of ours
import train
from data import windows
from matmla import GPT

torch.set_num_threads(1)    # the tensors are tiny: threads would only wait for each other
HERE = Path(train.__file__).parent
ENV = os.environ | {"PYTHONPATH": str(HERE), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
SMALL = ("--device cpu --tokens 300000 --n-layer 1 --d 24 --d-h 4 --d-c 12 --d-cq 8 --d-R 4 --d-ff 32 --context 32 "
         "--steps 3").split()


def main_of(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
    module.main()


def refuses(words, module, monkeypatch, capsys, *arguments):
    """It ends with status 2 and one line on stderr that has all of these words."""
    with pytest.raises(SystemExit) as stop:
        main_of(module, monkeypatch, *arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and all(word in message for word in words), message


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run([sys.executable, HERE / "train.py", *SMALL], cwd=folder, env=ENV, check=True)
    return folder


@pytest.fixture
def there(trained, monkeypatch):
    """In the folder of the trained run, where data is prepared."""
    monkeypatch.chdir(trained)
    return trained


def test_rate_rises_over_the_warmup_and_falls_over_the_last_60_percent_to_one_step_past_the_end():
    _, args = train.settings("--steps 10 --warmup 2".split())
    rates = [train.rate(step, args) for step in range(10)]
    assert rates == pytest.approx([1 / 2, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


@pytest.mark.parametrize("objective", ["mixed", "sum", "sample"])
def test_steps_are_those_of_a_plain_loop(objective, monkeypatch):
    """11 sequences in passes of 6 and 5, shares 2 and 1, two peak rates, windows of (seed, step). In float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)    # torch's Muon rounds on a CPU too, ours does not
    flags = "--budgets 3,1 --shares 2,1 --n-h 3 --batch 11 --micro-batch 6 --lr 0.03 --lr-adamw 0.01 --warmup 2 "
    _, args = train.settings([*SMALL, *(flags + "--seed 5 --objective " + objective).split()])
    tokens = np.random.default_rng(0).integers(257, size=500).astype(np.uint16)
    torch.manual_seed(0)
    ours, plain = (GPT(train.make_config(vars(args))).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    inside = [p for p in plain.blocks.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(inside, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [plain.embed.weight, plain.norm.weight, *(p for p in plain.blocks.parameters() if p.dim() == 1)]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = train.make_optimizers(ours)
    for step, rate in enumerate((1 / 2, 1, 1 / 1.8)):
        starts = np.random.default_rng((5, step)).integers(500 - 32, size=11)
        dealt = sorted(np.resize([3, 3, 1], 99)[11 * step : 11 * step + 11], reverse=True)    # by shares 2 and 1
        turns = {"mixed": [dealt], "sum": [[3] * 11, [3] * 11, [1] * 11], "sample": [[(3, 3, 1)[step]] * 11]}[objective]
        loss = 0
        for start, m in ((start, m) for budgets in turns for start, m in zip(starts, budgets)):
            x = torch.from_numpy(tokens[start : start + 33].astype(np.int64))
            loss += F.cross_entropy(plain(x[None, :-1], heads=m)[0][0], x[1:]) / (11 * len(turns))
        loss.backward()
        for optimizer, peak in ((muon, 0.03), (adamw, 0.01)):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        assert train.learn(ours, optimizers, tokens, step, args).item() == pytest.approx(loss.item(), rel=1e-9)
    for (name, p), right in zip(ours.named_parameters(), plain.parameters()):
        assert (p - right).norm() < 1e-7 * right.norm(), name


def test_training_flops_count_only_the_heads_that_are_computed():
    def cost(*flags):
        return train.flops_per_token(train.settings(["--context", "32", *flags])[1])

    fixed = [cost("--attention", "mla", "--n-h", m) for m in ("12", "8", "4")]
    assert fixed[0] > fixed[1] > fixed[2] and cost("--objective", "sum") == pytest.approx(sum(fixed))
    assert cost() == cost("--objective", "sample") == cost("--micro-batch", "2") == pytest.approx(sum(fixed) / 3)
    assert cost("--shares", "1,1,2", "--batch", "6") == pytest.approx((fixed[0] + fixed[1] + 2 * fixed[2]) / 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", train.PRESETS)
def test_compiled_gradients_on_a_gpu_are_those_of_the_block(preset):
    """In every kind of pass. To 20%: bfloat16 alone makes a few percent."""
    torch._dynamo.reset()
    _, args = train.settings(["--preset", preset])
    rows, mixed, _ = next(train.passes(args, 0))
    eager, compiled = (GPT(train.make_config(vars(args) | {"n_layer": 1})).cuda() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    train.compile_parts(compiled)
    for heads in (None, *args.budgets, mixed):
        x, towards = torch.randn(2, len(rows), args.context, args.d, device="cuda", dtype=torch.bfloat16).unbind()
        x.requires_grad_()
        with train.mixed_precision(x.device):
            losses = ((model, (model.blocks[0](x, heads) * towards).sum()) for model in (eager, compiled))
            right, found = (torch.autograd.grad(loss, [x, *model.blocks.parameters()]) for model, loss in losses)
        for name, a, b in zip(["its input", *dict(eager.blocks.named_parameters())], found, right):
            assert (a - b).norm() <= 0.2 * b.norm(), f"{name}, {len(rows)} sequences, heads {heads}"


def test_more_than_eight_budgets_are_all_compiled_once(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for limit in "recompile_limit", "accumulated_recompile_limit":
        monkeypatch.setattr(torch._dynamo.config, limit, 8)                 # put back afterwards
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    budgets = ",".join(str(m) for m in range(12, 0, -1))
    _, args = train.settings([*SMALL, "--n-layer", "2", "--objective", "sample", "--budgets", budgets])
    model = GPT(train.make_config(vars(args)))
    train.compile_parts(model)
    optimizers, tokens = train.make_optimizers(model), np.arange(500, dtype=np.uint16) % 257
    for step in range(14):
        with torch.compiler.set_stance("fail_on_recompile" if step >= 12 else "default"):
            train.learn(model, optimizers, tokens, step, args)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 12 + 1, f"{graphs} graphs, instead of one for each budget and one for the loss"


def test_train_reports_and_saves(there):
    lines, kept = log_of(Path("out")), train.load_checkpoint("out/checkpoint.pt")
    assert [x["step"] for x in lines] == [0, 0, 3, 3] and set(lines[2]["val_loss"]) == {"12", "8", "4"}
    assert lines[3]["final"]["val_loss"] == lines[2]["val_loss"] and lines[3]["final"]["tokens"] == 3 * 9 * 32
    val = np.fromfile(next(there.glob("data/*/val.bin")), np.uint16)
    starts = np.linspace(0, len(val) - 33, 256).astype(int)
    with torch.no_grad():
        loss = common.load("out/checkpoint.pt", "cpu")[0](*windows(val, starts, 32, torch.device("cpu")), heads=8)[1]
    assert lines[2]["val_loss"]["8"] == pytest.approx(loss.item(), abs=1e-5)
    assert kept["step"] == 3 and json.loads(json.dumps(kept["log"])) == lines


@pytest.mark.parametrize("end, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_runs_resume_as_if_never_stopped(end, status, there, monkeypatch):
    """Parameters, optimizers, losses and held-out losses are equal to the last bit."""
    flags, stopped = [*SMALL, "--steps", "40", "--eval-every", "10"], Path(f"stopped{status}")
    main_of(train, monkeypatch, *flags, "--out", "whole")
    command = [sys.executable, HERE / "train.py", *flags, "--out", stopped]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)
    while not (stopped / "metrics.jsonl").exists() or log_of(stopped)[-1]["step"] < 10:
        assert process.poll() is None
    process.send_signal(end)
    said = process.communicate()[1]
    assert process.returncode == status and log_of(stopped)[-1]["step"] < 40
    assert end == signal.SIGKILL or said.endswith(f"last {stopped}/checkpoint.pt: --resume --out {stopped}\n")
    main_of(train, monkeypatch, "--resume", "--out", stopped)
    whole, resumed = (train.load_checkpoint(out / "checkpoint.pt") for out in (Path("whole"), stopped))
    for state in whole, resumed:                                            # time goes on
        assert 0 < state.pop("seconds") <= state["log"].pop()["final"]["seconds"]
        assert [line["step"] for line in state["log"] if "loss" in line] == [0, 10, 20, 30]
    assert whole["log"] == resumed["log"] and whole["settings"] == resumed["settings"]
    for a, b in zip([whole["model"], *whole["optimizers"]], [resumed["model"], *resumed["optimizers"]], strict=True):
        torch.testing.assert_close(a.get("state", a), b.get("state", b), rtol=0, atol=0)
    assert whole["optimizers"][0]["state"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_like_one(there, monkeypatch):
    """The same batch in two halves, in several passes: the same losses and the same weights."""
    flags = [*SMALL, "--steps", "21", "--batch", "12", "--out"]
    main_of(train, monkeypatch, *flags, "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    subprocess.run([*launch, HERE / "train.py", *flags, "two", "--micro-batch", "4"], env=ENV, check=True)
    losses = [[line["loss"] for line in log_of(there / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    one, two = (train.load_checkpoint(there / name / "checkpoint.pt")["model"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


def test_diverging_run_stops_and_a_full_disk_keeps_the_old_checkpoint(there, monkeypatch, capsys):
    resource = pytest.importorskip("resource", reason="limits file sizes as a full disk would, on Unix")
    with pytest.raises(SystemExit) as stop:
        main_of(train, monkeypatch, *SMALL, "--lr", "1e38", "--out", "kept")
    assert stop.value.code == 1 and "lower --lr" in capsys.readouterr().err
    kept, limits = Path("kept/checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert all(p.isfinite().all() for p in train.load_checkpoint("kept/checkpoint.pt")["model"].values())
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        refuses(["cannot save kept/checkpoint.pt"], train, monkeypatch, capsys, *SMALL, "--out", "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("kept/checkpoint.pt").read_bytes() == kept and not list(Path("kept").glob("*.partial"))


def test_init_takes_sizes_tokens_and_weights_but_fresh_optimizers(there, monkeypatch):
    start = there / "out/checkpoint.pt"
    _, args = train.settings(f"--context 16 --budgets 9,2 --data elsewhere --init {start} --out new".split())
    assert (args.d, args.context, args.budgets, args.encoding, args.steps) == (24, 16, (9, 2), "bytes", 500)
    main_of(train, monkeypatch, "--init", start, "--steps", "1", "--tokens", "300000", "--device", "cpu", "--out", "on")
    assert log_of(there / "on")[0]["val_loss"] == log_of(there / "out")[2]["val_loss"]    # it starts where that ended
    assert train.load_checkpoint("on/checkpoint.pt")["optimizers"][1]["state"][0]["step"] == 1


def test_an_unfinished_exercise_is_one_line(tmp_path):
    before, body = "    dtype = torch.promote_types(x", '    raise NotImplementedError("exercise 1: RoPE")\n'
    text = (HERE / "matmla.py").read_text("utf-8").replace(before, body + before, 1)
    (tmp_path / "mine.py").write_text(text, "utf-8")
    command, env = [sys.executable, HERE / "train.py", *SMALL], ENV | {"MATMLA": "mine", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "train.py: exercise 1: RoPE\n"


@pytest.mark.parametrize("command, words", [
    ("--head 4", ["--head"]), ("--seed -1", ["--seed", "-1"]), ("--steps many", ["--steps", "positive", "many"]),
    ("--budgets 16,4", ["(16, 4)", "12"]), ("--budgets 4,12", ["(4, 12)", "largest first"]),
    ("--shares 1,2", ["(1, 2)", "3"]), ("--attention gqa --n-kv 5", ["12", "5"]), ("--attention linear", ["linear"]),
    ("--device abacus", ["abacus"]), ("--data nothing.jsonl", ["nothing.jsonl"]),
    ("--resume --out nothing", ["nothing/checkpoint.pt"]), ("--resume --d 48", ["--d 24", "48", "--init"]),
    ("--resume --steps 2", ["3 steps", "--steps 2"]), ("--resume --out untrained", ["untrained", "--init"]),
    ("--resume --out foreign", ["another version", "qkv_bias"]), ("--init broken.pt --out new", ["broken.pt"]),
    ("--init out/checkpoint.pt", ["--init", "another --out"]),
    ("--init out/checkpoint.pt --out new --d 48", ["out/checkpoint.pt", "24", "48"]),
    ("--init untied/checkpoint.pt --out new --tie", ["untied/checkpoint.pt", "--tie"]),
])
def test_mistakes_are_one_line_and_status_2(command, words, there, monkeypatch, capsys):
    saved = torch.load("out/checkpoint.pt", weights_only=True)
    changes = {"untrained": {"optimizers": []}, "untied": {"config": saved["config"] | {"tie": False}},
               "foreign": {"config": saved["config"] | {"qkv_bias": False}}}    # as an older version wrote
    for name, change in changes.items():
        Path(name).mkdir(exist_ok=True)
        torch.save(saved | change, f"{name}/checkpoint.pt")
    Path("broken.pt").write_bytes(b"not a checkpoint")
    refuses(words, train, monkeypatch, capsys, *command.split())
