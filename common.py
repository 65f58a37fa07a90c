"""What the scripts share: command line, presets, checkpoints, the loss of a model on a text."""

import argparse
import json
import math
import os
import sys
import zipfile
from contextlib import contextmanager

import filelock
import numpy as np
import torch

from data import open_tokens, windows
from devices import mixed_precision
from matmla import ATTENTION, Config
from pretrained import make_model  # which also adds the attentions of converted models
from tokenizer import UserError, explained, get_encoding

FIELDS = vars(Config())  # {name: default}
PRESETS = {  # settings of train.py that differ from its defaults
    "tiny": {},  # a laptop, minutes
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
    "paper": dict(  # one GPU, hours: the paper's layers, widths, context, batch and tokens;
        data="fineweb-edu",  # d_h, d_c, d_cq, d_R, the rates and GPT-2's tokens are ours
        tokens=4_300_000_000,
        vocab_size=50304,
        context=2048,
        n_layer=12,
        d=768,
        d_h=64,
        d_c=224,
        d_cq=384,
        d_R=32,
        d_ff=3072,
        steps=8010,
        batch=256,
        micro_batch=32,
        lr=0.003,
        lr_adamw=0.003,
        warmup=801,
        eval_every=250,
    ),
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands, and the default of every flag."""


class Parser(argparse.ArgumentParser):
    """A command line on which a mistake is one line on stderr and exit status 2."""

    after_interrupt = None  # what to say after Ctrl-C

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)
        for stream in sys.stdout, sys.stderr:
            if hasattr(stream, "reconfigure"):  # a console may not know all letters
                stream.reconfigure(errors="replace")

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    def run(self, function, *arguments):
        """Call it. What the user can mend ends in one line; anything else is a bug, and says where.

        A full disk and the like (OSError) and too little memory are the user's to mend, too.
        """
        try:
            result = function(*arguments)
            if sys.stdout:
                sys.stdout.flush()
            return result
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.exit(1)
        except KeyboardInterrupt:
            self.exit(130, self.after_interrupt)
        except (UserError, OSError) as error:
            self.error(error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.error(f"not enough memory {error}")
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # torch's words for it, on a CPU
                raise
            self.error(error)


@contextmanager
def user_input():
    """A ValueError inside is about what the user gave: with user_input(): Config(...)"""
    try:
        yield
    except ValueError as error:
        raise UserError(error) from None


def integers(text):
    """12,8,4 -> (12, 8, 4)."""
    return tuple(int(part) for part in text.split(","))


def natural(text, least=0):
    """A whole number, 0 or more."""
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return int(text)


def positive(text):
    """A whole number, 1 or more."""
    return natural(text, least=1)


def heads_of(text):
    """--heads as GPT takes it: 8 is 8; 12/12/8/4/4 is a list, one number for each layer."""
    layers = text.split("/")
    if not all(part.isdecimal() for part in layers):
        raise UserError(f"--heads {text} is neither a number nor one for each layer, like 12/8/4")
    return [int(part) for part in layers] if len(layers) > 1 else int(text)


def check_budgets(budgets, config):
    """UserError unless they are different, largest first, and heads that the attention has."""
    with torch.device("meta"):  # without weights
        unit = ATTENTION[config.attention](config).unit
    allowed = range(unit, config.n_h + 1, unit)
    if not budgets or list(budgets) != sorted({m for m in budgets if m in allowed}, reverse=True):
        raise UserError(
            f"budgets {budgets} must be different, the largest first, and in {[*allowed]}"
        )


def make_config(values):
    """The Config of a dict of settings, which may name other things. UserError for its sizes."""
    with user_input():
        return Config(**{name: values[name] for name in FIELDS if name in values})


def spaced_windows(model, tokens, count):
    """Batches of `count` windows spaced evenly over the tokens: (inputs, targets, share of all)."""
    context, device = model.config.context, model.embed.weight.device
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(int)
    for some in np.array_split(starts, math.ceil(count / 16)):
        yield *windows(tokens, some, context, device), len(some) / count


@torch.no_grad()
def evaluate(model, tokens, count, budgets):
    """Mean loss in nats per token on `count` windows: a list, one loss for each of the budgets.

    budgets: anything that GPT takes as heads, such as 8, or a list with a number for each layer.
    """
    losses = [0.0] * len(budgets)
    for x, y, share in spaced_windows(model, tokens, count):
        with mixed_precision(x.device):
            for i, heads in enumerate(budgets):
                losses[i] += model(x, y, heads)[1].item() * share
    return losses


@torch.no_grad()
def evaluate_after(prefix, model, tokens, count, budgets):
    """The same on the second half of each window, after a first half that `prefix` heads wrote."""
    losses = [0.0] * len(budgets)
    for x, y, share in spaced_windows(model, tokens, count):
        half = x.shape[1] // 2
        cache = model.new_cache(*x.shape)
        with mixed_precision(x.device):
            model.hidden(x[:, :half], prefix, cache)
            for i, heads in enumerate(budgets):
                losses[i] += model(x[:, half:], y[:, half:], heads, cache)[1].item() * share
                cache.rewind(half)
    return losses


def perplexity(loss):
    """e to the loss; beyond 700, a float would overflow."""
    return math.exp(min(loss, 700))


class Table:
    """A Markdown table, printed row by row. Its columns are the keys of the first row, a dict."""

    def __init__(self):
        self.head = None

    def add(self, row):
        """Print a row; None is an empty cell, a float has three decimals."""
        if self.head is None:
            self.head = list(row)
            print("\n| " + " | ".join(map(str, row)) + " |\n" + "|---" * len(row) + "|")
        cells = []
        for x in row.values():
            if isinstance(x, float):
                x = f"{x:,.3f}"
            elif isinstance(x, int):
                x = f"{x:,}"
            cells.append("" if x is None else str(x))
        print("| " + " | ".join(cells) + " |", flush=True)


def write_whole(path, write):
    """Let write(file) write a file that is there whole or not at all, also after a power cut.

    UserError if that fails, on a full disk for instance; what was there is kept.
    """
    part = path.with_name(path.name + ".partial")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes of a full disk a RuntimeError
        raise UserError(f"cannot save {path}, what was there is kept: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def write_log(folder, log):
    """metrics.jsonl of a run: one line for every entry of its log."""
    text = "".join(json.dumps(line) + "\n" for line in log)
    write_whole(folder / "metrics.jsonl", lambda file: file.write(text.encode()))


def save(path, **content):
    """Write a checkpoint: config, settings, encoding, step, model, optimizers, log, and its log."""
    write_whole(path, lambda file: torch.save(content, file))
    write_log(path.parent, content["log"])


CONTENT = {  # what a checkpoint has at least, and of which type
    "config": dict,
    "settings": dict,
    "encoding": str | dict | None,
    "step": int,
    "model": dict,
    "optimizers": list,
    "log": list,
}


def load_checkpoint(path, device="cpu"):
    """What `save` wrote, as a dict. UserError if it is damaged, or something else."""
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}: train one first, with python train.py")
    with explained(f"{path} is not a checkpoint of train.py"):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # the parts have checksums, which torch does not look at
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location=device, weights_only=True)
        for name, kind in CONTENT.items():
            if not isinstance(content[name], kind):
                raise ValueError(f"{name} is a {type(content[name]).__name__}")
    unlike = content["config"].keys() ^ FIELDS.keys()
    if unlike:
        names = ", ".join(sorted(map(str, unlike)))
        raise UserError(f"{path} was written by another version of train.py: {names}")
    return content


def fill(model, weights, path):
    """Give the model the weights of a checkpoint. UserError if they are of another shape."""
    with explained(f"the weights of {path} do not fit"):
        model.load_state_dict(weights)


def model_of(content, path, device):
    """The model of a checkpoint with this content."""
    model = make_model(make_config(content["config"]), content["model"]).to(device)
    fill(model, content["model"], path)
    return model.eval()


def load(path, device):
    """(model, encoding) of a checkpoint."""
    content = load_checkpoint(path, device)
    return model_of(content, path, device), get_encoding(content["encoding"])


def load_run(folder, device):
    """(model, the tokens held out, the folder they are in) of what train.py left in a folder.

    UserError if there is no such text, or if it is not the one that the run was trained on.
    """
    path = folder / "checkpoint.pt"
    content = load_checkpoint(path, device)
    model = model_of(content, path, device)
    c = model.config
    settings = content["settings"]
    if "data" not in settings:
        raise UserError(f"{folder} was not trained by train.py, so it has no held-out text")
    source = settings["data"], content["encoding"], settings["tokens"], c.vocab_size
    _, held_out, text, _ = open_tokens(*source, c.context, folder, content.get("data"))
    return model, held_out, text


def claim(out):
    """Keep other runs out of a folder: `with claim(out):`. The lock dies with the process, too."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(out / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another run is training into {out}") from None
