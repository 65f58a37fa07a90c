"""Tests of train.py, muon.py, devices.py and common.py. GPU tests run where there is one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, Mock

import filelock
import numpy as np
import pytest
import torch

import common
import devices
import train
from devices import World
from matmla import GPT, Config
from test_matmla import make, some_tokens
from tokenizer import UserError

os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start; test_matmla says why
CPU = World(torch.device("cpu"))
SMALL = (
    "--device cpu --data text --tokenizer bytes --n-layer 2 --d 24 --d-h 4 --d-c 12 --d-cq 8 "
    "--d-R 4 --d-ff 32 --context 32 --objective layers --batch 12 --steps 40 --eval-every 10"
).split()
TOKENS = np.random.default_rng(0).integers(97, 123, size=20_000).astype(np.uint16)
UNTIED = common.FIELDS | {"tie": False}
GO_ON = "--resume --out odd --steps 50"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def settings(flags):
    return train.settings([*SMALL, "--out", "nowhere", *flags.split()])[1]


def run(*flags):
    parser, args = train.settings(flags)
    parser.run(train.train, args)


def log_of(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def saved(out):
    return common.load_checkpoint(Path(out, "checkpoint.pt"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with tokens in text and a finished run in out; tests work there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        Path("text").mkdir()
        TOKENS[:18_000].tofile("text/train.bin")
        TOKENS[18_000:].tofile("text/val.bin")
        run(*SMALL)
        yield


# ---------------------------------------------------------------- the objective


def plain_turns(objective, step):
    """What a step's 11 sequences are read with: lists of heads, one for each pass over them all."""
    turns = [3, 3, 1]
    of_this_step = np.resize(turns, 55)[11 * step : 11 * step + 11].tolist()
    layers = np.random.default_rng((5, step, 1)).choice(turns, 2).tolist()
    return {
        "mixed": [sorted(of_this_step, reverse=True)],
        "sum": [[m] * 11 for m in turns],
        "sample": [[turns[step % 3]] * 11],
        "layers": [[layers] * 11],
    }[objective]


@pytest.mark.parametrize("objective", train.OBJECTIVES)
def test_steps_are_those_of_a_plain_loop(objective, monkeypatch):
    """11 sequences in passes of 6 and 5, shares 2 and 1, rates that rise and fall. In float64.

    The oracle takes one sequence at a time, and torch's own Muon.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)  # torch's Muon rounds on a CPU too
    args = settings(
        "--budgets 3,1 --shares 2,1 --n-h 3 --batch 11 --micro-batch 6 --lr 0.03 --lr-adamw 0.01 "
        f"--warmup 2 --steps 5 --seed 5 --objective {objective}"
    )
    torch.manual_seed(0)
    ours, plain = (GPT(train.make_config(vars(args))).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    inside = [p for p in plain.blocks.parameters() if p.dim() == 2]
    rest = [plain.embed.weight, *(p for p in plain.parameters() if p.dim() == 1)]
    muon = torch.optim.Muon(inside, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = train.make_optimizers(ours)

    for step, rate in enumerate((1 / 2, 1, 1, 2 / 3, 1 / 3)):
        starts = np.random.default_rng((5, step)).integers(500 - 32, size=11)
        passes = plain_turns(objective, step)
        loss = 0
        for heads in passes:
            for start, m in zip(starts, heads):
                x = torch.from_numpy(TOKENS[start : start + 33].astype(np.int64))[None]
                loss += plain(x[:, :-1], x[:, 1:], m)[1] / 11 / len(passes)
        loss.backward()
        for optimizer, peak in ((muon, 0.03), (adamw, 0.01)):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        found = train.train_step(ours, optimizers, TOKENS[:500], step, args, CPU)
        assert found.item() == pytest.approx(loss.item(), rel=1e-9)
    for (name, p), right in zip(ours.named_parameters(), plain.parameters()):
        assert (p - right).norm() < 1e-7 * right.norm(), name


def test_layers_draw_by_their_shares_and_independently():
    """10,000 vectors of 5 layers: shares within three standard deviations, layers uncorrelated."""
    args = settings("--objective layers --n-layer 5 --shares 3,2,1")
    drawn = np.array([next(train.micro_batches(args, step))[1] for step in range(10_000)])
    for m, share in zip((12, 8, 4), (3 / 6, 2 / 6, 1 / 6)):
        found = (drawn == m).mean(0)  # of every layer
        assert (abs(found - share) < 3 * (share * (1 - share) / 10_000) ** 0.5).all()
    between_layers = np.corrcoef(drawn.T)[np.triu_indices(5, 1)]
    assert (abs(between_layers) < 4 / 10_000**0.5).all()
    between_steps = np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]
    assert abs(between_steps) < 4 / 10_000**0.5


@pytest.mark.parametrize(
    "flags, shares",
    [
        ("", (3, 2, 1)),
        ("--budgets 12,6", (2, 1)),
        ("--budgets 9,7,2 --n-h 9", (9, 7, 2)),
        ("--shares 1,1,5", (1, 1, 5)),
        ("--attention mla", (1,)),
        ("--attention nested_gqa --budgets 8,2", (4, 1)),
    ],
)
def test_shares_are_in_proportion_to_the_heads_unless_given(flags, shares):
    assert settings(flags).shares == shares


def test_a_model_has_a_budget():
    with pytest.raises(UserError, match="budgets .. must be different"):
        common.check_budgets((), Config())


def test_training_flops_are_those_of_the_heads_that_are_computed():
    """6 per weight and token, and attention's T x T scores and sums, forward and twice backward."""
    sizes = dict(d=24, d_h=4, d_c=12, d_cq=8, d_R=4, d_ff=32)
    alone = []
    for m in 12, 8, 4:
        model = GPT(Config("mla", vocab_size=257, n_layer=2, n_h=m, **sizes))
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        scores = 2 * 32 * m * (4 + 4 + 4)  # layers, T, heads, q·k of d_h + d_R and p·v of d_h
        alone.append(6 * weights + 6 * scores)
    for flags, right in (
        ("--attention mla --n-h 4", alone[2]),
        ("--shares 1,1,2", np.average(alone, weights=(1, 1, 2))),
        ("--objective mixed", np.average(alone, weights=(3, 2, 1))),
        ("--objective sum", sum(alone)),
    ):
        assert train.flops_per_token(settings(flags)) == pytest.approx(right)


# ---------------------------------------------------------------- compilers and graphs


def test_each_number_of_heads_is_compiled_once_for_all_layers_also_where_they_differ(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = GPT(Config(n_layer=2, n_h=9))  # more kinds than torch compiles by itself
    devices.compile_parts(model)
    for heads in [9, 5], [5, 9], 5, [5] * 2, *range(1, 10):
        model(*torch.zeros(2, 1, 8, dtype=int), heads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9 + 1  # and the loss


def test_where_nothing_compiles_training_goes_without_and_says_so(monkeypatch, capsys):
    fail = Mock(side_effect=RuntimeError("no compiler\nand a long story"))
    monkeypatch.setattr(torch, "compile", fail)
    assert not devices.can_compile(torch.device("cpu"))
    assert capsys.readouterr().out.endswith("which does not work here: no compiler\n")


def test_a_captured_pass_runs_once_per_step_on_what_it_is_given(monkeypatch):
    """The first pass of a kind runs, the second is captured. Without a GPU graphs are imitated."""
    for name in ("CUDAGraph", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    given = []

    def run_pass(model, x, y, heads, weight):
        given.append((x.tolist(), y.tolist(), heads, weight))

    passes = devices.CapturedPasses(run_pass)
    for i in range(4):
        passes("model", torch.tensor([i]), torch.tensor([i + 1]), (12, 4), 0.5)
    assert given == [([0], [1], (12, 4), 0.5), ([1], [2], (12, 4), 0.5)]
    assert torch.cuda.graph.call_count == 1
    assert torch.cuda.CUDAGraph().replay.call_count == 3
    assert [x.tolist() for x in passes.kinds[(12, 4), 1, 0.5][0]] == [[3], [4]]
    for tokens, heads, weight, kinds in (
        ([5], [12, 4], 0.5, 1),  # those of layers are never captured
        ([5], (12, 8), 0.5, 2),
        ([5], (12, 4), 0.2, 3),
        ([5, 6], (12, 4), 0.5, 4),
    ):
        passes("model", torch.tensor(tokens), torch.tensor(tokens), heads, weight)
        assert given[-1] == (tokens, tokens, heads, weight) and len(passes.kinds) == kinds


@gpu
@pytest.mark.parametrize("objective", train.OBJECTIVES)
@pytest.mark.parametrize("preset", common.PRESETS)
def test_compiled_and_captured_passes_on_a_gpu_are_those_of_plain_ones(preset, objective):
    """Gradients to 20%, the losses of 20 steps to 1e-3: both pass through bfloat16."""
    torch._dynamo.reset()
    flags = f"--preset {preset} --n-layer 2 --objective {objective} --micro-batch 12 --batch 24"
    _, args = train.settings([*flags.split(), "--out", "nowhere"])
    world = World(torch.device("cuda", 0))
    x, y = train.windows(TOKENS, np.arange(12), args.context, world.device)
    losses = []
    grads = {False: [], True: []}
    for captured in grads:
        args.compile = captured
        model, optimizers, run_pass = train.build(args, world)
        if not captured:
            run_pass = train.run_pass
            optimizers[0].directions = optimizers[0].directions.function
        for _, heads, weight in train.micro_batches(args, 0):
            for _ in range(3):  # as it is, captured, and from the graph alone
                model.zero_grad(set_to_none=False)
                run_pass(model, x, y, heads, weight)
            grads[captured] += [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=False)
        steps = (
            train.train_step(model, optimizers, TOKENS, step, args, world, run_pass)
            for step in range(20)
        )
        losses.append([loss.item() for loss in steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for right, found in zip(*grads.values(), strict=True):
        assert (found - right).norm() <= 0.2 * right.norm()


# ---------------------------------------------------------------- runs


def test_a_run_reports_and_saves_and_another_starts_from_its_sizes_tokens_and_weights(finished):
    lines = log_of("out")
    last = lines[8]["val_loss"]
    assert [line["step"] for line in lines] == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert saved("out")["step"] == 40 and json.loads(json.dumps(saved("out")["log"])) == lines
    assert lines[9]["final"]["val_loss"] == last and lines[9]["final"]["tokens"] == 40 * 12 * 32
    model, _ = common.load(Path("out/checkpoint.pt"), "cpu")
    assert list(last.values()) == common.evaluate(model, TOKENS[18_000:], 256, (12, 8, 4))

    start = "--init out/checkpoint.pt --out new --device cpu".split()
    _, args = train.settings([*start, "--context", "16"])
    assert (args.d, args.context, args.encoding, args.steps) == (24, 16, "bytes", 450)
    assert args.data == "stdlib"
    run(*start, "--data", "text", "--steps", "1")
    assert log_of("new")[0]["val_loss"] == last
    adamw = saved("new")["optimizers"][1]
    assert adamw["state"][0]["step"] == 1, "the first run's optimizer goes on"


def test_only_the_weights_that_are_named_are_trained(finished):
    start = "--init out/checkpoint.pt --out only --device cpu --data text --steps 2".split()
    run(*start, "--only", "W_DKV,W_UK")
    before, after = saved("out")["model"], saved("only")["model"]
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {f"blocks.{i}.attention.{W}.weight" for i in (0, 1) for W in ("W_DKV", "W_UK")}
    cost, cost_of_all = (log_of(out)[-1]["final"] for out in ("only", "out"))
    assert cost["flops"] / cost["tokens"] < 0.9 * cost_of_all["flops"] / cost_of_all["tokens"]
    run("--resume", "--out", "only", "--steps", "3")


def test_a_run_without_a_tokenizer_can_be_measured(finished):
    Path("numbers").mkdir()
    torch.save(saved("out") | {"encoding": None}, "numbers/checkpoint.pt")
    _, held_out, _ = common.load_run(Path("numbers"), "cpu")
    assert held_out.tolist() == TOKENS[18_000:].tolist()


@pytest.mark.parametrize(
    "end, status, at, step, words",
    [
        (signal.SIGINT, 130, 0, 0, "from the last checkpoint:"),
        (signal.SIGINT, 130, 27, 20, "from the last checkpoint:"),
        (signal.SIGTERM, 143, 13, 14, "after step 14 and saved; to go on:"),
        (signal.SIGTERM, 143, 19, 20, "after step 20 and saved; to go on:"),
    ],
)
def test_a_run_that_is_stopped_says_how_to_go_on_and_goes_on_as_if_it_never_was(
    end, status, at, step, words, finished, monkeypatch, capsys
):
    """Bit by bit, but for the times. Ctrl-C loses what is not saved; SIGTERM saves first."""
    out = f"stopped{at}"
    ordinary = train.Run.advance
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored

    def advance(run):
        if run.step == at:
            signal.raise_signal(end)
        ordinary(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"^{status}$"):
        patch.setattr(train.Run, "advance", advance)
        run(*SMALL, "--out", out)
    assert capsys.readouterr().err.endswith(f"{words} --resume --out {out}\n")
    assert saved(out)["step"] == step
    run("--resume", "--out", out)
    first, second = saved("out"), saved(out)
    for state in (first, second):
        assert 0 < state["log"].pop()["final"]["seconds"] <= state["seconds"]
    assert first["log"] == second["log"]
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)


def test_too_little_memory_is_called_that_and_not_a_damaged_run(finished, monkeypatch, refuses):
    full = Mock(side_effect=torch.OutOfMemoryError("on the GPU"))
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", full)
    again = "--resume --out out --steps 50".split()
    refuses(["not enough memory on the GPU"], run, *again)
    monkeypatch.setattr(train, "build", Mock(side_effect=RuntimeError("can't allocate memory: 9")))
    refuses(["can't allocate memory: 9"], run, *again)
    monkeypatch.setattr(train, "build", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(*again)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_like_one(finished):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*SMALL, "--out", "two", "--micro-batch", "4"]
    subprocess.run([*launch, "--", train.__file__, *flags], check=True)
    one, two = ([x["loss"] for x in log_of(out) if "loss" in x] for out in ("out", "two"))
    assert one == pytest.approx(two, abs=1e-5)
    torch.testing.assert_close(saved("out")["model"], saved("two")["model"], rtol=0, atol=1e-3)


def test_a_run_that_was_killed_between_its_two_files_is_whole_after_resume(finished):
    shutil.copytree("out", "between")
    right = log_of("out")
    common.write_log(Path("between"), right[:-3])
    run("--resume", "--out", "between")
    assert log_of("between") == right
    run("--resume", "--out", "between", "--steps", "50")
    assert ["final" in line for line in log_of("between")].count(True) == 1, "the summary is new"
    assert log_of("between")[-1]["final"]["seconds"] > right[-1]["final"]["seconds"]


def test_a_resumed_run_keeps_its_model_its_objective_and_its_data(finished, refuses):
    kept = settings("")
    other = {"attention": "mla", "budgets": "12,8", "objective": "sum", "shares": "3,2,2"}
    other |= {"preset": "small", "tokenizer": "gpt2"}
    for name in {*common.FIELDS, *other, "batch", "seed"} - {"tie"}:
        flag, old = "--" + name.replace("_", "-"), getattr(kept, name)
        change = other.get(name) or str(2 * old + 2)
        refuses([f"{flag} {old} ", "--init"], run, "--resume", "--out", "out", flag, change)
    change = "--lr 0.1 --lr-adamw 0.2 --warmup 3 --steps 50 --eval-every 7 --micro-batch 5"
    _, args = train.settings(f"--resume --out out {change}".split())
    assert (args.lr, args.steps, args.d) == (0.1, 50, 24)


def test_another_seed_gives_other_weights():
    """The same seed gives the same, or no run would go on as if it had never stopped."""
    one, other = (train.build(settings(f"--seed {seed}"), CPU)[0] for seed in (3, 10**30))
    for p, q in zip(one.parameters(), other.parameters()):
        assert p.dim() == 1 or not torch.equal(p, q)


def test_a_run_is_summed_up_for_all_its_tokens_processes_and_bytes(monkeypatch):
    """By a device of 989e12 FLOPs per second, two of which take 7,000 tokens per second."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    args = settings("--shares 5,2,1 --seed 3")
    model = GPT(train.make_config(vars(args)))
    looks = [{"step": 30, "val_loss": {"12": 3.0}}, {"step": 40, "val_loss": {"12": 2.0}}]
    book = Mock(speed=7000.0, seconds=50.0, tokens_per_step=12 * 32, entries=looks)
    world = World(torch.device("cuda", 0), 0, 2)
    cost = train.flops_per_token(args)
    run = Mock(args=args, model=model, book=book, world=world)
    assert train.Run.summary(run) == {
        "variant": "matmla, layers 5:2:1",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": 40 * 12 * 32,
        "flops": pytest.approx(40 * 12 * 32 * cost),
        "cache_bytes": 2 * (12 + 4) * 2,  # layers, numbers, bytes of bfloat16
        "val_loss": {"12": 2.0},
        "seconds": 50.0,
        "tokens_per_second": 7000.0,
        "mfu": pytest.approx(7000 * cost / (2 * 989e12)),
        "seed": 3,
        "memory": 123,
        "device": "2 x NVIDIA H200",
        "torch": torch.__version__,
    }


def test_speed_is_that_of_ten_steps_in_the_middle(monkeypatch):
    clock = Mock(side_effect=[100.0, 110.0, 115.0, 165.0, 170.0, 175.0])
    monkeypatch.setattr(train.time, "perf_counter", clock)
    book = train.Logbook(settings(""), [], 7.0, 0, False)
    assert book.speed is None and book.seconds == 10 + 7
    for step in 0, 10, 20, 30:
        book.batch(step, 1.0)
    assert book.speed == 10 * 12 * 32 / 5


def test_losses_of_unequal_chunks_are_means_over_all_windows():
    """19 windows are read 10 and 9 at a time."""
    model = make("matmla", torch.float32)
    tokens = some_tokens(1, 400)[0].numpy()
    starts = np.linspace(0, 400 - 17, 19).astype(int)
    x = torch.tensor(np.stack([tokens[i : i + 17] for i in starts]))
    budgets = 6, 2, [4, 1], (6,)
    right, after = [], []
    for heads in budgets:
        right.append(model(x[:, :-1], x[:, 1:], heads)[1].item())
        cache = model.new_cache(19, 16)
        model(x[:, :8], heads=3, cache=cache)
        after.append(model(x[:, 8:-1], x[:, 9:], heads, cache)[1].item())
    assert common.evaluate(model, tokens, 19, budgets) == pytest.approx(right, rel=1e-5)
    assert common.evaluate_after(3, model, tokens, 19, budgets) == pytest.approx(after, rel=1e-5)


# ---------------------------------------------------------------- mistakes and accidents


def test_a_run_stays_alone_in_its_folder_and_is_not_overwritten(finished, refuses):
    before = Path("out/checkpoint.pt").read_bytes()
    refuses(["out has a run", "--overwrite"], run, *SMALL)
    with filelock.FileLock("out/.lock"):
        refuses(["another run", "out"], run, "--resume", "--out", "out")
    assert Path("out/checkpoint.pt").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is a full disk")
def test_diverging_run_stops_and_a_full_disk_keeps_the_old_checkpoint(finished, refuses):
    flags = [*SMALL, "--out", "kept"]
    for words, every in ("a weight is not finite", "10"), ("the loss is nan", "20"):
        diverging = ["--lr", "1e38", "--eval-every", every, "--overwrite"]
        refuses([words, "lower --lr"], run, *flags, *diverging)
    assert all(p.isfinite().all() for p in saved("kept")["model"].values())
    before = Path("kept/checkpoint.pt").read_bytes()
    for rate in "nan", "inf", "-1":
        refuses(["must be finite, and 0"], run, *flags, "--overwrite", f"--lr={rate}")
        refuses(["must be finite, and 0"], run, *flags, "--overwrite", f"--lr-adamw={rate}")
    Path("kept/checkpoint.pt.partial").symlink_to("/dev/full")
    refuses(["cannot save kept/checkpoint.pt", "No space left"], run, *flags, "--overwrite")
    assert Path("kept/checkpoint.pt").read_bytes() == before
    assert not list(Path("kept").glob("*.partial"))
    run(*flags, "--overwrite", "--steps", "1")
    assert saved("kept")["step"] == 1


class Hostile:
    def __reduce__(self):
        return open, ("owned", "w")


def test_a_damaged_or_hostile_checkpoint_is_refused_and_runs_no_code(finished):
    damaged = bytearray(Path("out/checkpoint.pt").read_bytes())
    damaged[damaged.index(saved("out")["model"]["embed.weight"].numpy().tobytes())] ^= 1
    Path("bit.pt").write_bytes(damaged)
    Path("cut.pt").write_bytes(damaged[:-100])
    torch.save(saved("out") | {"step": Hostile()}, "hostile.pt")
    for name in ("bit.pt", "cut.pt", "hostile.pt"):
        with pytest.raises(UserError, match=f"{name} is not a checkpoint"):
            common.load_checkpoint(name)
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "change, command, words",
    [
        ({}, "--step 4", ["--step"]),
        ({}, "--seed -1", ["--seed", "-1"]),
        ({}, "--budgets 16,4", ["(16, 4)", "12"]),
        ({}, "--budgets 4,12", ["(4, 12)", "largest first"]),
        ({}, "--attention nested_gqa --budgets 12,3", ["(12, 3)", "[2, 4, 6, 8, 10, 12]"]),
        ({}, "--d-R 5", ["5", "even"]),
        ({}, "--shares 1,2", ["(1, 2)", "3"]),
        ({}, "--attention mla --budgets 12,4", ["mla has one number", "matmla"]),
        ({}, "--only norm_KV", ["--only norm_KV", "no matrix"]),
        ({}, "--only W_DKV,W_TYPO", ["W_TYPO"]),
        ({}, "--only W_DKV,", ["no weight"]),
        ({}, "--device abacus", ["abacus"]),
        ({}, "--tokenizer nothing/here", ["nothing/here"]),
        ({}, "--resume --out no", ["no/checkp"]),
        ({}, "--resume --out out --no-tie", ["--tie True "]),
        ({}, "--resume --out out --steps 2", ["40 steps", "--steps 2"]),
        ({}, "--init out/checkpoint.pt --out out", ["another folder"]),
        ({}, "--init out/checkpoint.pt --resume --out no", ["--resume", "another folder"]),
        ({}, "--init out/metrics.jsonl --out no", ["out/metrics.jsonl"]),
        ({}, "--init out/checkpoint.pt --out no --d 48", ["out/checkpoint.pt", "24", "48"]),
        ({"config": UNTIED}, "--init odd/checkpoint.pt --out no --tie", ["odd/check", "--tie"]),
        ({"config": {"qkv_bias": False}}, GO_ON, ["another version", "qkv_bias"]),
        ({"data": {}}, GO_ON, ["text has changed"]),
        ({"optimizers": []}, GO_ON, ["--init"]),
        ({"optimizers": [1]}, GO_ON, ["optimizers"]),
        ({"optimizers": [{}, {}]}, GO_ON, ["optimizers"]),
        ({"optimizers": None}, GO_ON, ["optimizers"]),
        ({"step": "four"}, GO_ON, ["step"]),
        ({"log": 3}, GO_ON, ["log"]),
        ({"model": [1]}, GO_ON, ["model"]),
        ({"model": {}}, GO_ON, ["weights"]),
        ({"seconds": None}, GO_ON, ["seconds"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(change, command, words, finished, refuses):
    Path("odd").mkdir(exist_ok=True)
    torch.save(saved("out") | change, "odd/checkpoint.pt")
    start = [] if "--resume" in command or "--init" in command else [*SMALL, "--out", "elsewhere"]
    refuses(words, run, *start, *command.split())


def test_a_lost_momentum_or_optimizer_is_one_line(finished, refuses):
    muon, adamw = saved("out")["optimizers"]
    Path("lost").mkdir()
    for optimizers, word in ([muon | {"state": {}}, adamw], "momentum"), ([muon], "shorter"):
        torch.save(saved("out") | {"optimizers": optimizers}, "lost/checkpoint.pt")
        refuses(["lost", word], run, "--resume", "--out", "lost", "--steps", "50")


def test_a_bug_keeps_its_traceback():
    """Also where it is a ValueError, as in a student's own file."""
    with pytest.raises(ValueError, match="four"):
        common.Parser("").run(int, "four")
