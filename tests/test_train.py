"""Tests of train.py, muon.py, devices.py and common.py. GPU tests run where there is one."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
    "--d-R 4 --d-ff 32 --context 32 --batch 12 --steps 40 --eval-every 10"
).split()
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(*flags):
    parser, args = train.settings(list(map(str, flags)))
    parser.run(train.train, args)


def refuses(words, capsys, call, *arguments):
    """It ends with status 2 and one line on stderr that has all of these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        call(*arguments)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message


def log_of(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with tokens in text and a finished run in out; tests work there."""
    tokens = np.random.default_rng(0).integers(97, 123, size=20_000).astype(np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        Path("text").mkdir()
        tokens[:18_000].tofile("text/train.bin")
        tokens[18_000:].tofile("text/val.bin")
        run(*SMALL)
        yield


# ---------------------------------------------------------------- the objective


def settings(flags):
    return train.settings([*SMALL, "--out", "nowhere", *flags.split()])[1]


def plain_turns(objective, step, shares=(2, 1)):
    """What a step's 11 sequences are read with: lists of heads, one for each pass over them all."""
    turns = [3] * shares[0] + [1] * shares[1]
    if objective == "mixed":  # sequences of the run in turn, sorted within a batch
        return [sorted(np.resize(turns, 55)[11 * step : 11 * step + 11].tolist(), reverse=True)]
    if objective == "sum":
        return [[m] * 11 for m in turns]
    if objective == "sample":
        return [[turns[step % 3]] * 11]
    layers = np.random.default_rng((5, step, 1)).choice(turns, 2)
    return [[layers.tolist()] * 11]


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
    tokens = np.random.default_rng(0).integers(257, size=500).astype(np.uint16)
    torch.manual_seed(0)
    ours, plain = (GPT(train.make_config(vars(args))).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    inside = [p for p in plain.blocks.parameters() if p.dim() == 2]
    norms = [p for p in plain.blocks.parameters() if p.dim() == 1]
    rest = [plain.embed.weight, plain.norm.weight, *norms]
    muon = torch.optim.Muon(inside, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = train.make_optimizers(ours)

    for step, rate in enumerate((1 / 2, 1, 1, 2 / 3, 1 / 3)):
        starts = np.random.default_rng((5, step)).integers(500 - 32, size=11)
        passes = plain_turns(objective, step)
        loss = 0
        for heads in passes:
            for start, m in zip(starts, heads):
                x = torch.from_numpy(tokens[start : start + 33].astype(np.int64))
                logits = plain(x[None, :-1], heads=m)[0][0]
                loss += F.cross_entropy(logits, x[1:]) / 11 / len(passes)
        loss.backward()
        for optimizer, peak in ((muon, 0.03), (adamw, 0.01)):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        found = train.train_step(ours, optimizers, tokens, step, args, CPU)
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
    assert [next(train.micro_batches(args, 7, rank, 2))[1] for rank in (0, 1)] == [[*drawn[7]]] * 2


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


def test_training_flops_are_those_of_the_heads_that_are_computed():
    """6 per weight and token, and attention's T x T scores and sums, forward and twice backward."""

    def cost(flags):
        return train.flops_per_token(settings(flags))

    sizes = dict(d=24, d_h=4, d_c=12, d_cq=8, d_R=4, d_ff=32)
    alone = []
    for m in 12, 8, 4:
        model = GPT(Config("mla", vocab_size=257, n_layer=2, n_h=m, **sizes))
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        scores = 2 * 32 * m * (4 + 4 + 4)  # layers, T, heads, q·k of d_h + d_R and p·v of d_h
        alone.append(6 * weights + 6 * scores)
        assert cost(f"--attention mla --n-h {m}") == pytest.approx(alone[-1])
    assert cost("--shares 1,1,2") == pytest.approx(np.average(alone, weights=(1, 1, 2)))
    assert cost("--objective layers") == pytest.approx(np.average(alone, weights=(3, 2, 1)))
    assert cost("--objective sum") == pytest.approx(sum(alone))


# ---------------------------------------------------------------- compilers and graphs


def test_each_number_of_heads_is_compiled_once_for_all_layers_also_where_they_differ(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = GPT(Config(n_layer=2, n_h=9))  # more kinds than torch compiles by itself
    devices.compile_parts(model)
    for heads in [9, 5], [5, 9], 5, [5] * 2, *range(1, 10):
        model(*torch.zeros(2, 1, 8, dtype=int), heads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9 + 1  # and the loss


def test_where_nothing_compiles_training_goes_without_and_says_so(monkeypatch, capsys):
    def fail(function):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    assert not devices.can_compile(torch.device("cpu"))
    assert capsys.readouterr().out.endswith("which does not work here: no compiler\n")


def test_a_captured_pass_runs_once_per_step_on_what_it_is_given(monkeypatch):
    """Without a GPU a graph is imitated: what runs while it is captured does not count."""

    class Graph:
        def replay(self):
            self.function()

    class Capture:
        def __init__(self, graph, pool):
            self.graph = graph

        def __enter__(self):
            calls.append("captured")

        def __exit__(self, *error):
            pass

    calls, given = [], []

    def run_pass(model, x, y, heads, weight):
        given.append((x.tolist(), y.tolist(), heads, weight))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(Graph, "function", lambda graph: calls.append("replayed"), raising=False)
    passes = devices.CapturedPasses(run_pass)
    for i in range(4):
        passes("model", torch.tensor([i]), torch.tensor([i + 1]), (12, 4), 0.5)
    assert calls == ["captured", "replayed", "replayed", "replayed"]
    assert given == [([0], [1], (12, 4), 0.5), ([1], [2], (12, 4), 0.5)]
    place, _ = passes.kinds[(12, 4), 1, 0.5]
    assert place[0].tolist() == [3] and place[1].tolist() == [4]
    passes("model", torch.tensor([7]), torch.tensor([8]), [12, 4], 0.5)  # layers: never captured
    assert given[-1] == ([7], [8], [12, 4], 0.5) and len(passes.kinds) == 1
    for tokens, heads, weight in ([5], (12, 8), 0.5), ([5], (12, 4), 0.2), ([5, 6], (12, 4), 0.5):
        passes("model", torch.tensor(tokens), torch.tensor(tokens), heads, weight)
        assert given[-1] == (tokens, tokens, heads, weight), "another kind, and another graph"


@gpu
@pytest.mark.parametrize("preset", common.PRESETS)
def test_compiled_gradients_on_a_gpu_are_those_of_the_block(preset):
    """In every kind of pass. To 20%: bfloat16 alone makes a few percent."""
    torch._dynamo.reset()
    _, args = train.settings(["--preset", preset, "--n-layer", "1", "--out", "nowhere"])
    rows, mixed, _ = next(train.micro_batches(args, 0))
    eager, compiled = (GPT(train.make_config(vars(args))).cuda() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    devices.compile_parts(compiled)
    for heads in (None, *args.budgets, mixed):
        shape = 2, len(rows), args.context, args.d
        x, towards = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind()
        x.requires_grad_()
        grads = []
        for model in eager, compiled:
            with devices.mixed_precision(x.device):
                loss = (model.blocks[0](x, heads) * towards).sum()
            grads.append(torch.autograd.grad(loss, [x, *model.blocks.parameters()]))
        names = ["its input", *dict(eager.blocks.named_parameters())]
        for name, right, found in zip(names, *grads):
            assert (found - right).norm() <= 0.2 * right.norm(), f"{name}, heads {heads}"


@gpu
@pytest.mark.parametrize("objective", train.OBJECTIVES)
@pytest.mark.parametrize("preset", common.PRESETS)
def test_captured_passes_on_a_gpu_have_the_gradients_and_losses_of_eager_ones(preset, objective):
    """Gradients to 20%, the losses of 20 steps to 1e-3: both pass through bfloat16."""
    torch._dynamo.reset()
    flags = ["--preset", preset, "--n-layer", "2", "--objective", objective, "--out", "nowhere"]
    _, args = train.settings([*flags, "--micro-batch", "12", "--batch", "24"])
    tokens = np.random.default_rng(0).integers(257, size=50_000).astype(np.uint16)
    world = World(torch.device("cuda", 0))
    losses, grads = [], []
    for captured in False, True:
        args.compile = captured
        model, optimizers, run_pass = train.build(args, world)
        if not captured:
            run_pass = train.run_pass
            optimizers[0].directions = optimizers[0].directions.function
        losses.append([])
        for step in range(20):
            if step == 3:
                x, y = train.windows(tokens, np.arange(12), args.context, world.device)
                heads = next(train.micro_batches(args, 0))[1:]
                for p in model.parameters():
                    p.grad.zero_()
                run_pass(model, x, y, *heads)
                grads.append([p.grad.clone() for p in model.parameters()])
                for p in model.parameters():
                    p.grad.zero_()
            loss = train.train_step(model, optimizers, tokens, step, args, world, run_pass)
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for right, found in zip(*grads):
        assert (found - right).norm() <= 0.2 * right.norm()


# ---------------------------------------------------------------- runs


def test_a_run_reports_and_saves_and_another_starts_from_its_sizes_tokens_and_weights(finished):
    lines, kept = log_of("out"), common.load_checkpoint("out/checkpoint.pt")
    assert [line["step"] for line in lines] == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert kept["step"] == 40 and json.loads(json.dumps(kept["log"])) == lines
    assert lines[9]["final"]["val_loss"] == lines[8]["val_loss"]
    assert lines[9]["final"]["tokens"] == 40 * 12 * 32
    val = np.fromfile("text/val.bin", np.uint16).astype(int)
    starts = np.linspace(0, len(val) - 33, 256).astype(int)
    x = torch.tensor(np.stack([val[i : i + 33] for i in starts]))
    model, _ = common.load("out/checkpoint.pt", "cpu")
    with torch.no_grad():
        losses = [model(x[:, :-1], x[:, 1:], m)[1].item() for m in (12, 8, 4)]
    assert [lines[8]["val_loss"][m] for m in ("12", "8", "4")] == pytest.approx(losses, abs=1e-5)

    start = "--init out/checkpoint.pt --out new --device cpu --data text "
    _, args = train.settings((start + "--context 16").split())
    assert (args.d, args.context, args.encoding, args.steps) == (24, 16, "bytes", 450)
    run(*(start + "--steps 1").split())
    assert log_of("new")[0]["val_loss"] == lines[8]["val_loss"]
    optimizers = common.load_checkpoint("new/checkpoint.pt")["optimizers"]
    assert optimizers[1]["state"][0]["step"] == 1, "the first run's optimizer goes on"


def test_only_the_weights_that_are_named_are_trained(finished):
    run(*"--init out/checkpoint.pt --out only --only W_DKV,W_UK --steps 2 --device cpu".split())
    before, after = (common.load_checkpoint(f"{out}/checkpoint.pt") for out in ("out", "only"))
    moved = {k for k, p in after["model"].items() if not torch.equal(p, before["model"][k])}
    assert moved == {f"blocks.{i}.attention.{W}.weight" for i in (0, 1) for W in ("W_DKV", "W_UK")}
    run("--resume", "--out", "only", "--steps", "3")


def same_runs(one, two):
    """Everything in two finished runs but the times is bit-equal."""
    states = [common.load_checkpoint(f"{out}/checkpoint.pt") for out in (one, two)]
    for state in states:
        assert 0 < state["log"].pop()["final"]["seconds"] <= state.pop("seconds")
    first, second = (dict(torch.utils._pytree.tree_flatten_with_path(s)[0]) for s in states)
    assert first.keys() == second.keys()
    for path, a in first.items():
        assert torch.equal(a, second[path]) if isinstance(a, torch.Tensor) else a == second[path]


@pytest.fixture(scope="module")
def layers(finished):
    """The flags of a finished run with the paper's objective, which is in the folder layers."""
    flags = [*SMALL, "--objective", "layers"]
    run(*flags, "--out", "layers")
    return flags


def test_a_killed_run_resumes_as_if_never_stopped(layers):
    process = subprocess.Popen([sys.executable, train.__file__, *layers, "--out", "killed"])
    while not Path("killed", "metrics.jsonl").exists() or log_of("killed")[-1]["step"] < 10:
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL and log_of("killed")[-1]["step"] < 40
    run("--resume", "--out", "killed")
    same_runs("layers", "killed")


@pytest.mark.parametrize(
    "end, status, at, saved",
    [(signal.SIGINT, 130, 0, 0), (signal.SIGINT, 130, 27, 20), (signal.SIGTERM, 143, 13, 14)],
)
def test_a_run_that_gets_a_signal_says_how_to_go_on(
    end, status, at, saved, finished, monkeypatch, capsys
):
    """Ctrl-C goes back to the last checkpoint, SIGTERM saves one: what follows is the same run."""
    out = f"stopped{at}"
    ordinary = train.Run.advance
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is for the run to heed

    def advance(run):
        if run.step == at:
            signal.raise_signal(end)
        ordinary(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"^{status}$"):
        patch.setattr(train.Run, "advance", advance)
        run(*SMALL, "--out", out)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said = capsys.readouterr().err
    assert said.endswith(f"--resume --out {out}\n")
    assert end == signal.SIGINT or f"after step {saved} and saved" in said
    assert common.load_checkpoint(f"{out}/checkpoint.pt")["step"] == saved
    run("--resume", "--out", out)
    same_runs("out", out)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_like_one(layers):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "--", train.__file__, *layers, "--out", "two", "--micro-batch", "4"]
    subprocess.run(command, check=True)
    runs = [common.load_checkpoint(f"{out}/checkpoint.pt") for out in ("layers", "two")]
    losses = [[line["loss"] for line in run["log"] if "loss" in line] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(runs[0]["model"], runs[1]["model"], rtol=0, atol=1e-3)


def test_a_run_that_was_killed_between_its_two_files_is_whole_after_resume(finished):
    shutil.copytree("out", "between")
    lines = Path("between/metrics.jsonl").read_text()
    Path("between/metrics.jsonl").write_text("".join(lines.splitlines(keepends=True)[:-3]))
    run("--resume", "--out", "between")
    assert Path("between/metrics.jsonl").read_text() == lines
    run("--resume", "--out", "between", "--steps", "50")
    finals = [line for line in log_of("between") if "final" in line]
    assert [line["step"] for line in finals] == [50], "the old summary is kept"
    assert finals[0]["final"]["seconds"] > json.loads(lines.splitlines()[-1])["final"]["seconds"]


def test_a_resumed_run_keeps_its_model_its_objective_and_its_data(finished, capsys):
    kept = settings("")
    other = {"attention": "mla", "budgets": "12,8", "objective": "sum", "shares": "3,2,2"}
    names = [field.name for field in dataclasses.fields(Config)]
    for name in (*names, "objective", "shares", "batch", "seed"):
        flag, old = "--" + name.replace("_", "-"), getattr(kept, name)
        flags = [flag, other.get(name) or str(2 * old + 2)]
        if name == "tie":
            flags = ["--no-tie"]
        refuses([f"{flag} {old} ", "--init"], capsys, run, "--resume", "--out", "out", *flags)
    change = "--lr 0.1 --lr-adamw 0.2 --warmup 3 --steps 50 --eval-every 7 --micro-batch 5"
    _, args = train.settings(f"--resume --out out {change}".split())
    assert (args.lr, args.steps, args.d) == (0.1, 50, 24)


def test_a_seed_gives_the_weights():
    seeded = [train.build(settings(f"--seed {seed}"), CPU)[0].state_dict() for seed in (3, 3, 4)]
    for name, one in seeded[0].items():
        assert torch.equal(one, seeded[1][name])
        assert one.dim() == 1 or not torch.equal(one, seeded[2][name]), name


def test_a_run_is_summed_up_for_all_its_tokens_processes_and_bytes(monkeypatch):
    """By a device of 989e12 FLOPs per second, two of which take 7,000 tokens per second."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    args = settings("--shares 5,2,1 --seed 3")
    model = GPT(train.make_config(vars(args)))
    looks = [{"step": 30, "val_loss": {"12": 3.0}}, {"step": 40, "val_loss": {"12": 2.0}}]
    book = SimpleNamespace(speed=7000.0, seconds=50.0, tokens_per_step=12 * 32, entries=looks)
    world = World(torch.device("cuda", 0), 0, 2)
    run = SimpleNamespace(args=args, model=model, book=book, world=world)
    found = train.Run.summary(run)
    cost = train.flops_per_token(args)
    assert found == {
        "variant": "matmla, mixed 5:2:1",
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


def test_a_run_stays_alone_in_its_folder_and_is_not_overwritten(finished, capsys):
    before = Path("out/checkpoint.pt").read_bytes()
    refuses(["out has a run", "--overwrite"], capsys, run, *SMALL)
    with filelock.FileLock("out/.lock"):
        refuses(["another run", "out"], capsys, run, "--resume", "--out", "out")
    assert Path("out/checkpoint.pt").read_bytes() == before
    shutil.copytree("out", "again")
    run(*SMALL, "--out", "again", "--overwrite", "--steps", "1")
    assert common.load_checkpoint("again/checkpoint.pt")["step"] == 1


def test_a_run_does_not_go_on_with_other_text(finished, capsys):
    text = "".join(
        json.dumps({"text": f"the cat saw the dog {i}. " * 9}) + "\n" for i in range(400)
    )
    Path("d.jsonl").write_text(text)
    run(*SMALL, "--data", "d.jsonl", "--out", "cat", "--steps", "1")
    Path("d.jsonl").write_text(text.replace("cat", "cow"))
    refuses(["d.jsonl has changed"], capsys, run, "--resume", "--out", "cat", "--steps", "2")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is a full disk")
def test_diverging_run_stops_and_a_full_disk_keeps_the_old_checkpoint(finished, capsys):
    flags, kept = [*SMALL, "--out", "kept"], Path("kept/checkpoint.pt")
    refuses(["lower --lr"], capsys, run, *flags, "--lr", "1e38")
    weights = common.load_checkpoint(kept)["model"].values()
    assert all(p.isfinite().all() for p in weights)
    before = kept.read_bytes()
    Path("kept/checkpoint.pt.partial").symlink_to("/dev/full")
    words = ["cannot save kept/checkpoint.pt", "No space left"]
    refuses(words, capsys, run, *flags, "--overwrite")
    assert kept.read_bytes() == before and not list(kept.parent.glob("*.partial"))


# ---------------------------------------------------------------- checkpoints


class Hostile:
    def __reduce__(self):
        return open, ("owned", "w")


def test_a_damaged_or_hostile_checkpoint_is_one_line_and_runs_no_code(finished, capsys):
    content = Path("out/checkpoint.pt").read_bytes()
    draw = np.random.default_rng(0)
    for place in draw.integers(len(content), size=20):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.integers(8)
        Path("flipped.pt").write_bytes(flipped)
        try:  # bits between the parts of the file, and in its list of parts, may not matter
            found = common.load_checkpoint("flipped.pt")
        except UserError:
            continue
        weights = common.load_checkpoint("out/checkpoint.pt")["model"]
        assert all(torch.equal(found["model"][name], weights[name]) for name in weights), place

    saved = torch.load("out/checkpoint.pt", weights_only=True)
    muon, adamw = saved["optimizers"]
    Path("lost").mkdir()
    for optimizers, word in ([muon | {"state": {}}, adamw], "momentum"), ([muon], "shorter"):
        torch.save(saved | {"optimizers": optimizers}, "lost/checkpoint.pt")
        refuses(["lost", word], capsys, run, "--resume", "--out", "lost", "--steps", "50")
    torch.save(saved | {"step": Hostile()}, "hostile.pt")
    with pytest.raises(UserError, match="hostile.pt is not a checkpoint"):
        common.load_checkpoint("hostile.pt")
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"optimizers": [1]}, ["optimizers"]),
        ({"optimizers": [{}, {}]}, ["optimizers"]),
        ({"optimizers": None}, ["optimizers"]),
        ({"step": "four"}, ["step"]),
        ({"log": 3}, ["log"]),
        ({"model": [1]}, ["model"]),
        ({"model": {}}, ["weights"]),
        ({"config": {}}, ["another version"]),
        ({"seconds": None}, ["seconds"]),
    ],
)
def test_a_checkpoint_with_something_else_inside_is_one_line(change, words, finished, capsys):
    saved = torch.load("out/checkpoint.pt", weights_only=True)
    Path("odd").mkdir(exist_ok=True)
    torch.save(saved | change, "odd/checkpoint.pt")
    refuses(["odd", *words], capsys, run, "--resume", "--out", "odd", "--steps", "50")


@pytest.mark.parametrize(
    "command, words",
    [
        ("--step 4", ["--step"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--budgets 16,4", ["(16, 4)", "12"]),
        ("--budgets 4,12", ["(4, 12)", "largest first"]),
        ("--attention nested_gqa --budgets 12,3", ["(12, 3)", "[2, 4, 6, 8, 10, 12]"]),
        ("--d-R 5", ["5", "even"]),
        ("--shares 1,2", ["(1, 2)", "3"]),
        ("--only W_K,norm", ["--only W_K,norm", "no matrix"]),
        ("--device abacus", ["abacus"]),
        ("--tokenizer nothing/here", ["nothing/here"]),
        ("--resume --out no", ["no/checkp"]),
        ("--resume --out old", ["another version", "qkv_bias"]),
        ("--resume --out out --steps 2", ["40 steps", "--steps 2"]),
        ("--init out/checkpoint.pt --out out", ["another folder"]),
        ("--init untied/checkpoint.pt --resume", ["--resume", "another folder"]),
        ("--resume --out untrained", ["--init"]),
        ("--init out/metrics.jsonl --out new2", ["out/metrics.jsonl"]),
        ("--init out/checkpoint.pt --out new2 --d 48", ["out/checkpoint.pt", "24", "48"]),
        ("--init untied/checkpoint.pt --out new2 --tie", ["untied/checkpoint.pt", "--tie"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(command, words, finished, capsys):
    saved = torch.load("out/checkpoint.pt", weights_only=True)
    for name, change in {
        "untrained": {"optimizers": []},
        "untied": {"config": saved["config"] | {"tie": False}},
        "old": {"config": saved["config"] | {"qkv_bias": False}},
    }.items():
        Path(name).mkdir(exist_ok=True)
        common.save(Path(name, "checkpoint.pt"), **saved | change | {"log": []})
    flags = command.split()
    start = [] if {"--resume", "--init"} & {*flags} else [*SMALL, "--out", "elsewhere"]
    refuses(words, capsys, run, *start, *flags)


def test_a_bug_keeps_its_traceback(finished, monkeypatch):
    """Also where it is a ValueError, as in a student's own file."""

    def buggy(x):
        raise ValueError("not enough values to unpack")

    parser = common.Parser("")
    with pytest.raises(ValueError, match="unpack"):
        parser.run(buggy, 1)


def test_losses_of_unequal_chunks_are_means_over_all_windows():
    """19 windows are read 10 and 9 at a time."""
    model = make("matmla", torch.float32)
    tokens = some_tokens(1, 400)[0].numpy()
    starts = np.linspace(0, 400 - 17, 19).astype(int)
    x = torch.tensor(np.stack([tokens[i : i + 17] for i in starts]))
    budgets = 6, 2, [4, 1], (6,)
    found = common.evaluate(model, tokens, 19, budgets)
    with torch.no_grad():
        right = [model(x[:, :-1], x[:, 1:], heads)[1].item() for heads in budgets]
        after = []
        for heads in budgets:
            cache = model.new_cache(19, 16)
            model(x[:, :8], heads=3, cache=cache)
            after.append(model(x[:, 8:-1], x[:, 9:], heads, cache)[1].item())
    assert found == pytest.approx(right, rel=1e-5)
    assert common.evaluate_after(3, model, tokens, 19, budgets) == pytest.approx(after, rel=1e-5)


def test_speed_is_that_of_ten_steps_in_the_middle(monkeypatch):
    clock = iter([100.0, 110.0, 115.0, 165.0, 170.0, 175.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    args = settings("")
    book = train.Logbook(args, [], 7.0, 0, False)
    assert book.speed is None and book.seconds == 10 + 7
    for step in 0, 10, 20, 30:
        book.batch(step, 1.0)
    assert book.speed == 10 * 12 * 32 / 5 and math.isclose(book.start, 93)
