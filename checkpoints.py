"""What a run leaves in its folder, checkpoint.pt and metrics.jsonl: written, and read again."""

import json
import os
import zipfile

import filelock
import torch

from common import FIELDS, make_config
from data import open_tokens
from pretrained import make_model
from tokenizer import UserError, explained, get_encoding


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


def load(path, device, content=None):
    """(model, encoding) of a checkpoint, or of its content if that is read already."""
    content = content or load_checkpoint(path, device)
    model = make_model(make_config(content["config"]), content["model"]).to(device)
    fill(model, content["model"], path)
    return model.eval(), get_encoding(content["encoding"])


def load_run(folder, device):
    """(model, the tokens held out, the folder they are in) of what train.py left in a folder.

    UserError if there is no such text, or if it is not the one that the run was trained on.
    """
    path = folder / "checkpoint.pt"
    content = load_checkpoint(path, device)
    model, _ = load(path, device, content)
    c, settings = model.config, content["settings"]
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
