"""
Train a language model whose attention works with several numbers of heads, its budgets.

    python train.py                                            MatMLA on Python's standard library
    python train.py --attention mla --n-h 8 --out out/mla8     a baseline with 8 heads
    python train.py --data FILE_OR_FOLDER                      your own text, in GPT-2 tokens
    python train.py --preset paper --out out/paper             the size of the MatMLA paper
    torchrun --nproc_per_node=2 -- train.py ...                the same on two GPUs
    python train.py --resume --out out/paper                   go on as if it had not stopped
    python train.py --init out/paper/checkpoint.pt ...         a new run from these weights

By default every sequence is read once, with one of the budgets, in proportion to their heads.
--out gets checkpoint.pt and metrics.jsonl.
"""

import argparse
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import (
    FIELDS,
    PRESETS,
    Parser,
    check_budgets,
    claim,
    evaluate,
    fill,
    integers,
    load_checkpoint,
    make_config,
    natural,
    positive,
    save,
    write_log,
)
from data import open_tokens, prepare, windows
from devices import (
    Captured,
    CapturedPasses,
    can_compile,
    compile_parts,
    mixed_precision,
    start_processes,
)
from matmla import ATTENTION, GPT
from muon import Muon
from pretrained import make_model
from tokenizer import UserError, explained, get_encoding, read_tokenizer

OBJECTIVES = "mixed", "sum", "sample", "layers"  # described in micro_batches

# ---------------------------------------------------------------- the command line


FLAGS = {  # beside those of the model; the defaults are the preset tiny
    "--preset": dict(
        default="tiny", choices=PRESETS, help="sizes and recipe, changed by other flags"
    ),
    # what is read
    "--data": dict(
        default="stdlib",
        help="stdlib, fineweb-edu, NAME or NAME:CONFIG on the Hugging Face hub, files of "
        "text, .jsonl or .parquet, or a folder with train.bin and val.bin of tokens",
    ),
    "--tokens": dict(default=0, type=natural, help="prepare so many tokens of the data; 0: all"),
    "--tokenizer": dict(
        help="bytes, a name of tiktoken's such as gpt2, or a folder or Hugging Face "
        "id with a tokenizer.json; by default bytes for stdlib, else gpt2",
    ),
    # how it is learned
    "--objective": dict(default="mixed", choices=OBJECTIVES, help="how a step trains the budgets"),
    "--shares": dict(
        type=integers,
        help="how often each budget has its turn, like 2,1,1; by default in proportion to its "
        "heads",
    ),
    "--steps": dict(default=450, type=positive, help="optimizer steps"),
    "--batch": dict(default=6, type=positive, help="sequences per step"),
    "--lr": dict(default=0.005, type=float, help="peak rate of Muon: matrices inside the blocks"),
    "--lr-adamw": dict(default=0.003, type=float, help="peak rate of AdamW: embeddings and norms"),
    "--warmup": dict(default=20, type=positive, help="steps to the peak rate"),
    "--only": dict(default="", help="train only these weights, like W_DKV,W_KR,W_UK,W_UV"),
    "--seed": dict(default=0, type=natural, help="of the weights and of the order of the data"),
    # where it is computed
    "--device": dict(default="auto", help="cuda, mps or cpu; auto: the first that is there"),
    "--compile": dict(
        action=argparse.BooleanOptionalAction, help="torch.compile; default: on cuda"
    ),
    "--micro-batch": dict(default=64, type=positive, help="sequences per pass and device, at most"),
    # the run
    "--eval-every": dict(
        default=100, type=positive, help="steps between evaluations on held-out text"
    ),
    "--out": dict(default=Path("out"), type=Path, help="folder of the run"),
    "--overwrite": dict(action="store_true", help="replace the run that is in --out"),
    "--resume": dict(action="store_true", help="continue the run in --out, with its own settings"),
    "--init": dict(type=Path, help="a checkpoint.pt: start from its weights, sizes and tokenizer"),
}


def make_parser():
    """FLAGS, and a flag for every field of Config."""
    parser = Parser(__doc__)
    for flag, about in FLAGS.items():
        parser.add_argument(flag, **about)
    model = parser.add_argument_group("model", "the fields of Config in matmla.py")
    for name, default in FIELDS.items():
        kind = {"type": integers if isinstance(default, tuple) else type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        model.add_argument("--" + name.replace("_", "-"), default=default, help=name, **kind)
    return parser


def settings(argv=None):
    """Parse the command line: (parser, args).

    A flag beats what --resume or --init finds in its checkpoint, which beats the preset.
    """
    parser = make_parser()
    early, _ = parser.parse_known_args(argv)
    start = parser.run(read_start, early)
    parser.set_defaults(start=start, **PRESETS[early.preset])
    if start:
        parser.set_defaults(**start["settings" if early.resume else "config"])
    args = parser.parse_args(argv)
    asked = args.budgets
    parser.run(complete, args)
    if asked != args.budgets and asked != parser.get_default("budgets"):
        nested = ", ".join(name for name in ATTENTION if ATTENTION[name].nested)
        parser.error(f"{args.attention} has one number of heads; --budgets is for {nested}")
    parser.after_interrupt = f"\nto go on from the last checkpoint: --resume --out {args.out}\n"
    return parser, args


def read_start(args):
    """The checkpoint that --resume or --init starts from, or None. UserError if it cannot be."""
    if args.init and (args.resume or args.init.resolve().parent == args.out.resolve()):
        raise UserError("--init is for a new run: not with --resume, and in another folder, --out")
    path = args.out / "checkpoint.pt"
    if args.resume:
        start = load_checkpoint(path)
        if not start["optimizers"]:
            raise UserError(f"{path} was never trained; start from it with --init")
        return start
    if path.exists() and not args.overwrite:
        raise UserError(
            f"{args.out} has a run: --resume it, --overwrite it, or choose another --out"
        )
    return load_checkpoint(args.init) if args.init else None


def complete(args):
    """Settle what follows from other settings. UserError for what does not fit together."""
    start = args.start
    for name in (*FIELDS, "objective", "shares", "batch", "seed", "only", "preset", "tokenizer"):
        if args.resume and getattr(args, name) != start["settings"][name]:
            flag, old = "--" + name.replace("_", "-"), start["settings"][name]
            raise UserError(
                f"{args.out} has {flag} {old} and cannot go on with {getattr(args, name)}; "
                "a new run can start from its weights, with --init"
            )
    if args.resume and start["step"] > args.steps:
        raise UserError(f"{args.out} has {start['step']} steps, more than --steps {args.steps}")

    if args.resume or (start and args.tokenizer is None):
        args.encoding = start["encoding"]
    else:
        default = "bytes" if args.data == "stdlib" else "gpt2"
        args.encoding = read_tokenizer(args.tokenizer or default)
    if not start:
        n = get_encoding(args.encoding).n_vocab
        rounded = n if args.encoding == "bytes" else math.ceil(n / 64) * 64  # odd sizes are slow
        args.vocab_size = max(args.vocab_size, rounded)

    if not (0 <= args.lr < math.inf and 0 <= args.lr_adamw < math.inf):
        raise UserError(f"rates {args.lr} and {args.lr_adamw} must be finite, and 0 or more")
    config = make_config(vars(args))
    if not ATTENTION[config.attention].nested:
        args.budgets = (args.n_h,)
    check_budgets(args.budgets, config)
    unit = math.gcd(*args.budgets)
    args.shares = args.shares or tuple(m // unit for m in args.budgets)
    if len(args.shares) != len(args.budgets) or min(args.shares) < 1:
        raise UserError(
            f"shares {args.shares} must be positive, one for each of {len(args.budgets)} budgets"
        )


# ---------------------------------------------------------------- the objective


def micro_batches(args, step, rank=0, world=1):
    """Yield (sequences, heads, weight) of every pass of a step.

    sequences: their places in the batch; heads: who reads them; weight: how their loss counts. A
    process takes every world-th sequence, divided evenly into passes of at most --micro-batch.
      mixed   the sequences of the run take the budgets in turn, by their shares; within a batch
              the largest budgets come first
      sum     every budget has its own pass, and its share of the loss
      sample  all steps take budgets in turn, by their shares
      layers  as in the paper: every layer draws a budget, by the shares, for the whole batch
    A sequence's budget does not depend on the number of processes or passes.
    """
    turns = np.repeat(args.budgets, args.shares)
    mine = np.arange(rank, args.batch, world)
    count = math.ceil(len(mine) / args.micro_batch)
    for sequences in np.array_split(mine, count):  # neighbours, so that a pass has few budgets
        weight = len(sequences) / len(mine)
        if args.objective == "mixed":
            places = step * args.batch + np.arange(args.batch)
            budgets = np.sort(turns[places % len(turns)])[::-1]  # of the whole batch
            yield sequences, tuple(budgets[sequences].tolist()), weight
        elif args.objective == "sample":
            yield sequences, int(turns[step % len(turns)]), weight
        elif args.objective == "layers":
            draw = np.random.default_rng((args.seed, step, 1))  # the same in every pass
            yield sequences, draw.choice(turns, args.n_layer).tolist(), weight
        else:
            for m, share in zip(args.budgets, args.shares):
                yield sequences, m, weight * share / len(turns)


def freeze(model, only):
    """Let only the weights that `only` names, like W_UK,W_UV, be trained. UserError if none is so.

    A name may be any part of a weight's full name, such as W_UK of blocks.0.attention.W_UK.weight.
    """
    names = set(only.split(","))
    parts = {name: set(name.split(".")) for name, _ in model.named_parameters()}
    unknown = names.difference(*parts.values())
    if unknown:
        raise UserError(f"--only {only}: no weight is named {' or '.join(sorted(unknown))!r}")
    for name, p in model.named_parameters():
        p.requires_grad_(not names.isdisjoint(parts[name]))
    if not any(p.requires_grad for p in model.blocks.parameters() if p.dim() == 2):
        raise UserError(f"--only {only} names no matrix of the blocks")


def model_to_train(args):
    """The model of a run, before it gets the weights of a checkpoint."""
    model = make_model(make_config(vars(args)), args.start["model"] if args.start else {})
    if args.only:
        freeze(model, args.only)
    return model


def flops_per_token(args):
    """Floating-point operations of one token in training, forward and backward, by torch's count.

    Attention is counted as the whole square of scores, T x T, of which causal kernels compute half.
    In the long run budgets come by their shares, so the mean of theirs is that of any objective;
    `sum` has a pass for each.
    """
    with torch.device("meta"):  # tensors without data
        model = model_to_train(args)
        tokens = torch.zeros(1, args.context, dtype=torch.long)
    costs = []
    for m in args.budgets:
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens, m)[1].backward()
        costs.append(counter.get_total_flops() / args.context)
    if args.objective == "sum":
        return sum(costs)
    return float(np.average(costs, weights=args.shares))


# ---------------------------------------------------------------- one step


def make_optimizers(model):
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    inside = {p: None for p in model.blocks.parameters() if p.dim() == 2}
    matrices = {p: None for p in inside if p.requires_grad}
    rest = [p for p in model.parameters() if p not in inside]
    return (
        Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def lr_multiplier(step, args):
    """What part of the peak learning rate a step has, counted from 0: warmup-stable-decay.

    It rises to 1 in --warmup steps, stays there, and falls over the last 60% of all steps, along a
    line that would be 0 one step after the last.
    """
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / (0.6 * args.steps))


def run_pass(model, x, y, heads, weight):
    """Forward and backward. Adds to the gradients; returns the weighted loss."""
    with mixed_precision(x.device):
        loss = model(x, y, heads)[1] * weight
    loss.backward()
    return loss.detach()


def train_step(model, optimizers, tokens, step, args, world, run_pass=run_pass):
    """One optimizer step. The mean loss of this process's sequences, still on the device."""
    for optimizer, peak in zip(optimizers, (args.lr, args.lr_adamw)):
        optimizer.param_groups[0]["lr"] = peak * lr_multiplier(step, args)

    order = np.random.default_rng((args.seed, step))  # of seed and step alone: nothing to save
    starts = order.integers(len(tokens) - args.context, size=args.batch)
    total = 0
    for sequences, heads, weight in micro_batches(args, step, world.rank, world.size):
        x, y = windows(tokens, starts[sequences], args.context, world.device)
        total = total + run_pass(model, x, y, heads, weight)

    world.average([p.grad for p in model.parameters() if p.requires_grad])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # graphs know where the gradients are
    return total


# ---------------------------------------------------------------- the run

LOWER = "nothing was saved since the last evaluation. Try a lower --lr"
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # FLOPs/s, by datasheets
OF_THIS_CALL = "out", "resume", "init", "start", "encoding", "overwrite"  # not of the run


class Logbook:
    """What a run tells: its log, which becomes metrics.jsonl, and a progress bar.

    entries: the log so far; seconds: the time spent before; first: the step that this call starts
    with; shown: whether there is a bar.
    """

    def __init__(self, args, entries, seconds, first, shown):
        self.entries = entries
        self.tokens_per_step = args.batch * args.context
        self.start = time.perf_counter() - seconds
        self.marks = []  # the time at every 10th step
        self.bar = tqdm(
            total=args.steps * self.tokens_per_step,
            initial=first * self.tokens_per_step,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None if shown else True,
        )

    @property
    def seconds(self):
        return time.perf_counter() - self.start

    @property
    def speed(self):
        """Tokens per second, by the median time of ten steps: evaluations hardly count. Or None."""
        if len(self.marks) < 2:
            return None
        return 10 * self.tokens_per_step / float(np.median(np.diff(self.marks)))

    def batch(self, step, loss):
        """The mean loss of a step's batch."""
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}; {LOWER}")
        self.entries.append({"step": step, "loss": loss})
        self.marks.append(time.perf_counter())
        self.bar.set_postfix(loss=f"{loss:.3f}")

    def tell(self, step, losses):
        """Print losses on held-out text, {m: loss}. With a lock, Ctrl-C might be a traceback."""
        text = ", ".join(f"{loss:.3f} at {m} heads" for m, loss in losses.items())
        pace = f" ({self.speed:,.0f} tokens/s)" if self.speed else ""
        self.bar.write(f"step {step}: held-out loss {text}{pace}", nolock=True)


def build(args, world):
    """(model, its optimizers, what runs a pass), with the weights that the run starts from."""
    torch.manual_seed(args.seed % 2**63)
    torch.set_float32_matmul_precision("high")  # what stays in float32 may use tf32
    model = model_to_train(args).to(world.device)
    optimizers = make_optimizers(model)
    if args.start:
        if args.tie and not args.start["config"]["tie"]:
            raise UserError(f"{args.init} has two embeddings, and --tie would lose one of them")
        fill(model, args.start["model"], args.init or args.out / "checkpoint.pt")

    run = run_pass
    cuda = world.device.type == "cuda"
    if cuda:
        model.residual_dtype = torch.bfloat16  # half the memory traffic of float32
        run = CapturedPasses(run_pass)
        optimizers[0].directions = Captured(optimizers[0].directions, run.pool)
    if (cuda if args.compile is None else args.compile) and can_compile(world.device):
        compile_parts(model)
    return model, optimizers, run


def restore(args, optimizers, world):
    """(first step, log, seconds so far) of the run that is resumed; of a new one, 0, [], 0."""
    if not args.resume:
        return 0, [], 0.0
    start = args.start
    with explained(f"{args.out} cannot be resumed: its optimizers or seconds are damaged"):
        for optimizer, state in zip(optimizers, start["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for p in optimizer.param_groups[0]["params"]:  # a lost momentum would go unnoticed
                shapes = {x.shape for x in optimizer.state[p].values() if x.dim()}
                if start["step"] and p.requires_grad and shapes != {p.shape}:
                    raise ValueError(f"a weight of shape {[*p.shape]} has a momentum of {shapes}")
        seconds = float(start["seconds"])
    if world.first:
        write_log(args.out, start["log"])  # a run may have been killed between its two files
    log = [line for line in start["log"] if "final" not in line]  # a longer run has another
    return start["step"], log, seconds


def load_data(args, world):
    """(tokens to train on, tokens held out, their fingerprint). The first process prepares them."""
    source = args.data, args.encoding, args.tokens, args.vocab_size
    if world.first:
        prepare(*source)
    world.wait()
    known = args.start.get("data") if args.resume else None
    tokens, held_out, _, found = open_tokens(*source, args.context, args.out, known)
    return tokens, held_out, found


class Run:
    """A run between two steps. `advance` takes a step, `save` writes, `measure` also evaluates."""

    def __init__(self, args, world):
        self.args, self.world = args, world
        self.model, self.optimizers, self.run_pass = build(args, world)
        self.step, log, seconds = restore(args, self.optimizers, world)
        self.tokens, self.held_out, self.data = load_data(args, world)
        self.book = Logbook(args, log, seconds, self.step, world.first)

    def __str__(self):
        size = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.args.attention}, {size:,} parameters, heads {self.args.budgets}, "
            f"{self.world.size} x {self.world.device.type}; "
            f"{len(self.tokens):,} tokens to train on, {len(self.held_out):,} held out"
        )

    def advance(self):
        """Take a step. Only at every 10th does the host wait for the device, to tell the loss."""
        loss = train_step(
            self.model,
            self.optimizers,
            self.tokens,
            self.step,
            self.args,
            self.world,
            self.run_pass,
        )
        self.book.bar.update(self.book.tokens_per_step)
        if self.step % 10 == 0:
            self.world.average([loss])
            self.book.batch(self.step, loss.item())
        self.step += 1

    def measure(self):
        """Evaluate, save, and tell. Before the first step and at the end more text is read."""
        book = self.book
        if self.world.first:
            count = 256 if self.step in (0, self.args.steps) else 32
            budgets = self.args.budgets
            with torch.compiler.set_stance("force_eager"):
                losses = dict(zip(budgets, evaluate(self.model, self.held_out, count, budgets)))
            book.entries.append({"step": self.step, "val_loss": losses})
            if self.step == self.args.steps:
                book.entries.append({"step": self.step, "final": self.summary()})
        self.save()
        if self.world.first:  # after saving, for it fails if the reader of a pipe has gone
            book.tell(self.step, losses)

    def save(self):
        """Write checkpoint.pt, from which the run can go on, and metrics.jsonl."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise UserError(f"a weight is not finite after step {self.step}; {LOWER}")
        if self.world.first:
            save(
                self.args.out / "checkpoint.pt",
                config=vars(self.model.config),
                settings={k: v for k, v in vars(self.args).items() if k not in OF_THIS_CALL},
                encoding=self.args.encoding,
                step=self.step,
                seconds=self.book.seconds,
                model=self.model.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
                log=self.book.entries,
                data=self.data,
            )

    def summary(self):
        """The last line of a finished run's log, a dict."""
        args, device, book = self.args, self.world.device, self.book
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else device.type
        peak = next((flops for chip, flops in PEAK.items() if chip in name), None)
        cost = flops_per_token(args)
        tokens = args.steps * book.tokens_per_step
        shares = ":".join(map(str, args.shares))
        nested = ATTENTION[args.attention].nested
        rates = book.speed and peak
        return {
            "variant": f"{args.attention}, {args.objective} {shares}" if nested else args.attention,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens": tokens,
            "flops": cost * tokens,
            "cache_bytes": GPT(self.model.config).bfloat16().new_cache(1, 1).nbytes,
            "val_loss": book.entries[-1]["val_loss"],
            "seconds": book.seconds,
            "tokens_per_second": book.speed,
            "mfu": book.speed * cost / peak / self.world.size if rates else None,
            "seed": args.seed,
            "memory": torch.cuda.max_memory_allocated(device) if cuda else None,  # peak bytes
            "device": f"{self.world.size} x {name}",
            "torch": str(torch.__version__),
        }


def train(args):
    """The whole run, alone in its folder. Under torchrun every process comes here."""
    world = start_processes(args)
    with claim(args.out) if world.first else nullcontext():
        run = Run(args, world)
        sigterm = []  # not empty once SIGTERM has come, as schedulers send it before the end
        signal.signal(signal.SIGTERM, lambda number, frame: sigterm.append(number))
        if world.first:
            print(run, flush=True)
        if not run.book.entries:  # a run that was stopped at step 0 has them
            run.measure()
        while run.step < args.steps:
            run.advance()
            if run.step % args.eval_every == 0 or run.step == args.steps:
                run.measure()
            if sigterm and run.step < args.steps:
                if run.step % args.eval_every:  # else it has just been saved
                    run.save()
                if world.first:
                    again = f"to go on: --resume --out {args.out}"
                    print(f"stopped after step {run.step} and saved; {again}", file=sys.stderr)
                sys.exit(128 + signal.SIGTERM)
        run.book.bar.close()
        world.leave()
    if world.first:
        files = f"checkpoint.pt and metrics.jsonl in {args.out}"
        print(f"trained in {run.book.seconds / 60:.1f} minutes; wrote {files}")


def main():
    if os.environ.get("RANK", "0") != "0":  # the first process says what is wrong for all
        sys.stderr = open(os.devnull, "w")
    parser, args = settings()
    sys.stderr = sys.__stderr__
    parser.run(train, args)


if __name__ == "__main__":
    main()
