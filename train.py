"""
Train a language model whose attention works with several numbers of heads, its budgets.

    python train.py                                            MatMLA on Python's standard library
    python train.py --attention mla --n-h 8 --out out/mla8     a baseline with 8 heads
    python train.py --data FILE_OR_FOLDER                      your own text, in GPT-2 tokens
    python train.py --preset paper --out out/paper             the size of the MatMLA paper
    torchrun --nproc_per_node=2 -- train.py ...                the same on two GPUs
    python train.py --resume --out out/paper                   go on as if it had not stopped
    python train.py --init out/paper/checkpoint.pt ...         a new run from these weights

One pass per step trains all budgets: parts of the batch get one each. --out gets checkpoint.pt and
metrics.jsonl.
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
from data import fingerprint, prepare, read_tokens, windows
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
from tokenizer import UserError, get_encoding, read_tokenizer

OBJECTIVES = "mixed", "sum", "sample", "layers"  # described in micro_batches

# ---------------------------------------------------------------- the command line


def make_parser():
    """Every flag with its help. Defaults are those of the preset tiny."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--preset", default="tiny", choices=PRESETS, help="sizes and recipe, changed by other flags"
    )
    add(
        "--data",
        default="stdlib",
        help="stdlib, fineweb-edu, NAME or NAME:CONFIG on the Hugging Face hub, files of "
        "text, .jsonl or .parquet, or a folder with train.bin and val.bin of tokens",
    )
    add("--tokens", default=0, type=natural, help="prepare so many tokens of the data; 0: all")
    add(
        "--tokenizer",
        help="bytes, a name of tiktoken's such as gpt2, or a folder or Hugging Face "
        "id with a tokenizer.json; by default bytes for stdlib, else gpt2",
    )
    add("--objective", default="mixed", choices=OBJECTIVES, help="how a step trains the budgets")
    add(
        "--shares",
        type=integers,
        help="how often each budget has its turn, like 2,1,1; by default "
        "in proportion to its heads",
    )
    add("--steps", default=600, type=positive, help="optimizer steps")
    add("--batch", default=6, type=positive, help="sequences per step")
    add("--micro-batch", default=64, type=positive, help="sequences per pass and device, at most")
    add("--lr", default=0.005, type=float, help="peak rate of Muon: matrices inside the blocks")
    add("--lr-adamw", default=0.003, type=float, help="peak rate of AdamW: embeddings and norms")
    add("--warmup", default=20, type=positive, help="steps to the peak rate")
    add("--eval-every", default=100, type=positive, help="steps between looks at held-out text")
    add("--seed", default=0, type=natural, help="of the weights and of the order of the data")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on cuda")
    add("--out", default=Path("out"), type=Path, help="folder of the run")
    add("--overwrite", action="store_true", help="replace the run that is in --out")
    add("--resume", action="store_true", help="continue the run in --out, with its own settings")
    add("--init", type=Path, help="a checkpoint.pt: start from its weights, sizes and tokenizer")
    model = parser.add_argument_group("model", "the fields of Config in matmla.py")
    for name, default in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            model.add_argument(
                flag, default=default, help=name, action=argparse.BooleanOptionalAction
            )
        else:
            kind = integers if isinstance(default, tuple) else type(default)
            model.add_argument(flag, default=default, help=name, type=kind)
    return parser


def settings(argv=None):
    """Parse the command line: (parser, args).

    A flag beats what --resume or --init finds in its checkpoint, which beats the preset.
    """
    parser = make_parser()
    early, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[early.preset], start=None)
    start = parser.run(read_start, early)
    if start:
        parser.set_defaults(start=start, **start["settings" if early.resume else "config"])
    args = parser.parse_args(argv)
    parser.run(complete, args)
    again = f"--resume --out {args.out}"
    parser.after_interrupt = f"\nstopped; to go on from the last checkpoint: {again}\n"
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
    for name in (*FIELDS, "objective", "shares", "batch", "seed"):
        if args.resume and getattr(args, name) != start["settings"][name]:
            flag, old = "--" + name.replace("_", "-"), start["settings"][name]
            raise UserError(
                f"{args.out} has {flag} {old} and cannot go on with {getattr(args, name)}; "
                "a new run can start from its weights, with --init"
            )
    if args.resume and start["step"] > args.steps:
        raise UserError(f"{args.out} has {start['step']} steps, more than --steps {args.steps}")

    if start and args.tokenizer is None or args.resume:
        args.encoding = start["encoding"]
    else:
        default = "bytes" if args.data == "stdlib" else "gpt2"
        args.encoding = read_tokenizer(args.tokenizer or default)
    if args.encoding is not None and not start:
        n = get_encoding(args.encoding).n_vocab
        rounded = n if args.encoding == "bytes" else math.ceil(n / 64) * 64  # odd sizes are slow
        args.vocab_size = max(args.vocab_size, rounded)

    config = make_config(vars(args))
    if not ATTENTION[config.attention].nested:
        args.budgets = config.budgets = (args.n_h,)
    check_budgets(args.budgets, config)
    unit = math.gcd(*args.budgets)
    args.shares = args.shares or tuple(m // unit for m in args.budgets)
    if len(args.shares) != len(args.budgets) or min(args.shares) < 1:
        n = len(args.budgets)
        raise UserError(f"shares {args.shares} must be positive, one for each of {n} budgets")


# ---------------------------------------------------------------- the objective


def micro_batches(args, step, rank=0, world=1):
    """Yield (rows, heads, weight) of every pass of a step.

    rows: which sequences of the batch; heads: who reads them; weight: how their loss counts. A
    process takes every world-th sequence, divided evenly into passes of at most --micro-batch.
      mixed   all sequences of the run take budgets in turn, by their shares; a batch is sorted
      sum     every budget has its own pass, and its share of the loss
      sample  all steps take budgets in turn, by their shares
      layers  as in the paper: every layer draws a budget, by the shares, for the whole batch
    Neither processes nor passes change what a sequence is read with.
    """
    turns = np.repeat(args.budgets, args.shares)
    mine = np.arange(rank, args.batch, world)
    dealt = np.sort(turns[(step * args.batch + np.arange(args.batch)) % len(turns)])[::-1]
    drawn = np.random.default_rng((args.seed, step, 1)).choice(turns, args.n_layer)
    count = math.ceil(len(mine) / args.micro_batch)
    for i in range(count):
        rows = mine[i::count]
        weight = len(rows) / len(mine)
        if args.objective == "mixed":
            yield rows, tuple(dealt[rows].tolist()), weight
        elif args.objective == "sample":
            yield rows, int(turns[step % len(turns)]), weight
        elif args.objective == "layers":
            yield rows, drawn.tolist(), weight
        else:
            for m, share in zip(args.budgets, args.shares):
                yield rows, m, weight * share / len(turns)


def flops_per_token(args):
    """Floating-point operations of one token in training, forward and backward, by torch's count.

    Attention is counted as the whole square of scores, T x T, of which causal kernels compute half.
    In the long run budgets come by their shares, so the mean of theirs is that of any objective;
    `sum` has a pass for each.
    """
    with torch.device("meta"):  # tensors without data
        model, tokens = GPT(make_config(vars(args))), torch.zeros(1, args.context, dtype=torch.long)
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
    matrices = {p: None for p in model.blocks.parameters() if p.dim() == 2}
    rest = [p for p in model.parameters() if p not in matrices]
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
    for rows, heads, weight in micro_batches(args, step, world.rank, world.size):
        x, y = windows(tokens, starts[rows], args.context, world.device)
        total = total + run_pass(model, x, y, heads, weight)

    world.average([p.grad for p in model.parameters()])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # graphs know where the gradients are
    return total


# ---------------------------------------------------------------- the run

LOWER = "nothing was saved since the last look. Try a lower --lr"


class Logbook:
    """What a run tells: its log, which becomes metrics.jsonl, and a progress bar.

    entries: the log so far; seconds: the time spent before; first: the next step.
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
        """Tokens per second, or None: by the median of ten steps, which looks do not disturb."""
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

    def held_out(self, step, losses):
        """The losses on held-out text, {m: loss}."""
        self.entries.append({"step": step, "val_loss": losses})
        text = ", ".join(f"{loss:.3f} at {m} heads" for m, loss in losses.items())
        pace = f" ({self.speed:,.0f} tokens/s)" if self.speed else ""
        line = f"step {step}: held-out loss {text}{pace}"
        self.bar.write(line, nolock=True)  # Ctrl-C while it holds its lock is a traceback


def build(args, world):
    """(model, its optimizers, what runs a pass), with the weights that the run starts from."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # what stays in float32 may use tf32
    weights = args.start["model"] if args.start else {}
    model = make_model(make_config(vars(args)), weights).to(world.device)
    optimizers = make_optimizers(model)
    if args.start:
        if args.tie and not args.start["config"]["tie"]:
            raise UserError(f"{args.init} has two embeddings, and --tie would lose one of them")
        fill(model, weights, args.init or args.out / "checkpoint.pt")

    cuda = world.device.type == "cuda"
    if cuda:
        model.residual_dtype = torch.bfloat16  # half the memory traffic of float32
        optimizers[0].directions = Captured(optimizers[0].directions)
    if (cuda if args.compile is None else args.compile) and can_compile(world.device):
        compile_parts(model)
    return model, optimizers, CapturedPasses(run_pass) if cuda else run_pass


def restore(args, optimizers, world):
    """(first step, log, seconds so far) of the run that is resumed; of a new one, 0, [], 0."""
    if not args.resume:
        return 0, [], 0.0
    start = args.start
    try:
        for optimizer, state in zip(optimizers, start["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for p in optimizer.param_groups[0]["params"]:  # a lost momentum would go unnoticed
                shapes = {x.shape for x in optimizer.state[p].values() if x.dim()}
                if shapes != {p.shape}:
                    raise ValueError(f"a weight of shape {[*p.shape]} has a momentum of {shapes}")
        seconds = float(start["seconds"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{args.out} cannot resume, by its optimizers and seconds: {error}"
        ) from error
    if world.first:
        write_log(args.out, start["log"])  # a run may have been killed between its two files
    log = start["log"]
    if start["step"] < args.steps:
        log = [line for line in log if "final" not in line]
    return start["step"], log, seconds


def load_data(args, world):
    """(tokens to train on, tokens held out, their fingerprint). The first process prepares them."""
    source = args.data, args.encoding, args.tokens, args.vocab_size
    if world.first:
        prepare(*source)
    world.wait()
    folder = prepare(*source)
    tokens, held_out = read_tokens(folder, args.context, args.vocab_size)
    known = fingerprint(folder)
    if args.resume and args.start.get("data") not in (None, known):
        raise UserError(f"{args.data} has changed since {args.out} was started: {folder}")
    return tokens, held_out, known


def heed_sigterm():
    """A list that is no longer empty once SIGTERM has come, as schedulers send before the end."""
    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    return came


def train(args):
    """The whole run, alone in its folder. Under torchrun every process comes here."""
    world = start_processes(args)
    with claim(args.out) if world.first else nullcontext():
        train_in(world, args)


def train_in(world, args):
    """Build, restore, load data; then steps, with a look at held-out text now and then."""
    model, optimizers, run_pass = build(args, world)
    first, log, seconds = restore(args, optimizers, world)
    tokens, held_out, known = load_data(args, world)
    book = Logbook(args, log, seconds, first, world.first)
    sigterm = heed_sigterm()
    if world.first:
        size = sum(p.numel() for p in model.parameters())
        where = f"{world.size} x {world.device.type}"
        text = f"{len(tokens):,} tokens to train on, {len(held_out):,} held out"
        print(f"{args.attention}, {size:,} parameters, heads {args.budgets}, {where}; {text}")

    def look_and_save(step, look=True):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"a weight is not finite after step {step}; {LOWER}")
        if world.first:
            if look:
                book.held_out(step, look_at_held_out_text(model, held_out, step, args))
            if step == args.steps:
                book.entries.append({"step": step, "final": summary(args, model, book, world)})
            save_run(args, model, optimizers, book, step, known)

    if first == 0:
        look_and_save(0)
    for step in range(first, args.steps):
        loss = train_step(model, optimizers, tokens, step, args, world, run_pass)
        book.bar.update(book.tokens_per_step)
        if step % 10 == 0:  # only here does the host wait for the device
            world.average([loss])
            book.batch(step, loss.item())
        done = step + 1
        if done % args.eval_every == 0 or done == args.steps:
            look_and_save(done)
        elif sigterm:
            look_and_save(done, look=False)
        if sigterm and done < args.steps:
            stop(args, done)

    book.bar.close()
    world.leave()
    if world.first:
        files = f"checkpoint.pt and metrics.jsonl in {args.out}"
        print(f"trained in {book.seconds / 60:.1f} minutes; wrote {files}")


def look_at_held_out_text(model, held_out, step, args):
    """{m: loss} at every budget; more text is read before the first step and after the last."""
    count = 256 if step in (0, args.steps) else 32
    with torch.compiler.set_stance("force_eager"):
        return dict(zip(args.budgets, evaluate(model, held_out, count, args.budgets)))


def save_run(args, model, optimizers, book, step, known):
    """Write checkpoint.pt, from which the run can go on, and metrics.jsonl."""
    own = "out", "resume", "init", "start", "encoding", "overwrite"  # of this call, not of the run
    save(
        args.out / "checkpoint.pt",
        config=vars(model.config),
        settings={name: value for name, value in vars(args).items() if name not in own},
        encoding=args.encoding,
        step=step,
        seconds=book.seconds,
        model=model.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        log=book.entries,
        data=known,
    )


def summary(args, model, book, world):
    """The last line of a finished run's log, a dict."""
    cuda = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if cuda else world.device.type
    dense = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # by the datasheets
    peak = next((flops for chip, flops in dense.items() if chip in name), None)
    cost, speed, tokens = flops_per_token(args), book.speed, args.steps * book.tokens_per_step
    shares = ":".join(map(str, args.shares))
    nested = ATTENTION[args.attention].nested
    row_of_all_layers = GPT(model.config).bfloat16().new_cache(1, 1)
    return {
        "variant": f"{args.attention}, {args.objective} {shares}" if nested else args.attention,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "flops": cost * tokens,
        "cache_bytes": row_of_all_layers.nbytes,
        "val_loss": book.entries[-1]["val_loss"],
        "seconds": book.seconds,
        "tokens_per_second": speed,
        "mfu": speed * cost / peak / world.size if speed and peak else None,
        "seed": args.seed,
        "memory": torch.cuda.max_memory_allocated(world.device) if cuda else None,  # peak bytes
        "device": f"{world.size} x {name}",
        "torch": str(torch.__version__),
    }


def stop(args, step):
    """End after a SIGTERM, with the exit status that this signal has."""
    print(
        f"stopped after step {step} and saved; to go on: --resume --out {args.out}", file=sys.stderr
    )
    sys.exit(128 + signal.SIGTERM)


def main():
    if os.environ.get("RANK", "0") != "0":  # the first process says what is wrong for all
        sys.stderr = open(os.devnull, "w")
    parser, args = settings()
    sys.stderr = sys.__stderr__
    parser.run(train, args)


if __name__ == "__main__":
    main()
