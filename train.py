"""
Train a language model whose attention works at several head budgets.

    python train.py                                        MatMLA at 12, 8 and 4 heads, on your Python's standard library
    python train.py --attention mla --n-h 8 --out out/mla8     a baseline with 8 heads, everything else the same
    python train.py --data FILE_OR_FOLDER                  your own .txt, .jsonl or .parquet, in GPT-2 tokens
    python train.py --preset paper --out out/paper         209M parameters on FineWeb-Edu, the MatMLA paper's scale
    torchrun --nproc_per_node=2 train.py ...               the same on two GPUs
    python train.py --resume --out out/paper               go on after an interruption, as if there had been none
    python train.py --init out/paper/checkpoint.pt ...     a new run from the weights of another, such as transmla.py's
    python train.py --report out/paper out/mla8            compare finished runs; with --text FILE on another text too

One pass per step trains all budgets: equal parts of the batch get one each. Results go to --out: checkpoint.pt,
metrics.jsonl (one JSON object per line) and loss.png.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from matmla import ATTENTION, GPT, Config

# ---------------------------------------------------------------- settings: each default stands here, or in Config

PRESETS = {
    "tiny": {},    # a laptop, minutes: the defaults below and in Config
    "small": dict(    # one GPU, minutes: 30M parameters
        data="fineweb-edu", tokens=200_000_000, vocab_size=50304, context=1024, n_layer=6, d=384, d_h=32, d_c=112, d_cq=192,
        d_R=16, d_ff=1024, steps=2000, batch=96, micro_batch=48, lr=0.006, lr_adamw=0.003, warmup=100, eval_every=250,
    ),
    "paper": dict(    # one GPU, hours: 209M parameters, 4.2B tokens
        data="fineweb-edu", tokens=4_300_000_000, vocab_size=50304, context=1024, n_layer=20, d=768, d_h=64, d_c=224, d_cq=384,
        d_R=32, d_ff=2048, tie=False, steps=8600, batch=480, micro_batch=48, lr=0.002, lr_adamw=0.002, warmup=200, eval_every=250,
    ),
}


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line on stderr and exit status 2."""

    def __init__(self, doc):
        style = type("Style", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
        super().__init__(description=doc, formatter_class=style, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    def attempt(self, function, *arguments):
        """Call it. A ValueError or OSError is the user's mistake too: a file that is not there, a size that does not fit."""
        try:
            return function(*arguments)
        except BrokenPipeError:                                                 # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.exit(1)
        except KeyboardInterrupt:
            self.exit(130)
        except (ValueError, OSError, OverflowError, MemoryError, torch.OutOfMemoryError) as error:
            self.error(error)


def integers(text):
    return tuple(int(part) for part in text.split(","))


def natural(text, least=0):
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return int(text)


def positive(text):
    return natural(text, least=1)


def check_budgets(budgets, n_h):
    """ValueError unless they are different, largest first, and within the heads."""
    if list(budgets) != sorted(set(budgets) & {*range(1, n_h + 1)}, reverse=True):
        raise ValueError(f"budgets {budgets} must be different, the largest first, and lie in 1..{n_h}, the heads of the model")


def make_config(values):
    """The Config of a dict of settings, which may name other things too, or not all of its fields."""
    return Config(**{field.name: values[field.name] for field in dataclasses.fields(Config) if field.name in values})


def settings(argv=None):
    """Parse the command line: (parser, args, config). A flag beats what --resume or --init finds, which beats the preset."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", choices=PRESETS, help="sizes and recipe that the other flags change")
    add("--data", default="stdlib", help="stdlib, fineweb-edu, a Hugging Face data set, a .txt, .jsonl or .parquet file or a "
        "folder of them, or a folder with train.bin and val.bin of uint16 tokens")
    add("--data-config", default="", help="configuration of a Hugging Face data set")
    add("--text-column", default="text", help="where a .jsonl, .parquet or Hugging Face data set has its text")
    add("--tokens", default=0, type=natural, help="stop preparing data after this many tokens; 0: take all")
    add("--objective", default="mixed", choices=["mixed", "sum", "sample"], help="a budget per sequence in one pass; "
        "one pass per budget and the mean of their losses; or one budget per step")
    add("--shares", type=integers, help="how often each of the budgets has its turn, like 2,1,1; by default equally often")
    add("--steps", default=500, type=positive, help="optimizer steps")
    add("--batch", default=9, type=positive, help="sequences per step; a multiple of the budgets is fastest")
    add("--micro-batch", default=64, type=positive, help="sequences per forward pass and device; more are accumulated")
    add("--lr", default=0.005, type=float, help="peak learning rate of Muon, for the matrices inside the blocks")
    add("--lr-adamw", default=0.003, type=float, help="peak learning rate of AdamW, for the embeddings and the norms")
    add("--weight-decay", default=0.1, type=float, help="of Muon")
    add("--warmup", default=20, type=positive, help="steps to the peak; over the last 60%% of all steps the rate falls to 0")
    add("--eval-every", default=100, type=positive, help="steps between two looks at the held-out text, and two checkpoints")
    add("--eval-windows", default=256, type=positive, help="held-out windows in the first and the last look; an eighth of them between")
    add("--seed", default=0, type=natural, help="of the initial weights and of the order of the data")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; by default on cuda only")
    add("--out", default=Path("out"), type=Path, help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --out, with its own settings")
    add("--init", type=Path, metavar="CHECKPOINT", help="start from its weights, sizes and tokenizer, but at step 0, "
        "with fresh optimizers; take much lower learning rates")
    add("--report", nargs="+", type=Path, metavar="RUN", help="only compare these finished runs; report.png, curves.png and "
        "report.json go to --out")
    add("--text", help="with --report: also their perplexity on this text, a .txt, .jsonl or .parquet file")
    model = parser.add_argument_group("model", "the fields of Config in matmla.py")
    for field in dataclasses.fields(Config):
        kind = {"type": integers if isinstance(field.default, tuple) else type(field.default)}
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else kind
        model.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=field.name, **kind)
    early, _ = parser.parse_known_args(argv)
    if early.text and not early.report:
        parser.error("--text is for --report")
    parser.set_defaults(**PRESETS[early.preset])
    if early.init and (early.resume or early.init.resolve().parent == early.out.resolve()):
        parser.error("--init starts a new run: not together with --resume, and not into its own folder; choose another --out")
    saved = parser.attempt(load_checkpoint, early.out / "checkpoint.pt") if early.resume else None
    if saved and not saved["optimizers"]:
        parser.error(f"{early.out / 'checkpoint.pt'} was not written by a training, there is nothing to resume; take it with --init")
    other = parser.attempt(load_checkpoint, early.init) if early.init else None
    parser.set_defaults(**other["config"] if other else {})
    parser.set_defaults(**saved["settings"] if saved else {})
    args = parser.parse_args(argv)
    args.resume, args.init = saved, other                                       # a checkpoint is read once
    args.encoding = (saved or other or {"encoding": "bytes" if args.data == "stdlib" else "gpt2"})["encoding"]
    config = parser.attempt(make_config, vars(args))
    with torch.device("meta"):
        model = parser.attempt(GPT, config)                                     # sizes that do not fit are refused here
    if other:
        both = other["model"], model.state_dict()
        for name in sorted(both[0].keys() | both[1].keys()):
            theirs, ours = (list(weights[name].shape) if name in weights else "missing" for weights in both)
            if theirs != ours:
                parser.error(f"{early.init} is of another shape: its {name} is {theirs}, here it is {ours}")
        if config.tie and not other["config"]["tie"]:
            parser.error(f"{early.init} has separate input and output embeddings, --tie would lose one of them")
    if not ATTENTION[config.attention].nested:
        config.budgets = (config.n_h,)
    else:
        parser.attempt(check_budgets, config.budgets, config.n_h)
    if saved and make_config(saved["config"]) != config:
        parser.error(f"{early.out / 'checkpoint.pt'} is a checkpoint of another shape, {saved['config']}")
    args.shares = args.shares or (1,) * len(config.budgets)
    if len(args.shares) != len(config.budgets) or min(args.shares) < 1:
        parser.error(f"shares {args.shares} must be positive, one for each of the {len(config.budgets)} budgets")
    for name in ("batch", "objective", "shares", "seed", "weight_decay") if saved else ():
        if getattr(args, name) != saved["settings"][name]:
            parser.error(f"--resume goes on with the run's own --{name.replace('_', '-')}; a run with another one may start from its weights, with --init")
    return parser, args, config


# ---------------------------------------------------------------- data: uint16 tokens in train.bin and val.bin

END = "<|endoftext|>"    # between documents


class Tokenizer:
    """A tokenizer.json, as pretrained models bring along, with those methods of a tiktoken.Encoding that are used here."""

    def __init__(self, json, eot_token):
        import tokenizers                                                       # needed only here

        self.tokenizer = tokenizers.Tokenizer.from_str(json)
        self.tokenizer.encode_special_tokens = True                             # text that looks like one is text
        self.tokenizer.no_truncation()
        self.eot_token, self.n_vocab = eot_token, max(self.tokenizer.get_vocab().values()) + 1
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]         # GPT-2 writes these as letters past 255
        self.byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        self.byte_level = '"ByteLevel"' in json

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text).ids                                  # and what the model wants in front of it

    def encode_ordinary_batch(self, texts, num_threads):
        return [encoded.ids for encoded in self.tokenizer.encode_batch_fast(texts)]

    def decode_single_token_bytes(self, token):
        piece = self.tokenizer.id_to_token(token) or "?"
        if self.byte_level and all(letter in self.byte for letter in piece):
            return bytes(self.byte[letter] for letter in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()                                 # SentencePiece's sign for a space


def get_encoding(name):
    """`bytes`: 256 tokens that never merge; `gpt2`: GPT-2's vocabulary, which tiktoken downloads once; a dict: a Tokenizer."""
    if isinstance(name, dict):
        return Tokenizer(**name)
    if name is None:
        raise ValueError("this model came without a tokenizer, so it knows token numbers, but no text")
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[^\n]*\n|[^\n]+", mergeable_ranks=ranks, special_tokens={END: 256})
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise OSError(f"the GPT-2 vocabulary cannot be downloaded ({type(error).__name__}): run this once with a network, or "
                      "set TIKTOKEN_CACHE_DIR to the tiktoken cache of a machine that has it") from None


def token_bytes(encoding, token):
    """The bytes of a token; a question mark for the ids that only pad the vocabulary."""
    return encoding.decode_single_token_bytes(token) if token < encoding.n_vocab else b"?"


def stdlib_files():
    """The reader's own standard library, without tests and tables: about 480 files, 9 MB. Sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def text_files(path):
    """The text file, or those in the folder, sorted; [] if there is no such path. ValueError or OSError if it holds no texts."""
    known = ".txt", ".jsonl", ".parquet"
    if path.suffix in known and not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_dir():
        return [path] if path.exists() else []
    files = sorted(p for p in path.rglob("*") if p.suffix in known)
    if not files:
        raise ValueError(f"{path} has no .txt, .jsonl or .parquet files, and no train.bin")
    if len(kinds := {p.suffix for p in files}) > 1:
        raise ValueError(f"{path} has files of several kinds, {', '.join(sorted(kinds))}; take one")
    return files


def documents(data, config="", column="text"):
    """The texts of --data, one by one. ValueError or OSError if they cannot be had."""
    files = [] if data == "stdlib" else text_files(Path(data))
    if data == "stdlib":
        yield from (p.read_text("utf-8", errors="replace") for p in stdlib_files())
    elif files and files[0].suffix not in (".jsonl", ".parquet"):
        for file in files:
            try:
                yield file.read_text("utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{file} is not UTF-8 text") from None
    else:
        import datasets                                                         # slow to import, needed only here

        datasets.disable_progress_bars()
        for name in ("huggingface_hub", "datasets"):
            logging.getLogger(name).setLevel(logging.CRITICAL)                  # our own line says it
        if files:
            source = {"path": {".jsonl": "json", ".parquet": "parquet"}[files[0].suffix], "data_files": [str(p) for p in files]}
        elif data == "fineweb-edu":
            source = {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT"}
        else:
            source = {"path": data, "name": config or None}
        try:
            for row in datasets.load_dataset(**source, split="train", streaming=True):
                if not isinstance(row[column], str | None):
                    raise KeyError(column)
                if row[column]:                                                 # some rows may have none
                    yield row[column]
        except KeyError:
            raise ValueError(f"{data} has no column {column!r} of text; train.py takes another with --text-column") from None
        except Exception as error:                                              # a broken file, no such name, no network
            cure = "" if files else (": it is no file here, and the Hugging Face hub did not give it. Check the name; "
                   "without a network, download its .parquet files elsewhere and pass their folder as --data")
            raise OSError(f"cannot read {data}{cure} ({type(error).__name__}: {error})") from None


def prepare(args):
    """Folder with train.bin and val.bin of --data, made unless it is there; it appears whole or not at all."""
    path = Path(args.data)
    if (path / "train.bin").exists():
        return path
    files = text_files(path)                                                    # refused before a vocabulary is downloaded
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files] or sys.version    # other text, other folder
    key = repr((args.data, args.data_config, args.text_column, args.tokens, args.encoding, stamps))
    folder = Path("data") / f"{path.stem}-{hashlib.sha1(key.encode()).hexdigest()[:8]}"
    if folder.exists():
        return folder
    encoding, held_out = get_encoding(args.encoding), 20 if args.data == "stdlib" else 200    # one document of so many
    if encoding.n_vocab > 2**16:
        raise ValueError(f"a vocabulary of {encoding.n_vocab} does not fit the uint16 of train.bin, at most {2**16} does")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)                                  # of a killed process of this number
    partial.mkdir(parents=True)
    try:
        with open(partial / "train.bin", "wb") as train, open(partial / "val.bin", "wb") as val, \
                tqdm(desc="tokens", unit="tok", unit_scale=True, total=args.tokens or None, leave=False, disable=None) as bar:
            source, count, left = documents(args.data, args.data_config, args.text_column), 0, args.tokens or math.inf
            while left > 0 and (batch := [text for _, text in zip(range(256), source)]):
                for tokens in encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count()):
                    if left <= 0:
                        break
                    np.array(tokens + [encoding.eot_token], np.uint16).tofile(val if count % held_out == 0 else train)
                    count += 1                                                  # whole documents are held out
                    left -= len(tokens) + 1
                    bar.update(len(tokens) + 1)
        if count < held_out or (partial / "val.bin").stat().st_size < 20_000:   # few or short: hold out the last 20th
            tokens = np.concatenate([np.fromfile(partial / name, np.uint16) for name in ("val.bin", "train.bin")])
            tokens[: len(tokens) * 19 // 20].tofile(partial / "train.bin")
            tokens[len(tokens) * 19 // 20 :].tofile(partial / "val.bin")
        if not folder.exists():                                                 # else another run was faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_tokens(folder, args, config):
    """train.bin and val.bin as arrays on disk, or a ValueError that says why the model cannot read them."""
    both = []
    for name in ("train.bin", "val.bin"):
        size = (folder / name).stat().st_size // 2 if (folder / name).exists() else 0
        if size <= config.context:
            raise ValueError(f"{args.data} has {size} tokens in {name}, more than the context of {config.context} are needed")
        tokens = np.memmap(folder / name, np.uint16, "r")
        if (top := tokens.max()) >= config.vocab_size:
            raise ValueError(f"{args.data} has token {top} in {name}, outside the vocabulary of {config.vocab_size} (--vocab-size)")
        both.append(tokens)
    return both


def windows(tokens, starts, context, device):
    """Inputs and targets [len(starts), context]: `context` tokens from each start on, and for each the token after it."""
    both = torch.from_numpy(np.stack([tokens[i : i + context + 1] for i in starts]).astype(np.int64))
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)                  # the copy does not wait for the GPU
    return both[:, :-1].to(device), both[:, 1:].to(device)


# ---------------------------------------------------------------- one step


class Muon(torch.optim.Muon):
    """torch's Muon (arXiv:2502.16982), but all matrices of one shape go through Newton-Schulz together: far fewer kernels.

    It takes the momentum G of every matrix about to (G Gᵀ)^(-1/2) G, so that all its directions move alike.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, buffers = [p.grad for p in matrices], [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                G = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))    # Nesterov
                G = G.bfloat16() if G.is_cuda else G                            # enough for a direction
                G = G.mT if shape[0] > shape[1] else G
                G = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):
                    A = G @ G.mT
                    G = torch.baddbmm(G, torch.baddbmm(A, A, A, beta=b, alpha=c), G, beta=a)
                G = G.mT if shape[0] > shape[1] else G
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(G.to(matrices[0].dtype)), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def optimizers(model, args):
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    muon = Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(rest, lr=args.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def rate(step, args):
    """Learning rate as a share of its peak: linear up, flat, linear down to 0."""
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / (0.6 * args.steps))


def compiled(model):
    """A copy of the model that shares its weights, with blocks and loss compiled. The blocks are equal, so they are one graph."""
    from torch._inductor.config import triton                                   # slow to import, needed only here

    if hasattr(triton, "mix_order_reduction"):                                  # from torch 2.10 on, a fusion that can make
        triton.mix_order_reduction = False                                      # gradients wrong: pytorch issue 193061
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    tuned = {"max_autotune_pointwise": True}                                    # logits are the largest tensor: 10% faster so
    model.loss = torch.compile(model.loss, dynamic=False, options=tuned)
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


def check_gradients(model, run, args, config, rank=0, world=1):
    """ValueError if a compiled block has other gradients than the block: at some sizes torch's compiler has made them wrong.

    `compiled` switches off one fusion that did so; without it, it has happened too. The blocks are equal: one is compared, in
    every way in which the training calls it.
    """
    device, seeded = next(model.parameters()).device, torch.Generator().manual_seed(0)
    dtype, names = torch.bfloat16 if device.type == "cuda" else torch.float32, [name for name, _ in model.blocks[0].named_parameters()]
    todo = every_pass(args, config, rank, world, device)
    calls = {(len(rows), "a tensor" if isinstance(heads, torch.Tensor) else heads): heads for rows, heads in todo}
    for (n, _), heads in calls.items():
        x, towards = torch.randn(2, n, config.context, config.d, generator=seeded).to(device, dtype).unbind()
        x.requires_grad_()
        with mixed_precision(device):
            both = [torch.autograd.grad((block(x, heads, None) * towards).sum(), [x, *block.parameters()])
                    for block in (model.blocks[0], run.blocks[0])]
        for name, right, found in zip(["its input", *names], *both):
            if not (found - right).norm() <= 0.2 * right.norm():                # bfloat16 alone makes them differ by a few percent
                raise ValueError(f"torch {torch.__version__} compiles a wrong gradient of {name} for {n} sequences per pass; "
                                 "take another --micro-batch, or --no-compile")


def parts_of_batch(args, rank=0, world=1):
    """Which sequences of a batch a process takes, divided into micro-batches of about equal size."""
    mine = np.arange(rank, args.batch, world)
    count = math.ceil(len(mine) / args.micro_batch)
    return [mine[i::count] for i in range(count)]


def passes(args, config, step, rows, device="cpu"):
    """The passes over sequences `rows` of the batch of a step: (heads, weight of the loss) of each."""
    if not ATTENTION[config.attention].nested:
        return [(None, 1.0)]
    if args.objective == "sum":
        return [(m, share / sum(args.shares)) for m, share in zip(config.budgets, args.shares)]
    turns = np.repeat(config.budgets, args.shares)
    if args.objective == "sample":
        return [(int(turns[step % len(turns)]), 1.0)]
    even = args.batch % len(turns) == 0                                         # else in turn, so that all get their shares
    dealt = turns[rows * len(turns) // args.batch] if even else turns[(step * args.batch + rows) % len(turns)]
    if np.array_equal(dealt, np.repeat(turns, len(rows) // len(turns))):
        return [(tuple(turns.tolist()), 1.0)]                                   # equal parts: no head is computed in vain
    return [(torch.from_numpy(dealt).to(device), 1.0)]


def period(args):
    """Steps after which the deal of the budgets repeats."""
    return 1 if args.objective == "sum" else sum(args.shares)


def every_pass(args, config, rank, world, device="cpu"):
    """(rows, heads) of all passes that a process makes in a period."""
    return [(rows, heads) for step in range(period(args)) for rows in parts_of_batch(args, rank, world)
            for heads, _ in passes(args, config, step, rows, device)]


def learn(run, optimizer, tokens, step, args, config):
    """One optimizer step on this process's share of a batch; its mean loss, a number that is still on the device."""
    device, shared = next(run.parameters()).device, isinstance(run, torch.nn.parallel.DistributedDataParallel)
    world, rank = (dist.get_world_size(), dist.get_rank()) if shared else (1, 0)
    for o, top in zip(optimizer, (args.lr, args.lr_adamw)):
        for group in o.param_groups:
            group["lr"] = top * rate(step, args)
    order = np.random.default_rng((args.seed, step))                            # from seed and step alone: nothing to save
    starts = order.integers(len(tokens) - config.context, size=args.batch)
    parts = parts_of_batch(args, rank, world)
    total = torch.zeros((), device=device)
    for rows in parts:
        x, y = windows(tokens, starts[rows], config.context, device)
        todo = passes(args, config, step, rows, device)
        for i, (heads, weight) in enumerate(todo):
            last = rows is parts[-1] and i == len(todo) - 1                     # only then are gradients shared
            with mixed_precision(device), run.no_sync() if shared and not last else contextlib.nullcontext():
                loss = run(x, y, heads=heads)[1] * (weight * len(rows) / (args.batch // world))
                loss.backward()
            total += loss.detach()
    for o in optimizer:
        o.step()
        o.zero_grad()
    return total


def flops_per_token(args, config, world=1):
    """Floating-point operations that one token costs in training, counted by torch on tensors without data."""
    with torch.device("meta"):
        model = GPT(config)
    todo = [one for rank in range(world) for one in every_pass(args, config, rank, world)]
    calls, total = Counter((len(rows), None if isinstance(heads, torch.Tensor) else heads) for rows, heads in todo), 0
    for (n, heads), times in calls.items():                                     # None: a mask saves nothing
        tokens = torch.zeros(n, config.context, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens, heads)[1].backward()
        total += times * counter.get_total_flops()
    return total / (period(args) * args.batch * config.context)


def peak_flops(device):
    """Dense bfloat16 operations per second by the datasheet, or None."""
    peaks = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for chip, peak in peaks.items() if chip in name), None)


def mixed_precision(device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def evaluate(model, tokens, count):
    """Mean loss in nats per token at each budget, on `count` windows spaced evenly over the tokens."""
    config, device = model.config, model.embed.weight.device
    starts = np.linspace(0, len(tokens) - config.context - 1, count).astype(int)
    losses = {}
    for m in config.budgets:
        with mixed_precision(device):
            chunks = (windows(tokens, s, config.context, device) for s in np.array_split(starts, math.ceil(count / 16)))
            losses[m] = sum(model(x, y, heads=m)[1].item() * len(x) for x, y in chunks) / count
    return losses


# ---------------------------------------------------------------- files of a run


def save(path, **content):
    """Atomic: a checkpoint is the old one or the new one, never half of it, also when the disk is full."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot save {path}, what was there is kept: {error}") from None


def load_checkpoint(path, device="cpu"):
    """What `save` wrote: config, settings, encoding, step, model, optimizers. ValueError if it is something else."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        missing = {"config", "settings", "encoding", "step", "model", "optimizers"} - content.keys()
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}: train one first, with python train.py") from None
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(error).__name__})") from None
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {', '.join(sorted(missing))}")
    return content


def load(path, device, content=None):
    """(model, encoding) of a checkpoint of train.py, or of its content if that is read already. ValueError says what is wrong."""
    content = content or load_checkpoint(path, device)
    try:
        model = GPT(make_config(content["config"])).to(device)
        model.load_state_dict(content["model"])
        return model.eval(), get_encoding(content["encoding"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this version: {str(error).splitlines()[0]} ...") from None


def read_log(path):
    """The lines of a metrics.jsonl as dicts; a last line that was cut off is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def open_log(path, first, steps):
    """The file to append metrics to, without the lines that a run resumed at step `first` will write again."""
    kept = [x for x in read_log(path) if x["step"] < first or x["step"] == first < steps and "val_loss" in x] if first else []
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(x) + "\n" for x in kept))
    os.replace(partial, path)
    return open(path, "a", buffering=1)                                         # a line at a time


def curves(run):
    """The losses of a run's batches, and of the held-out text at each budget: {name: {step: loss}}."""
    lines = read_log(run / "metrics.jsonl")
    looks = [x for x in lines if "val_loss" in x]
    found = {"batches": {x["step"]: x["loss"] for x in lines if "loss" in x}}
    return found | {f"held out, {m} heads": {x["step"]: x["val_loss"][m] for x in looks} for m in looks[0]["val_loss"]}


def draw_losses(runs, path):
    """Draw the losses of runs against their steps; of several also, beside it, how far the others are behind the first."""
    from matplotlib.figure import Figure

    several = len(runs) > 1
    axes = (figure := Figure(figsize=(14 if several else 7, 4), layout="constrained")).subplots(1, 1 + several, squeeze=False)[0]
    found = [curves(run) for run in runs]
    (_, batches), (at, held_out), *_ = found[0].items()                         # of the first run, at all its heads
    for run, lines in zip(runs, found):
        for i, (name, losses) in enumerate(lines.items()):
            drawn = len(axes[0].lines)                                          # each thinner, to show where they coincide
            style = {"linewidth": max(1, 7 / drawn)} if i else {"linewidth": 1, "color": "0.4" if drawn else "0.7"}
            line, = axes[0].plot(losses.keys(), losses.values(), label=f"{run.name}: {name}" if several else name, **style)
            if run != runs[0]:
                first = held_out if i else batches
                shared = [step for step in losses if step in first]
                axes[1].plot(shared, [losses[step] - first[step] for step in shared], label=line.get_label(),
                             **style | {"color": line.get_color()})
    for one in axes:
        one.set(xlabel="step", ylabel="loss (nats per token)")
        one.legend()
    if several:
        axes[1].axhline(0, color="black", linewidth=1)
        axes[1].set_title(f"loss minus that of {runs[0].name}, {at}: above 0 is worse")
    figure.savefig(path, dpi=150)


def perplexity(loss):
    return math.exp(min(loss, 700))                                             # beyond, a float overflows


def read_final(run):
    """The summary of a finished run."""
    final = next((x["final"] for x in reversed(read_log(run / "metrics.jsonl")) if "final" in x), None)
    if final is None:
        raise ValueError(f"{run} has no finished run")
    return final


def text_loss(run, text, column, device):
    """Mean loss in nats per token of a finished run on all of another text, at each budget."""
    model, encoding = load(run / "checkpoint.pt", device)
    tokens = np.concatenate([encoding.encode_ordinary(one) + [encoding.eot_token] for one in documents(text, column=column)])
    count = (len(tokens) - 1) // model.config.context
    if count == 0:
        raise ValueError(f"{text} has {len(tokens)} tokens, more than the context of {model.config.context} are needed")
    return evaluate(model, tokens, count)


def report(runs, out, text=None, column="text", device=None):
    """Print a Markdown table of finished runs; draw the perplexity of several against cache size, and their losses against steps.

    Runs named like mla.0 and mla.1 after their seeds share a row, with the mean of their losses.
    """
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    runs, finals, rows = [run.resolve() for run in runs], {}, {}                # so that `.` too has a name
    for run in runs:
        if run.name in finals:
            raise ValueError(f"two runs are named {run.name}; rename the folder of one")
        final = finals[run.name] = read_final(run)
        if text:
            final["text"], final["text_loss"] = str(text), text_loss(run, text, column, device)
        name = run.stem if run.suffix == f".{final['seed']}" else run.name
        row = rows.setdefault((name, final["variant"], final["parameters"], final["tokens"], *final["val_loss"]), [])
        if final["seed"] in [one["seed"] for one in row]:
            raise ValueError(f"two runs named {name} have seed {final['seed']}; rename the folder of one")
        row.append(final)
    heads = ["run", "variant", "heads", "parameters", "tokens", "training FLOPs", "seconds", "cache, bytes per token",
             "held-out loss", "perplexity"] + ([f"perplexity of {Path(text).name}"] if text else [])
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for i, ((name, *_), seeds) in enumerate(rows.items()):
        final = seeds[0]
        for m in final["val_loss"]:
            losses = [one["val_loss"][m] for one in seeds]
            loss, spread = sum(losses) / len(losses), (max(losses) - min(losses)) / 2
            cells = [name, final["variant"], m, f"{final['parameters']:,}", f"{final['tokens']:,}", f"{final['flops']:.3g}",
                     f"{final['seconds']:,.0f}", f"{final['cache_bytes']:,}", f"{loss:.4f}" + f" ± {spread:.4f}" * (len(seeds) > 1),
                     f"{perplexity(loss):.3f}"]
            if text:
                cells.append(f"{perplexity(sum(one['text_loss'][int(m)] for one in seeds) / len(seeds)):.3f}")
            print("| " + " | ".join(cells) + " |")
            axes.plot(final["cache_bytes"], perplexity(loss), marker="o^svDPX*"[i % 8], color=f"C{i}", markersize=4 + 0.5 * int(m))
        axes.plot([], [], marker="o^svDPX*"[i % 8], color=f"C{i}", linestyle="", label=name)
    axes.set(xlabel="cache, bytes per token (bfloat16)", ylabel="held-out perplexity", xscale="log")
    sizes = sorted({final["cache_bytes"] for final in finals.values()})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.legend(title="larger: more heads", loc="center left", bbox_to_anchor=(1, 0.5))
    if len(runs) > 1:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / "report.png", dpi=150)
        draw_losses(runs, out / "curves.png")
        (out / "report.json").write_text(json.dumps(finals, indent=1) + "\n")


# ---------------------------------------------------------------- the run


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        one = torch.ones(1, device=name)
        one.item()                                                              # fails here, not in the middle
        return one.device
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} on this machine") from None


def train(args, config):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))    # set by torchrun
    device = pick_device(args.device)
    cuda, master = device.type == "cuda", rank == 0
    if args.batch % world:
        raise ValueError(f"a batch of {args.batch} cannot be shared evenly by {world} processes")
    first, path = 0, args.out / "checkpoint.pt"
    if args.resume:
        first = args.resume["step"]
        if first > args.steps:
            raise ValueError(f"{path} has {first} steps already, more than --steps {args.steps}")
    if cuda and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if master:
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(args)
    if world > 1:
        dist.barrier()                                                          # the others find it prepared
    if args.encoding in ("bytes", "gpt2"):
        least = 257 if args.encoding == "bytes" else 50304                      # a multiple of 128 is fast
        config.vocab_size = args.vocab_size = max(config.vocab_size, least)
    train_tokens, val_tokens = read_tokens(prepare(args), args, config)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")                                  # what bfloat16 leaves in float32 may use tf32
    model = GPT(config).to(device)
    optimizer = optimizers(model, args)
    if args.init:
        model.load_state_dict(args.init["model"])
    if args.resume:
        model.load_state_dict(args.resume["model"])
        for o, state in zip(optimizer, args.resume["optimizers"]):
            o.load_state_dict(state)
    run = model
    if args.compile or args.compile is None and cuda and importlib.util.find_spec("triton"):
        run = compiled(model)
        check_gradients(model, run, args, config, rank, world)
    if world > 1:
        run = torch.nn.parallel.DistributedDataParallel(run)
    size, cost, peak = sum(p.numel() for p in model.parameters()), flops_per_token(args, config, world), peak_flops(device)

    def keep(step):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"a weight is not finite after step {step}")
        if master:
            settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "init", "encoding", "report", "text")}
            save(path, config=dataclasses.asdict(config), settings=settings, encoding=args.encoding, step=step,
                 seconds=time.perf_counter() - start, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizer])

    start = time.perf_counter() - (args.resume.get("seconds", 0) if args.resume else 0)
    if first == 0:
        keep(0)                                                                 # before the old log goes: both are of one run
    if master:
        log = open_log(args.out / "metrics.jsonl", first, args.steps)
        print(f"{config.attention}, {size:,} parameters, heads {config.budgets}, {world} x {device.type}; "
              f"{len(train_tokens):,} tokens to train on, {len(val_tokens):,} held out")
    bar = tqdm(total=args.steps * args.batch * config.context, initial=first * args.batch * config.context,
               unit="tok", unit_scale=True, dynamic_ncols=True, disable=None if master else True)

    def look(step):
        if master:
            count = args.eval_windows if step in (0, args.steps) else max(1, args.eval_windows // 8)
            val = evaluate(model, val_tokens, count)
            log.write(json.dumps({"step": step, "val_loss": val}) + "\n")
            bar.write(f"step {step}: held-out loss " + ", ".join(f"{loss:.3f} at {m} heads" for m, loss in val.items()) + pace)
            return val

    asked = []                                                                  # to stop, by Ctrl-C or kill; twice is at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (asked.append(number), signal.signal(number, signal.SIG_DFL)))
    mark, speeds, pace = None, [], ""                                           # speeds: tokens per second, between reports
    if first == 0:
        look(0)
    for step in range(first, args.steps):
        loss = learn(run, optimizer, train_tokens, step, args, config)
        bar.update(args.batch * config.context)

        done = step + 1
        stop = bool(asked) and world == 1
        if step % 10 == 0 or done == args.steps:                                # only here does the host wait for the device
            news = torch.stack((loss / world, torch.full_like(loss, len(asked))))
            if world > 1:
                dist.all_reduce(news)
            value, stop = news[0].item(), news[1].item() > 0                    # all processes stop after the same step
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}")
            now = time.perf_counter()
            if mark:
                speeds.append((step - mark[0]) * args.batch * config.context / (now - mark[1]))
                pace = f" ({speeds[-1]:,.0f} tokens/s)"                         # a log file has no bar to show it
            mark = step, now
            if master:
                log.write(json.dumps({"step": step, "loss": value}) + "\n")
                mfu = {"MFU": f"{speeds[-1] * cost / peak / world:.0%}"} if peak and speeds else {}
                bar.set_postfix(loss=f"{value:.3f}", **mfu)
        if done % args.eval_every == 0 and done < args.steps:
            look(done)
        if done % args.eval_every == 0 or done == args.steps or stop:
            keep(done)
            mark, pace = None, ""                                               # the next interval was not all training
        if stop and done < args.steps:
            bar.close()
            if master:
                print(f"stopped after step {done}; continue with --resume --out {args.out}")
            return
    seconds, speed = time.perf_counter() - start, float(np.median(speeds)) if speeds else None
    val = look(args.steps)
    bar.close()
    if world > 1:
        dist.destroy_process_group()
    if not master:
        return
    finish(model, args, log, dict(
        variant=config.attention + (f", {args.objective} {':'.join(map(str, args.shares))}" if ATTENTION[config.attention].nested else ""),
        parameters=size, tokens=bar.total, flops=cost * bar.total, cache_bytes=GPT(config).bfloat16().new_cache(1, 1).nbytes,
        val_loss=val, seconds=seconds, tokens_per_second=speed, mfu=peak and speed and speed * cost / peak / world, seed=args.seed,
        memory=torch.cuda.max_memory_allocated(device) if cuda else None,       # bytes at the peak, looks at the held-out text included
        device=f"{world} x {torch.cuda.get_device_name(device) if cuda else device.type}", torch=torch.__version__))


def finish(model, args, log, final):
    """What a finished run leaves: its last line of metrics, its figure, a table and a sample at each budget."""
    log.write(json.dumps({"step": args.steps, "final": final}) + "\n")
    print(f"trained in {final['seconds'] / 60:.1f} minutes; wrote checkpoint.pt, metrics.jsonl and loss.png in {args.out}\n")
    draw_losses([args.out], args.out / "loss.png")
    report([args.out], args.out)
    if args.encoding is None:
        return                                                                  # tokens without a text to show
    try:
        encoding, prompt = get_encoding(args.encoding), "def read(self, " if args.data == "stdlib" else "The "
    except OSError as error:                                                    # tokens were there, their vocabulary is not
        return print(f"\nno samples: {error}")
    prompt = torch.tensor([encoding.encode_ordinary(prompt)], device=model.embed.weight.device)
    for m in final["val_loss"]:
        text = model.eval().generate(prompt, 200, m, temperature=0.8, top_k=40)
        text = b"".join(token_bytes(encoding, token) for token in text[0].tolist()).decode(errors="replace")
        print(f"\n--- a sample at {m} heads ---\n{text}".encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))


def main():
    parser, args, config = settings()
    try:
        if args.report:
            parser.attempt(lambda: report(args.report, args.out, args.text, args.text_column, pick_device(args.device)))
        else:
            parser.attempt(train, args, config)
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}; nothing was saved after it. Try a lower --lr\n")


if __name__ == "__main__":
    main()
