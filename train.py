"""
Train a language model whose attention works at several head budgets.

    python train.py                              MatMLA at 12, 8 and 4 heads, on your Python's standard library
    python train.py --attention mla --n-h 8      a baseline with 8 heads, everything else the same

One pass per step trains all budgets: every sequence of the batch gets one of them, and a mask on the head
outputs does the rest. The optimizer is Muon (arXiv:2502.16982) for the matrices inside the blocks, AdamW for
the others. Results go to --out: checkpoint.pt, and metrics.jsonl with one JSON object per line.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from matmla import ATTENTION, GPT, Config

# ---------------------------------------------------------------- settings: each default stands here, or in Config


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line on stderr and exit status 2."""

    def __init__(self, doc):
        style = type("Style", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
        super().__init__(description=doc, formatter_class=style, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def settings(argv=None):
    """Parse the command line: (parser, args, config)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="stdlib", choices=["stdlib"], help="the .py files of this Python's standard library")
    add("--out", default="out", type=Path, help="folder for the checkpoint and the metrics")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; by default on cuda only")
    add("--seed", default=0, type=int, help="of the initial weights and of the order of the data")
    add("--steps", default=500, type=int, help="optimizer steps")
    add("--batch", default=8, type=int, help="sequences per step")
    add("--lr", default=0.005, type=float, help="peak learning rate of Muon, for the matrices inside the blocks")
    add("--lr-adamw", default=0.003, type=float, help="peak learning rate of AdamW, for the embeddings and the norms")
    add("--weight-decay", default=0.1, type=float, help="of Muon")
    add("--warmup", default=20, type=int, help="steps to the peak; over the last 60%% of all steps the rate falls to 0")
    add("--eval-every", default=100, type=int, help="steps between two looks at the held-out text")
    add("--eval-windows", default=256, type=int, help="held-out windows in the last look, evenly spaced; an eighth of them before")
    model = parser.add_argument_group("model", "the fields of Config in matmla.py")
    for field in dataclasses.fields(Config):
        kind = {bool: boolean, tuple: budgets}.get(type(field.default), type(field.default))
        model.add_argument("--" + field.name.replace("_", "-"), default=field.default, type=kind, help=" ")
    args = parser.parse_args(argv)
    try:
        config = Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})
    except ValueError as error:
        parser.error(error)
    if not ATTENTION[config.attention].nested:
        config.budgets = (config.n_h,)
    elif not 1 <= min(config.budgets) <= max(config.budgets) <= config.n_h:
        parser.error(f"budgets {config.budgets} must lie in 1..{config.n_h}, the heads of the model (--n-h)")
    return parser, args, config


def boolean(text):
    return {"true": True, "false": False}[text.lower()]


def budgets(text):
    return tuple(int(m) for m in text.split(","))


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device                               # fails here, not in the middle
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} on this machine") from None


# ---------------------------------------------------------------- data: uint16 tokens in train.bin and val.bin

END = "<|endoftext|>"


def byte_encoding():
    """Bytes as a tiktoken encoding: 256 tokens that never merge, and one special token between documents."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"[^\n]*\n|[^\n]+", mergeable_ranks=ranks, special_tokens={END: 256})


def stdlib_files():
    """The reader's own standard library, without tests and tables: about 480 files, 9 MB. Sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    if len(files) < 100:
        raise FileNotFoundError(f"{root} has {len(files)} .py files, too few for the standard library")
    return files


def prepare(folder):
    """Write folder/train.bin and folder/val.bin unless they are there; the folder appears whole or not at all."""
    if not folder.exists():
        encoding = byte_encoding()
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        with open(partial / "train.bin", "wb") as train, open(partial / "val.bin", "wb") as val:
            for i, path in enumerate(stdlib_files()):
                tokens = encoding.encode_ordinary(path.read_text("utf-8", errors="replace")) + [encoding.eot_token]
                np.array(tokens, np.uint16).tofile(val if i % 20 == 0 else train)      # whole files are held out
        try:
            partial.rename(folder)
        except OSError:                                                         # another process was faster
            shutil.rmtree(partial)
    return (np.memmap(folder / name, np.uint16, "r") for name in ("train.bin", "val.bin"))


def windows(tokens, starts, context, device):
    """Inputs and targets [len(starts), context]: `context` tokens from each start on, and the same one later."""
    both = torch.from_numpy(np.stack([tokens[i : i + context + 1] for i in starts]).astype(np.int64)).to(device)
    return both[:, :-1], both[:, 1:]


# ---------------------------------------------------------------- training


def optimizers(model, args):
    """Muon for the matrices of the blocks; AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return (
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def rate(step, args):
    """Learning rate as a share of its peak: linear up, flat, linear down to 0."""
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / (0.6 * args.steps))


@torch.no_grad()
def evaluate(model, tokens, count, config, autocast):
    """Mean loss in nats per token at each budget, on `count` windows spaced evenly over the tokens."""
    device = model.embed.weight.device
    starts = np.linspace(0, len(tokens) - config.context - 1, count).astype(int)
    losses = {}
    for m in config.budgets:
        with autocast:
            chunks = [windows(tokens, s, config.context, device) for s in np.array_split(starts, math.ceil(count / 16))]
            losses[m] = sum(model(x, y, heads=m)[1].item() * len(x) for x, y in chunks) / count
    return losses


def save(path, **content):
    """Atomic: a checkpoint is the old one or the new one, never half of it."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load(path, device):
    """A model from a checkpoint of `train`, and the encoding of its tokens. ValueError says what is wrong."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        model = GPT(Config(**content["config"])).to(device)
        model.load_state_dict(content["model"])
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}: train one first, with python train.py") from None
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(error).__name__})") from error
    return model.eval(), byte_encoding()


def main():
    parser, args, config = settings()
    try:
        train(args, config)
    except (ValueError, OSError) as error:
        parser.error(error)


def train(args, config):
    device = pick_device(args.device)
    encoding = byte_encoding()
    train_tokens, val_tokens = prepare(Path("data") / f"stdlib-{sys.version.split()[0]}")
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    step_model = torch.compile(model) if (args.compile is None and device.type == "cuda") or args.compile else model
    optimizer = optimizers(model, args)
    cuda = device.type == "cuda"
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    size = sum(p.numel() for p in model.parameters())
    print(f"{config.attention}, {size:,} parameters, budgets {config.budgets}, {device}; "
          f"{len(train_tokens):,} tokens to train on, {len(val_tokens):,} held out")

    start = time.perf_counter()
    log = open(args.out / "metrics.jsonl", "w", buffering=1)                    # a line at a time

    def look(step):
        count = args.eval_windows if step == args.steps else max(1, args.eval_windows // 8)
        val = evaluate(model, val_tokens, count, config, autocast)
        log.write(json.dumps({"step": step, "val_loss": val}) + "\n")
        bar.write(f"step {step}: held-out loss " + ", ".join(f"{loss:.3f} at {m} heads" for m, loss in val.items()))
        return val

    bar = tqdm(range(args.steps), unit="tok", unit_scale=args.batch * config.context, dynamic_ncols=True)
    look(0)
    for step in bar:
        for o, peak in zip(optimizer, (args.lr, args.lr_adamw)):
            for group in o.param_groups:
                group["lr"] = peak * rate(step, args)
        order = np.random.default_rng((args.seed, step))                        # from seed and step alone
        starts = order.integers(len(train_tokens) - config.context, size=args.batch)
        x, y = windows(train_tokens, starts, config.context, device)
        heads = None
        if ATTENTION[config.attention].nested:                                  # in turn, so that all get equal shares
            turn = torch.arange(step * args.batch, (step + 1) * args.batch) % len(config.budgets)
            heads = torch.tensor(config.budgets)[turn].to(device)
        with autocast:
            loss = step_model(x, y, heads=heads)[1]
        loss.backward()
        for o in optimizer:
            o.step()
            o.zero_grad()
        if step % 10 == 0:
            log.write(json.dumps({"step": step, "loss": loss.item(), "rate": rate(step, args)}) + "\n")
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            look(step + 1)
    val = look(args.steps)
    minutes = (time.perf_counter() - start) / 60

    save(args.out / "checkpoint.pt", config=dataclasses.asdict(config), model=model.state_dict(), step=args.steps)
    print(f"trained in {minutes:.1f} minutes; wrote {args.out / 'checkpoint.pt'}\n")
    print("| heads | held-out loss (nats per token) | perplexity |\n|---|---|---|")
    for m, loss in val.items():
        print(f"| {m} | {loss:.4f} | {math.exp(loss):.3f} |")
    prompt = torch.tensor([encoding.encode("def read(self, ")], device=device)
    for m in config.budgets:
        text = model.eval().generate(prompt, 200, heads=m, temperature=0.8, top_k=40)
        print(f"\n--- a sample at {m} heads ---\n{encoding.decode(text[0].tolist())}")


if __name__ == "__main__":
    main()
