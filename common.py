"""What the scripts share: the command line, the device, checkpoints, the loss of a model on a text."""

import argparse
import importlib
import json
import math
import os
import sys
from contextlib import nullcontext

import numpy as np
import torch

# `MATMLA=my_matmla python train.py` works with my_matmla.py instead: what is imported after this file sees it, too.
sys.modules["matmla"] = importlib.import_module(os.environ.get("MATMLA", "matmla"))

import pretrained  # noqa: F401    it adds the attentions of converted models to ATTENTION
from data import get_encoding, windows
from matmla import GPT, Config

FIELDS = {name: field.default for name, field in Config.__dataclass_fields__.items()}


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line on stderr and exit status 2. stopped: what to say after Ctrl-C."""

    stopped = None

    def __init__(self, doc):
        style = type(
            "", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {}
        )
        super().__init__(description=doc, formatter_class=style, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    def attempt(self, function, *arguments):
        """Call it. What the user can mend is a mistake, too: a missing file, wrong sizes, an unfinished exercise."""
        try:
            return function(*arguments)
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.exit(1)
        except KeyboardInterrupt:
            self.exit(130, self.stopped)
        except FloatingPointError as error:
            self.exit(1, f"{self.prog}: {error}; nothing was saved after it. Try a lower --lr\n")
        except (
            ValueError,
            OSError,
            OverflowError,
            MemoryError,
            NotImplementedError,
            torch.OutOfMemoryError,
        ) as error:
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
        raise ValueError(
            f"budgets {budgets} must be different, the largest first, and in 1..{n_h}, the model's heads"
        )


def make_config(values):
    """The Config of a dict of settings, which may name other things too, or not all of its fields."""
    return Config(**{name: values[name] for name in FIELDS if name in values})


def mixed_precision(device):
    """On a GPU, products are computed in bfloat16."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def evaluate(model, tokens, count, prefix=None):
    """Mean loss in nats per token at each budget, {m: loss}, on `count` windows spaced evenly over the tokens. With a
    prefix, on the second half of each window only, read at m heads after a first half that `prefix` heads wrote."""
    context, device = model.config.context, model.embed.weight.device
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(int)
    losses, first, cache = (
        dict.fromkeys(model.config.budgets, 0.0),
        context // 2 if prefix else 0,
        None,
    )
    for some in np.array_split(starts, math.ceil(count / 16)):
        x, y = windows(tokens, some, context, device)
        with mixed_precision(device):
            if prefix:
                cache = model.new_cache(len(x), context)
                model.hidden(x[:, :first], prefix, cache)
            for m in losses:
                for layer in cache or ():
                    layer.length = first  # forget what the last m has read
                losses[m] += model(x[:, first:], y[:, first:], m, cache)[1].item() * len(x) / count
    return losses


def perplexity(loss):
    return math.exp(min(loss, 700))  # beyond, a float overflows


def print_row(row, head=False):
    """A dict as a row of a Markdown table; with the table's head, its keys, if it is the first."""
    if head:
        print("\n| " + " | ".join(map(str, row)) + " |\n" + "|---" * len(row) + "|")
    formats = {float: ",.3f", int: ","}
    cells = ["" if x is None else format(x, formats.get(type(x), "")) for x in row.values()]
    print("| " + " | ".join(cells) + " |", flush=True)


def save(path, **content):
    """Write a checkpoint (config, settings, encoding, step, model, optimizers, log), its log as metrics.jsonl beside.
    Each file is the old one or the new one, never half of it, also on a full disk: that is an OSError."""
    files = path, path.with_name("metrics.jsonl")
    parts = [file.with_name(file.name + ".partial") for file in files]
    try:
        torch.save(content, parts[0])
        parts[1].write_text("".join(json.dumps(line) + "\n" for line in content["log"]))
        for part, file in zip(parts, files):
            os.replace(part, file)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot save {path}, what was there is kept: {error}") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """What `save` wrote, as a dict. ValueError if it is something else, or of another version."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        unlike = {"settings", "encoding", "step", "model", "optimizers", "log"} - content.keys()
        unlike |= content["config"].keys() ^ FIELDS.keys()
    except FileNotFoundError:
        raise ValueError(
            f"no checkpoint at {path}: train one first, with python train.py"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint of train.py ({type(error).__name__})"
        ) from None
    if unlike:
        raise ValueError(
            f"{path} was written by another version of train.py: {', '.join(sorted(unlike))}"
        )
    return content


def fill(model, weights, path):
    """Give the model the weights of a checkpoint. ValueError if they are of another shape."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # its second line is the first difference
        raise ValueError(
            f"the weights of {path} do not fit: {str(error).splitlines()[1]}"
        ) from None


def load(path, device, content=None):
    """(model, encoding) of a checkpoint, or of its content if that is read already. ValueError says what is wrong."""
    content = content or load_checkpoint(path, device)
    model = GPT(make_config(content["config"])).to(device)
    fill(model, content["model"], path)
    return model.eval(), get_encoding(content["encoding"])


def pick_device(name):
    """The device of that name. ValueError if it does not work."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        return torch.ones(1, device=name).abs().device  # fails here, not in the middle
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} on this machine") from None
