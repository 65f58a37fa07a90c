"""
Train a language model whose attention works at several head budgets.

    python train.py                                            MatMLA at 12, 8 and 4 heads, on Python's standard library
    python train.py --attention mla --n-h 8 --out out/mla8     a baseline with 8 heads, everything else the same
    python train.py --data FILE_OR_FOLDER                      your own .txt, .jsonl or .parquet, in GPT-2 tokens
    python train.py --preset paper --out out/paper             209M parameters on FineWeb-Edu, the scale of the paper
    torchrun --nproc_per_node=2 -- train.py ...                the same on two GPUs
    python train.py --resume --out out/paper                   go on after an interruption, as if there had been none
    python train.py --init out/paper/checkpoint.pt ...         a new run from these weights, or those of transmla.py

One pass per step trains all budgets: equal parts of the batch get one each. --out gets checkpoint.pt and metrics.jsonl.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import (  # the first of ours: it decides which file is matmla
    FIELDS,
    Parser,
    check_budgets,
    evaluate,
    fill,
    integers,
    load_checkpoint,
    make_config,
    mixed_precision,
    natural,
    pick_device,
    positive,
    save,
)
from data import prepare, read_tokens, windows
from matmla import ATTENTION, GPT

PRESETS = {
    "tiny": {},  # a laptop, minutes: the defaults below and in Config
    "small": dict(  # one GPU, minutes: 30M parameters
        data="fineweb-edu",
        tokens=200_000_000,
        vocab_size=50304,
        context=1024,
        n_layer=6,
        d=384,
        d_h=32,
        d_c=112,
        d_cq=192,
        d_R=16,
        d_ff=1024,
        steps=2000,
        batch=96,
        micro_batch=48,
        lr=0.006,
        lr_adamw=0.003,
        warmup=100,
        eval_every=250,
    ),
    "paper": dict(  # one GPU, hours: 209M parameters, 4.2B tokens
        data="fineweb-edu",
        tokens=4_300_000_000,
        vocab_size=50304,
        context=1024,
        n_layer=20,
        d=768,
        d_h=64,
        d_c=224,
        d_cq=384,
        d_R=32,
        d_ff=2048,
        tie=False,
        steps=8600,
        batch=480,
        micro_batch=48,
        lr=0.002,
        lr_adamw=0.002,
        warmup=200,
        eval_every=250,
    ),
}


def settings(argv=None):
    """Parse the command line: (parser, args). A flag beats what --resume or --init finds, which beats the preset."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--preset",
        default="tiny",
        choices=PRESETS,
        help="sizes and recipe that the other flags change",
    )
    add(
        "--data",
        default="stdlib",
        help="stdlib, fineweb-edu, NAME or NAME:CONFIG on the Hugging Face hub, a .txt, "
        ".jsonl or .parquet file or a folder of them, or a folder with train.bin and val.bin of tokens",
    )
    add(
        "--tokens",
        default=0,
        type=natural,
        help="stop preparing data after so many tokens; 0: take all",
    )
    add(
        "--objective",
        default="mixed",
        choices=["mixed", "sum", "sample"],
        help="how a step trains the budgets",
    )
    add(
        "--shares",
        type=integers,
        help="how often each budget has its turn, like 2,1,1; by default equally often",
    )
    add("--steps", default=500, type=positive, help="optimizer steps")
    add(
        "--batch",
        default=9,
        type=positive,
        help="sequences per step; a multiple of the shares compiles fastest",
    )
    add(
        "--micro-batch",
        default=64,
        type=positive,
        help="sequences per pass and device; more are accumulated",
    )
    add(
        "--lr",
        default=0.005,
        type=float,
        help="peak learning rate of Muon, for the matrices inside the blocks",
    )
    add(
        "--lr-adamw",
        default=0.003,
        type=float,
        help="peak learning rate of AdamW, for the embeddings and the norms",
    )
    add(
        "--warmup",
        default=20,
        type=positive,
        help="steps to the peak; over the last 60%% of the steps the rate falls",
    )
    add(
        "--eval-every",
        default=100,
        type=positive,
        help="steps between two looks at held-out text, and checkpoints",
    )
    add(
        "--seed",
        default=0,
        type=natural,
        help="of the initial weights and of the order of the data",
    )
    add(
        "--device",
        default="auto",
        help="cuda, mps or cpu; auto takes the first of them that is there",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile; by default on cuda only",
    )
    add("--out", default=Path("out"), type=Path, help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --out, with its own settings")
    add(
        "--init",
        type=Path,
        help="a checkpoint.pt: start from its weights, sizes and tokenizer; take much lower rates",
    )
    model = parser.add_argument_group("model", "the fields of Config in matmla.py")
    for name, default in FIELDS.items():
        kind = {"type": integers if isinstance(default, tuple) else type(default)}
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else kind
        model.add_argument("--" + name.replace("_", "-"), default=default, help=name, **kind)

    early, _ = parser.parse_known_args(argv)
    if early.init and (early.resume or early.init.resolve().parent == early.out.resolve()):
        parser.error(
            "--init starts a new run: not with --resume, and not into its own folder; choose another --out"
        )
    path = early.out / "checkpoint.pt" if early.resume else early.init
    start = parser.attempt(load_checkpoint, path) if path else None
    if early.resume and not start["optimizers"]:
        parser.error(f"{path} was not trained, so there is nothing to resume; take it with --init")
    parser.set_defaults(**PRESETS[early.preset])
    parser.set_defaults(
        start=start, **start["settings" if early.resume else "config"] if start else {}
    )
    args = parser.parse_args(argv)
    for name in (*FIELDS, "objective", "shares", "batch", "seed") if args.resume else ():
        if getattr(args, name) != start["settings"][name]:
            parser.error(
                f"{path} has --{name.replace('_', '-')} {start['settings'][name]} and cannot go on with "
                f"{getattr(args, name)}; a new run can start from its weights, with --init"
            )
    if args.resume and start["step"] > args.steps:
        parser.error(f"{path} has {start['step']} steps already, more than --steps {args.steps}")
    args.encoding = start["encoding"] if start else "bytes" if args.data == "stdlib" else "gpt2"
    args.vocab_size = max(
        args.vocab_size, {"bytes": 257, "gpt2": 50304}.get(str(args.encoding), 0)
    )  # 50257 is slow
    if not ATTENTION[parser.attempt(make_config, vars(args)).attention].nested:
        args.budgets = (args.n_h,)
    parser.attempt(check_budgets, args.budgets, args.n_h)
    args.shares = args.shares or (1,) * len(args.budgets)
    if len(args.shares) != len(args.budgets) or min(args.shares) < 1:
        parser.error(
            f"shares {args.shares} must be positive, one for each of the {len(args.budgets)} budgets"
        )
    parser.stopped = f"\nstopped; to go on from the last {args.out / 'checkpoint.pt'}: --resume --out {args.out}\n"
    return parser, args


def passes(args, step, rank=0, world=1):
    """Yield (rows, heads, weight) of every pass of a step: sequences of the batch, who reads them, how the loss counts.

    A process takes every world-th sequence, evenly divided into passes of at most --micro-batch. Objectives:
    mixed   all sequences of the run take budgets in turn, by their shares; those of a batch are sorted
    sum     every budget has its own pass, and its share of the loss
    sample  all steps take budgets in turn, by their shares
    Neither processes nor passes change what a sequence is read with.
    """
    turns, mine = np.repeat(args.budgets, args.shares), np.arange(rank, args.batch, world)
    dealt = np.sort(turns[(step * args.batch + np.arange(args.batch)) % len(turns)])[::-1]
    count = math.ceil(len(mine) / args.micro_batch)
    for rows in (mine[i::count] for i in range(count)):
        weight = len(rows) / len(mine)
        if args.objective == "mixed":
            yield rows, tuple(dealt[rows].tolist()), weight
        elif args.objective == "sum":
            yield from (
                (rows, m, weight * share / len(turns))
                for m, share in zip(args.budgets, args.shares)
            )
        else:
            yield rows, int(turns[step % len(turns)]), weight


class Muon(torch.optim.Muon):
    """torch's Muon, arXiv:2502.16982: a step along (G Gᵀ)^(-1/2) G for the momentum G of a matrix, so that all its
    directions move alike. Here all matrices of one shape take each operation together: fewer kernels."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        a, b, c = group["ns_coefficients"]
        for rows, columns in {p.shape for p in group["params"]}:
            matrices = [p for p in group["params"] if p.shape == (rows, columns)]
            for p in matrices:
                self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
            grads, momenta = (
                [p.grad for p in matrices],
                [self.state[p]["momentum_buffer"] for p in matrices],
            )
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            G = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov
            G = G.mT if rows > columns else G
            G = G.bfloat16() if G.is_cuda else G  # enough for a direction
            G = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
            for _ in range(group["ns_steps"]):  # Newton-Schulz
                A = G @ G.mT
                G = torch.baddbmm(G, torch.baddbmm(A, A, A, beta=b, alpha=c), G, beta=a)
            G = (G.mT if rows > columns else G).to(matrices[0].dtype)
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                matrices, list(G), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5
            )


def make_optimizers(model):
    """Muon for the matrices inside the blocks, AdamW for the rest. `learn` sets their learning rates."""
    matrices = {p: None for p in model.blocks.parameters() if p.dim() == 2}
    rest = [p for p in model.parameters() if p not in matrices]
    return (
        Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def rate(step, args):
    """The share of the peak learning rate that a step, counted from 0, has. The least of: (step + 1) / warmup, so the
    warm-up's last step is the first at the peak; 1; and a line that is 1 with 60% of all steps left to do, this one
    included, and would be 0 one step after the last."""
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / (0.6 * args.steps))


def compile_parts(model):
    """Compile its blocks and its loss in place. Blocks are equal, so they share one graph for each kind of `heads`."""
    from torch._dynamo import config  # slow to import, needed only here
    from torch._inductor.config import triton

    config.recompile_limit = config.accumulated_recompile_limit = (
        1000  # else the ninth budget is not compiled
    )
    if hasattr(triton, "mix_order_reduction"):  # from torch 2.10 on, a fusion that can make
        triton.mix_order_reduction = False  # gradients wrong: pytorch issue 193061
    for block in model.blocks:
        block.compile(dynamic=False)
    tuned = {"max_autotune_pointwise": True}  # logits are the largest tensor: 10% faster
    model.loss = torch.compile(model.loss, dynamic=False, options=tuned)


def learn(run, optimizers, tokens, step, args, rank=0, world=1):
    """One optimizer step. Returns the mean loss of this process's part of the batch, a number still on the device."""
    device = next(run.parameters()).device
    for optimizer, peak in zip(optimizers, (args.lr, args.lr_adamw)):
        optimizer.param_groups[0]["lr"] = peak * rate(step, args)
    order = np.random.default_rng((args.seed, step))  # of seed and step alone: nothing to save
    starts = order.integers(len(tokens) - args.context, size=args.batch)
    total, todo = 0, list(passes(args, step, rank, world))
    for i, (rows, heads, weight) in enumerate(todo, start=1):
        x, y = windows(tokens, starts[rows], args.context, device)
        alone = world > 1 and i < len(todo)  # gradients are shared in the last pass only
        with mixed_precision(device), run.no_sync() if alone else nullcontext():
            loss = run(x, y, heads)[1] * weight
            loss.backward()
        total += loss.detach()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def flops_per_token(args):
    """Floating-point operations that one token costs in training, counted by torch on tensors without data."""
    with torch.device("meta"):
        model, tokens = (
            GPT(make_config(vars(args))),
            torch.zeros(args.batch, args.context, dtype=torch.long),
        )
    turns = sum(args.shares)
    steps = turns if args.objective == "sample" or args.batch % turns else 1
    with FlopCounterMode(display=False) as counter:
        for rows, heads, _ in (one for step in range(steps) for one in passes(args, step)):
            model(tokens[: len(rows)], tokens[: len(rows)], heads)[1].backward()
    return counter.get_total_flops() / (steps * tokens.numel())


def train(args):
    """The whole run; torchrun starts one process per device, of which the first writes and prints."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.batch % world:
        raise ValueError(f"a batch of {args.batch} cannot be shared evenly by {world} processes")
    device, path, start, master = (
        pick_device(args.device),
        args.out / "checkpoint.pt",
        args.start,
        rank == 0,
    )
    cuda = device.type == "cuda"
    if world > 1:
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=timedelta(days=1)
        )  # preparing data takes long
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else device
    if cuda:
        torch.cuda.set_device(device)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # what stays in float32 may use tf32
    model = GPT(make_config(vars(args))).to(device)  # sizes that do not fit are refused here
    optimizers, first, log, before = make_optimizers(model), 0, [], 0.0
    if start:
        if args.tie and not start["config"]["tie"]:
            raise ValueError(
                f"{args.init} has two embeddings, for input and output; --tie would lose one of them"
            )
        fill(model, start["model"], args.init or path)
    if args.resume:
        first, before, log = (
            start["step"],
            start["seconds"],
            [line for line in start["log"] if "final" not in line],
        )
        for optimizer, state in zip(optimizers, start["optimizers"]):
            optimizer.load_state_dict(state)
    model.embed.register_forward_hook(  # the residual stream: half the traffic
        lambda embed, tokens, x: x.bfloat16() if torch.is_autocast_enabled("cuda") else x
    )
    if args.compile or args.compile is None and cuda and importlib.util.find_spec("triton"):
        compile_parts(model)
    run = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model

    source = args.data, args.encoding, args.tokens, args.vocab_size
    if master:
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(*source)
    if world > 1:
        dist.barrier()  # the others find it prepared
    tokens, held_out = read_tokens(prepare(*source), args.context, args.vocab_size)
    size, per_step = sum(p.numel() for p in model.parameters()), args.batch * args.context
    began, marks = time.perf_counter() - before, []  # marks: the time at every 10th step
    if master:
        print(
            f"{args.attention}, {size:,} parameters, heads {args.budgets}, {world} x {device.type}; "
            f"{len(tokens):,} tokens to train on, {len(held_out):,} held out",
            flush=True,
        )
    bar = tqdm(
        total=args.steps * per_step,
        initial=first * per_step,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None if master else True,
    )

    def look_and_save(step):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"a weight is not finite after step {step}")
        if not master:
            return
        with torch.compiler.set_stance("force_eager"):
            losses = evaluate(model, held_out, 256 if step in (0, args.steps) else 32)
        speed = 10 * per_step / float(np.median(np.diff(marks))) if len(marks) > 1 else None
        seconds = time.perf_counter() - began
        log.append({"step": step, "val_loss": losses})
        if step == args.steps:
            log.append(
                {"step": step, "final": summary(args, size, losses, seconds, speed, device, world)}
            )
        settings = {
            k: v
            for k, v in vars(args).items()
            if k not in ("out", "resume", "init", "start", "encoding")
        }
        save(
            path,
            config=vars(model.config),
            settings=settings,
            encoding=args.encoding,
            step=step,
            seconds=seconds,
            model=model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            log=log,
        )
        losses = ", ".join(f"{loss:.3f} at {m} heads" for m, loss in losses.items())
        pace = f" ({speed:,.0f} tokens/s)" if speed else ""
        bar.write(
            f"step {step}: held-out loss {losses}{pace}", nolock=True
        )  # Ctrl-C in its lock is a traceback

    if first == 0:
        look_and_save(0)
    for step in range(first, args.steps):
        loss = learn(run, optimizers, tokens, step, args, rank, world)
        bar.update(per_step)
        if step % 10 == 0:  # only here does the host wait for the device
            if world > 1:
                dist.all_reduce(loss)
            loss = loss.item() / world
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}")
            log.append({"step": step, "loss": loss})
            marks.append(time.perf_counter())
            bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            look_and_save(step + 1)
    bar.close()
    if world > 1:
        dist.barrier()  # one that leaves early may hang another
        dist.destroy_process_group()
    if master:
        minutes = (time.perf_counter() - began) / 60
        print(
            f"trained in {minutes:.1f} minutes; wrote checkpoint.pt and metrics.jsonl in {args.out}"
        )


def summary(args, parameters, val_loss, seconds, speed, device, world):
    """The last line of a run's log. speed: tokens per second, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    chips = {
        "H100": 989e12,
        "H200": 989e12,
        "A100": 312e12,
        "4090": 165e12,
    }  # by the datasheet, dense, in bfloat16
    peak = next((flops for chip, flops in chips.items() if chip in name), None)
    cost, tokens = flops_per_token(args), args.steps * args.batch * args.context
    nesting = (
        f", {args.objective} {':'.join(map(str, args.shares))}"
        if ATTENTION[args.attention].nested
        else ""
    )
    return dict(
        variant=args.attention + nesting,
        parameters=parameters,
        tokens=tokens,
        flops=cost * tokens,
        cache_bytes=GPT(make_config(vars(args))).bfloat16().new_cache(1, 1).nbytes,
        val_loss=val_loss,
        seconds=seconds,
        tokens_per_second=speed,
        mfu=speed * cost / peak / world if speed and peak else None,
        seed=args.seed,
        memory=torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else None,  # bytes, at the peak
        device=f"{world} x {name}",
        torch=str(torch.__version__),
    )


def main():
    parser, args = settings()
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know all letters
    parser.attempt(train, args)


if __name__ == "__main__":
    main()
