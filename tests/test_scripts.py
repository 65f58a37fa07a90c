"""Tests of train.py, report.py, sample.py, bench_cache.py and decode.py. What needs a GPU is run where there is one."""

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

import numpy as np
import pytest
import torch

import bench_cache  # the first of ours
import common
import decode
import report
import sample
import train
from matmla import ATTENTION, GPT, Config
from test_matmla import error, make, randomized, readers, some_tokens

os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start; test_matmla says why
SMALL = (
    "--device cpu --tokens 300000 --n-layer 1 --d 24 --d-h 4 --d-c 12 --d-cq 8 --d-R 4 --d-ff 32 --context 32 "
    "--batch 12 --steps 40 --eval-every 10"
).split()
WIDER = dict(context=40, d_R=20)  # in pretrained attentions, frequencies start anew after d_h


def main_of(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
    module.main()


def refuses(words, module, monkeypatch, capsys, *arguments, status=2):
    """It ends with this status and one line on stderr that has all of these words."""
    with pytest.raises(SystemExit, match=f"^{status}$"):
        main_of(module, monkeypatch, *arguments)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with a finished run in out, and in loud one with weights so large that budgets differ: its model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("there"))
        main_of(train, patch, *SMALL)
        saved = train.load_checkpoint("out/checkpoint.pt")
        loud = randomized(GPT(Config(**saved["config"] | {"n_layer": 2})))
        Path("loud").mkdir()
        torch.save(
            saved | {"config": vars(loud.config), "model": loud.state_dict()}, "loud/checkpoint.pt"
        )
        yield loud


@pytest.fixture
def says(there, monkeypatch, capsys):
    """What a script prints for a line of flags."""

    def says(script, flags):
        main_of(script, monkeypatch, *flags.split())
        return capsys.readouterr().out

    return says


@pytest.mark.parametrize("objective", ["mixed", "sum", "sample"])
def test_steps_are_those_of_a_plain_loop(objective, monkeypatch):
    """11 sequences in passes of 6 and 5, shares 2 and 1, two peak rates that rise and fall. In float64."""
    monkeypatch.setattr(
        torch.Tensor, "bfloat16", lambda x: x
    )  # torch's Muon rounds on a CPU too, ours does not
    flags = "--budgets 3,1 --shares 2,1 --n-h 3 --batch 11 --micro-batch 6 --lr 0.03 --lr-adamw 0.01 --warmup 2 "
    _, args = train.settings(
        [*SMALL, *(flags + "--steps 10 --seed 5 --objective " + objective).split()]
    )
    tokens = np.random.default_rng(0).integers(257, size=500).astype(np.uint16)
    torch.manual_seed(0)
    ours, plain = (GPT(train.make_config(vars(args))).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    inside = [p for p in plain.blocks.parameters() if p.dim() == 2]
    rest = [
        plain.embed.weight,
        plain.norm.weight,
        *(p for p in plain.blocks.parameters() if p.dim() == 1),
    ]
    muon = torch.optim.Muon(inside, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = train.make_optimizers(ours)
    for step, rate in enumerate((1 / 2, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)):
        starts = np.random.default_rng((5, step)).integers(500 - 32, size=11)
        dealt = sorted(
            np.resize([3, 3, 1], 110)[11 * step : 11 * step + 11], reverse=True
        )  # by shares 2 and 1
        turn = [(3, 3, 1)[step % 3]] * 11
        turns = {"mixed": [dealt], "sum": [[3] * 11, [3] * 11, [1] * 11], "sample": [turn]}[
            objective
        ]
        loss = 0
        for start, m in ((start, m) for budgets in turns for start, m in zip(starts, budgets)):
            x = torch.from_numpy(tokens[start : start + 33].astype(np.int64))
            loss += (
                torch.nn.functional.cross_entropy(plain(x[None, :-1], heads=m)[0][0], x[1:])
                / 11
                / len(turns)
            )
        loss.backward()
        for optimizer, peak in ((muon, 0.03), (adamw, 0.01)):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        assert train.learn(ours, optimizers, tokens, step, args).item() == pytest.approx(
            loss.item(), rel=1e-9
        )
    for (name, p), right in zip(ours.named_parameters(), plain.parameters()):
        assert (p - right).norm() < 1e-7 * right.norm(), name


def test_training_flops_are_those_of_the_heads_that_are_computed():
    cost = lambda flags: train.flops_per_token(
        train.settings(["--context", "32", *flags.split()])[1]
    )
    alone = [cost(f"--attention mla --n-h {m}") for m in (12, 8, 4)]
    assert (
        cost("--shares 1,1,2") == pytest.approx(np.average(alone, weights=(1, 1, 2)))
        and cost("") < alone[0]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", train.PRESETS)
def test_compiled_gradients_on_a_gpu_are_those_of_the_block(preset):
    """In every kind of pass. To 20%: bfloat16 alone makes a few percent."""
    torch._dynamo.reset()
    _, args = train.settings(["--preset", preset, "--n-layer", "1"])
    rows, mixed, _ = next(train.passes(args, 0))
    eager, compiled = (GPT(train.make_config(vars(args))).cuda() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    train.compile_parts(compiled)
    for heads in (None, *args.budgets, mixed):
        x, towards = torch.randn(
            2, len(rows), args.context, args.d, device="cuda", dtype=torch.bfloat16
        ).unbind()
        x.requires_grad_()
        with train.mixed_precision(x.device):
            losses = (
                (model, (model.blocks[0](x, heads) * towards).sum()) for model in (eager, compiled)
            )
            right, found = (
                torch.autograd.grad(loss, [x, *model.blocks.parameters()]) for model, loss in losses
            )
        for name, a, b in zip(["its input", *dict(eager.blocks.named_parameters())], found, right):
            assert (a - b).norm() <= 0.2 * b.norm(), f"{name}, {len(rows)} sequences, heads {heads}"


def test_more_than_eight_budgets_are_all_compiled_once(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = GPT(Config(n_layer=2))
    train.compile_parts(model)
    for m in range(1, 13):
        model(*torch.zeros(2, 1, 8, dtype=int), m)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12 + 1
    )  # for both layers, and the loss


def test_a_run_reports_and_saves_and_another_starts_from_its_sizes_tokens_and_weights(
    there, monkeypatch
):
    lines, kept = log_of(Path("out")), train.load_checkpoint("out/checkpoint.pt")
    assert [line["step"] for line in lines] == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert kept["step"] == 40 and json.loads(json.dumps(kept["log"])) == lines
    assert (
        lines[9]["final"]["val_loss"] == lines[8]["val_loss"]
        and lines[9]["final"]["tokens"] == 40 * 12 * 32
    )
    val = np.fromfile(next(Path("data").glob("*/val.bin")), np.uint16).astype(int)
    x = torch.tensor(
        np.stack([val[i : i + 33] for i in np.linspace(0, len(val) - 33, 256).astype(int)])
    )
    with torch.no_grad():
        losses = [
            common.load("out/checkpoint.pt", "cpu")[0](x[:, :-1], x[:, 1:], m)[1].item()
            for m in (12, 8, 4)
        ]
    assert [lines[8]["val_loss"][m] for m in ("12", "8", "4")] == pytest.approx(losses, abs=1e-5)
    start = "--init out/checkpoint.pt --out new --device cpu "
    _, args = train.settings((start + "--context 16 --data elsewhere").split())
    assert (args.d, args.context, args.encoding, args.steps) == (24, 16, "bytes", 500)
    main_of(train, monkeypatch, *(start + "--steps 1 --tokens 300000").split())
    assert log_of(Path("new"))[0]["val_loss"] == lines[8]["val_loss"]
    assert (
        train.load_checkpoint("new/checkpoint.pt")["optimizers"][1]["state"][0]["step"] == 1
    )  # theirs are fresh


@pytest.mark.parametrize("end, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_runs_resume_as_if_never_stopped(end, status, there, monkeypatch):
    stopped = Path(f"stopped{status}")
    command = [sys.executable, train.__file__, *SMALL, "--out", stopped]
    heed = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # also if pytest runs in the background
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while not (stopped / "metrics.jsonl").exists() or log_of(stopped)[-1]["step"] < 10:
        assert process.poll() is None
    process.send_signal(end)
    said = process.communicate()[1]
    assert process.returncode == status and log_of(stopped)[-1]["step"] < 40
    assert end == signal.SIGKILL or said.endswith(
        f"last {stopped}/checkpoint.pt: --resume --out {stopped}\n"
    )
    main_of(train, monkeypatch, "--resume", "--out", stopped)
    whole, resumed = (
        train.load_checkpoint(out / "checkpoint.pt") for out in (Path("out"), stopped)
    )
    for state in whole, resumed:
        assert 0 < state.pop("seconds") <= state["log"].pop()["final"]["seconds"]
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (whole, resumed)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_like_one(there):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--",
        train.__file__,
    ]
    subprocess.run([*launch, *SMALL, "--out", "two", "--micro-batch", "4"], check=True)
    one, two = (train.load_checkpoint(f"{out}/checkpoint.pt") for out in ("out", "two"))
    losses = [[line["loss"] for line in run["log"] if "loss" in line] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=1e-3)


@torch.no_grad()
def test_runs_have_a_row_for_each_budget_and_seeds_share_one_with_their_mean(says, monkeypatch):
    for seed, loss in (0, 5), (1, 5.2):
        *lines, last = log_of(Path("out"))
        final = lines[-1]["val_loss"]
        lines[-1]["val_loss"] = dict.fromkeys(final, loss)
        last["final"] |= {"seed": seed, "val_loss": lines[-1]["val_loss"]}
        shutil.copytree("out", f"run.{seed}")
        Path(f"run.{seed}/metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, last])))
    assert "| out |" in says(report, "out --out unused") and {"curves.png", "report.json"} < {
        *os.listdir("out")
    }
    text, drawn = "def f(x):\n    return x\n" * 100, []
    Path("other.txt").write_text(text)
    monkeypatch.setattr(
        report.Figure, "savefig", lambda figure, path, dpi: drawn.extend(figure.axes)
    )
    rows = says(report, "run.0 run.1 out --text other.txt --out figures").splitlines()[3:]
    left, right = ([dict(zip(*line.get_data())) for line in axes.lines] for axes in drawn)
    assert (
        [*map(list, left)]
        == [*map(list, right)]
        == [[0, 10, 20, 30], *[[0, 10, 20, 30, 40]] * 3] * 3
    )
    assert (left[1][40], left[6][40], right[6][40]) == (5, 5.2, pytest.approx(0.2)) and not any(
        right[4].values()
    )
    model, _ = common.load("out/checkpoint.pt", "cpu")
    tokens, size = torch.tensor([*text.encode(), 256]), sum(p.numel() for p in model.parameters())
    x = torch.stack([tokens[i : i + 33] for i in np.linspace(0, 2301 - 33, 2300 // 32).astype(int)])
    for m, of_both, of_out in zip(("12", "8", "4"), rows, rows[3:]):
        assert of_both.startswith(f"| run | matmla, mixed 1:1:1 | {m} | {size:,} | 15,360 | ")
        assert f" | 5.1000 ± 0.1000 | {math.exp(5.1):.3f} | " in of_both
        assert f" | 32 | {final[m]:.4f} | {math.exp(final[m]):.3f} | " in of_out
        assert float(of_out.split("|")[-2]) == pytest.approx(
            model(x[:, :-1], x[:, 1:], int(m))[1].exp().item(), 1e-4
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is a full disk")
def test_diverging_run_stops_and_a_full_disk_keeps_the_old_checkpoint(there, monkeypatch, capsys):
    flags, kept = [*SMALL, "--out", "kept"], Path("kept/checkpoint.pt")
    refuses(["lower --lr"], train, monkeypatch, capsys, *flags, "--lr", "1e38", status=1)
    assert all(p.isfinite().all() for p in train.load_checkpoint(kept)["model"].values())
    before = kept.read_bytes()
    Path("kept/checkpoint.pt.partial").symlink_to("/dev/full")
    refuses(["cannot save kept/checkpoint.pt"], train, monkeypatch, capsys, *flags)
    assert kept.read_bytes() == before and not list(kept.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "command, words",
    [
        ("--step 4", ["--step"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--budgets 16,4", ["(16, 4)", "12"]),
        ("--budgets 4,12", ["(4, 12)", "largest first"]),
        ("--d-R 5", ["5", "even"]),
        ("--shares 1,2", ["(1, 2)", "3"]),
        ("--device abacus", ["abacus"]),
        ("--resume --out no", ["no/checkp"]),
        ("old", ["old has no finished run"]),
        ("--resume --d 48", ["--d 24", "48", "--init"]),
        ("--resume --out old", ["another version", "qkv_bias"]),
        ("--resume --steps 2", ["40 steps", "--steps 2"]),
        ("--init out/checkpoint.pt", ["another --out"]),
        ("--resume --out untrained", ["--init"]),
        ("--init out/metrics.jsonl --out new", ["out/metrics.jsonl"]),
        ("--init out/checkpoint.pt --out new --d 48", ["out/checkpoint.pt", "24", "48"]),
        ("--init untied/checkpoint.pt --out new --tie", ["untied/checkpoint.pt", "--tie"]),
        ("--prompt=", ["0 tokens"]),
        ("--heads 12:5,99:*", ["99", "12"]),
        ("--heads 12:5,4:9", ["14", "400"]),
        ("--heads 4:*,2:3", ["neither"]),
        ("--prompt a\udcff", ["utf-8"]),
        ("out out", ["two runs are"]),
        ("out --text none.txt", ["none.txt"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(command, words, there, monkeypatch, capsys):
    saved = torch.load("out/checkpoint.pt", weights_only=True)
    for name, change in {
        "untrained": {"optimizers": []},
        "untied": {"config": saved["config"] | {"tie": False}},
        "old": {"config": saved["config"] | {"qkv_bias": False}},
    }.items():
        Path(name).mkdir(exist_ok=True)
        common.save(Path(name, "checkpoint.pt"), **saved | change | {"log": []})
    script = (
        report
        if command[0] != "-"
        else sample
        if command.startswith(("--heads", "--prompt"))
        else train
    )
    refuses(words, script, monkeypatch, capsys, *command.split())


def test_sample_writes_the_models_generation_in_whole_characters_and_repeats_with_its_seed(
    says, there, monkeypatch
):
    prompt, flags = (
        torch.tensor([list("defé".encode())]),
        "--device cpu --checkpoint loud/checkpoint.pt ",
    )
    greedy = flags + "--temperature 0 --tokens 50 --prompt defé "
    new = [
        there.generate(prompt, 50, m, temperature=0)[0].tolist()
        for m in (12, 8, 4, [12] * 10 + [4] * 40)
    ]
    texts = [common.get_encoding("bytes").decode(tokens) for tokens in new]
    assert len(set(texts)) == 4  # else it would not matter which one is written
    assert (
        says(sample, greedy) == texts[0] + "\n"
        and says(sample, greedy + "--heads 4") == texts[2] + "\n"
    )
    assert says(sample, greedy + "--heads 12:10,4:*") == texts[3] + "\n"
    compared = says(sample, greedy + "--compare")
    assert all(
        f"--- {m} heads ---\n{text}\n--- {m} heads: " in compared
        for m, text in zip((12, 8, 4), texts)
    )
    assert (
        compared.count("tokens/s, 128 bytes of cache per token") == 3
    )  # 2 x (12 + 4) numbers of 4 bytes
    first, again, other = (says(sample, f"{flags} --tokens 30 --seed {seed}") for seed in (1, 1, 2))
    assert first == again != other
    stream = [*"é日".encode(), 299, 0xE6]  # 299 is in no vocabulary, E6 half a character
    monkeypatch.setattr(GPT, "stream", lambda *a: (torch.tensor([token]) for token in stream))
    assert says(sample, flags + "--prompt a --tokens 7") == "aé日?\ufffd\n"


def test_a_token_takes_the_bytes_that_the_papers_say_and_variants_are_timed_beside_mha(
    says, monkeypatch
):
    times = iter(range(1, 99))
    monkeypatch.setitem(bench_cache.SHAPES, "cpu", [(2, 40)])
    monkeypatch.setattr(bench_cache, "seconds", lambda call: len(call()) and next(times))
    published, paper, tiny = (
        json.loads(says(bench_cache, f"--device cpu --preset {name}").splitlines()[-1])
        for name in ("deepseek-v3", "paper", "tiny")
    )
    assert [row["measured"] for row in published["sizes"]] == [70272, 327680, 516096]
    assert [row["measured"] for row in paper["sizes"]] == [
        61440,
        61440,
        40960,
        20480,
        20480,
        10240,
        10240,
    ]
    assert [tuple(row.values())[2:] for row in tiny["speeds"]] == [
        ("mha", "", 12, 1, 1),
        ("gqa", "", 12, 3, 2),
        ("nested_mha", "full", 4, 5, 3),
        ("matmla", "naive", 12, 7, None),
        ("matmla", "absorbed", 12, 8, 4.5),
        ("matmla", "absorbed", 8, 10, 5.5),
        ("matmla", "absorbed", 4, 12, 6.5),
    ]


@torch.no_grad()
def test_the_switching_matrix_is_the_perplexity_of_text_after_a_prefix(says, there):
    table = json.loads(says(bench_cache, "--device cpu --switch loud").splitlines()[-1])[
        "perplexity"
    ]["loud"]
    text = torch.from_numpy(
        np.fromfile(next(Path("data").glob("*/val.bin")), np.uint16).astype(int)
    )
    windows = torch.stack(
        [text[int(start) :][:33] for start in np.linspace(0, len(text) - 33, 128)]
    )
    for m in (12, 8, 4):  # both halves at m heads: one plain pass
        loss = there.loss(there(windows[:, :-1], heads=m)[0][:, 16:], windows[:, 17:])
        assert table[str(m)][str(m)] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert len({value for row in table.values() for value in row.values()}) == 9


@pytest.fixture
def recorded(monkeypatch):
    """In place of a CUDA graph: the function is called again, and its result left in the same tensor."""

    def record(function, device):
        result = decode.matmla.attend is decode.attend_one and function().clone()
        return SimpleNamespace(replay=lambda: result.copy_(function())), result

    monkeypatch.setattr(decode, "record", record)
    monkeypatch.setattr(decode, "compiled", lambda forward, lone: forward)


def compare(model, budgets, tolerance=1e-10, batch=2, heads=None, start=9, capacity=30):
    """A fast step and the model's own, one token for each budget. Returns the cache with the graphs."""
    tokens, usual = (
        some_tokens(batch, start + len(budgets)).to(model.embed.weight.device),
        model.step,
    )
    ours, theirs = (model.new_cache(batch, capacity, heads) for _ in range(2))
    for layer in ours:
        layer.rows.fill_(7.0)  # what is not in use must not be read
    decode.fast(model)
    for step, cache in (model.step, ours), (usual, theirs):
        step(tokens[:, :start], budgets[0], cache)
    for token, m in zip(tokens[:, start:].split(1, 1), budgets):
        assert error(model.step(token, m, ours), usual(token, m, theirs)) < tolerance, m
    assert all(
        error(a.rows[:, : a.length], b.rows[:, : b.length]) < tolerance
        for a, b in zip(ours, theirs)
    )
    return ours


@pytest.mark.parametrize("attention", ATTENTION)
def test_fast_steps_are_the_models_own_at_every_budget(attention, recorded):
    model = make(attention, **WIDER)
    assert (type(decode.join(model.blocks[0])) is decode.Joined) == (attention in ("mla", "matmla"))
    budgets = (
        [6, 4, 1, (6, 2), 5, (4, 4), 6] if model.blocks[0].attention.nested else [6, None, (6, 6)]
    )
    cache = compare(model, budgets, capacity=9 + len(budgets))
    with pytest.raises(ValueError, match="do not fit"):  # nor is the full cache overwritten
        model.step(some_tokens(2, 1), 6, cache)


def test_a_ragged_cache_no_query_latent_and_no_absorption_decode_and_a_graph_serves_1024_rows_or_doublings(
    recorded,
):
    compare(make("nested_mha", **WIDER), [4, 3], heads=4)
    compare(make("matmla", d_cq=0, **WIDER), [4, 3])
    next(readers(model := make("matmla", **WIDER)))  # naive
    assert decode.join(model.blocks[0]) is model.blocks[0]
    compare(model, [4, 3])
    cache = compare(make("matmla", context=5000), [6, 4, None, 6], start=1022, capacity=3000)
    assert set(cache.graphs) == {((6,), 1024), ((4,), 1024), ((6,), 2048)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("batch", [1, 40])
def test_cuda_graphs_decode_like_the_models_own_step(attention, batch):
    budgets = [6, 4, 1] if ATTENTION[attention].nested else [6]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.08)):
        model = make(
            attention,
            dtype,
            context=400,
            d_h=16,
            d_c=24,
            d_R=32 if "pretrained" in attention else 8,
        )
        cache = compare(
            model.cuda(), 4 * budgets, tolerance, batch, start=254, capacity=300
        )  # across a block
        assert len(cache.graphs) == len(budgets)
