"""Texts become tokens on disk (prepare), arrays (read_tokens), and batches (windows)."""

import hashlib
import io
import json
import os
import shutil
import sys
import sysconfig
from itertools import groupby, islice, takewhile
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from tokenizer import UserError, explained, get_encoding

# Folders of the standard library that are not read
SKIP = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
KINDS = (".txt", ".jsonl", ".parquet")  # of files with texts
PART = 2**16  # characters of a text, and the rest of their line, are held at once


def find_files(data):
    """The files of `data` to read, and those that are left out, both sorted.

    Both lists are empty if `data` may be a name on the hub: nothing here is named so. UserError
    if a file is missing or of another kind, or if a folder has none of our kinds.
    """
    if data == "stdlib":  # the reader's own: about 480 files, 9 MB
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts)]
        return sorted(files), []

    path = Path(data)

    def is_hidden(p):  # a file that is named itself is not
        return any(part.startswith(".") for part in p.relative_to(path).parts)

    in_folder = (p for p in path.rglob("*") if not p.is_dir() or p.is_symlink())
    found = [path] if path.is_file() else sorted(in_folder)
    files = [p for p in found if p.suffix.lower() in KINDS and not is_hidden(p)]
    if not files and (path.exists() or path.suffix.lower() in KINDS):
        raise UserError(f"no {', '.join(KINDS)} file {path}, and none in a folder of that name")
    return files, sorted(set(found) - set(files), key=lambda p: (is_hidden(p), p))


def rows(source):
    """The rows of a .jsonl or .parquet file, or of a data set on the hub, as dicts."""
    if isinstance(source, str):
        import datasets  # slow to import

        name = {"fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT"}.get(source, source)
        name, _, config = name.partition(":")
        yield from datasets.load_dataset(name, config or None, split="train", streaming=True)
    elif source.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile  # comes with datasets

        with ParquetFile(source) as file:
            columns = ["text"] if "text" in file.schema_arrow.names else None
            # One by one: a row may be a book.
            for batch in file.iter_batches(1, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    else:
        with open(source, encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def parts(file):
    """Pairs of a part of an open text and True if it is the last: a book is never held whole."""
    following = file.read(PART)
    is_last = False
    while not is_last:
        part = following + file.readline(PART)
        following = file.read(PART)
        is_last = not following
        yield part, is_last


def read(source):
    """Pairs of a part of a text in a file, or on the hub, and True if it is the text's last."""
    if isinstance(source, Path) and source.suffix.lower() not in (".jsonl", ".parquet"):
        with open(source, encoding="utf-8-sig") as file:  # a byte order mark is no text
            yield from parts(file)
        return
    for number, row in enumerate(rows(source), start=1):
        if not isinstance(row, dict) or not isinstance(row.get("text", 0), str | None):
            raise ValueError(f"row {number} has no 'text' that is a string, not bytes: {row}")
        if row["text"]:  # a row may have none
            yield from parts(io.StringIO(row["text"]))


def texts(data):
    """Pairs of a part of a text of `data` and True if it is the text's last.

    One line on stderr names files of a folder that are left out. UserError: data of another kind.
    """
    files, others = find_files(data)
    if others:
        some = ", ".join(map(str, others[:3]))
        count = f"{len(others)} of {len(files) + len(others)} files"
        line = f"{data}: left out {count}, hidden or not {', '.join(KINDS)}, such as {some}"
        tqdm.write(line, file=sys.stderr)
    for source in files or [data]:
        where = "" if files else ", which is no file here, from the Hugging Face hub"
        with explained(f"cannot read {source}{where}"):
            yield from read(source)


def encode(data, encoding):
    """Pairs of a document's number and the tokens of the next part of it.

    In front of its first part stands what a pretrained model wants there, behind its last part
    the end of text.
    """
    front = len(encoding.encode_ordinary(""))
    pairs = texts(data)
    number = 0
    skip = 0
    while batch := list(islice(pairs, 128)):  # at once, they are work for several threads
        found = encoding.encode_ordinary_batch([part for part, _ in batch])
        for tokens, (_, is_last) in zip(found, batch):
            end = [encoding.eot_token] if is_last else []
            yield number, tokens[skip:] + end
            skip = 0 if is_last else front  # the next part of the same document has no front
            if is_last:
                number += 1


def item_type(vocab_size):
    """The type of a token on disk."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def prepare(data, encoding_name, tokens, vocab_size):
    """The folder with train.bin and val.bin of `data`, which is made unless it is there.

    It ends after so many `tokens`; 0: it has all. One document in 200 is held out in val.bin, one
    in 20 of the standard library; of few or short documents, the last 20th of all tokens. A
    document equal to an earlier one is left out, so that no text is on both sides.
    UserError if the data cannot be read, or the tokens cannot be written: then nothing is kept.
    """
    if Path(data, "train.bin").exists():
        return Path(data)
    kind = item_type(vocab_size)
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in find_files(data)[0]]
    version = hashlib.sha1(repr((data, encoding_name, tokens, kind, stamps)).encode()).hexdigest()
    folder = Path("data", f"{Path(data).stem}-{version[:8]}")
    if (folder / "train.bin").exists():
        return folder

    encoding = get_encoding(encoding_name)
    if encoding.n_vocab > vocab_size:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small (--vocab-size): the tokenizer has "
            f"{encoding.n_vocab} tokens"
        )
    try:
        Path("data").mkdir(exist_ok=True)
        # Another run may prepare the same, so each has a folder of its own until all is written.
        with TemporaryDirectory(prefix=f"{folder.name}.", dir="data") as own:
            write_tokens(data, encoding, tokens, kind, Path(own))
            folder.mkdir(exist_ok=True)
            # train.bin is the last: where it is, both are whole.
            Path(own, "val.bin").replace(folder / "val.bin")
            Path(own, "train.bin").replace(folder / "train.bin")
    except OSError as error:
        raise UserError(f"cannot write the tokens of {data} in {folder} ({error})") from error
    return folder


def write_tokens(data, encoding, most, kind, folder):
    """Write train.bin and val.bin, as `prepare` says."""
    one_in = 20 if data == "stdlib" else 200
    seen = set()
    with (
        tqdm(unit="tok", unit_scale=True, total=most or None, leave=False, disable=None) as bar,
        open(folder / "train.bin", "wb") as train,
        open(folder / "val.bin", "wb") as val,
    ):

        def is_wanted(_):
            return not most or train.tell() + val.tell() < most * kind.itemsize

        pairs = takewhile(is_wanted, encode(data, encoding))
        for number, document in groupby(pairs, key=itemgetter(0)):
            file = train if number % one_in else val  # whole documents are held out
            start = file.tell()
            digest = 0
            for _, part in document:
                content = np.array(part, kind).tobytes()
                file.write(content)
                digest = hash((digest, content))
                bar.update(len(part))
            if digest in seen and data != "stdlib":  # only tiny ones are equal in the library
                file.truncate(file.seek(start))
            seen.add(digest)
        held_out = val.tell() // kind.itemsize
    if len(seen) < one_in or held_out < 10_000:  # few, or short
        hold_out_tail(folder, kind.itemsize)
    for name in ("train.bin", "val.bin"):
        with open(folder / name, "r+b") as file:
            os.fsync(file.fileno())  # now they are on the disk


def hold_out_tail(folder, itemsize):
    """Put all tokens into train.bin, and then the last 20th of them into val.bin."""
    train, val = folder / "train.bin", folder / "val.bin"
    with open(val, "ab") as file, open(train, "rb") as rest:
        shutil.copyfileobj(rest, file)
    val.replace(train)
    cut = train.stat().st_size // itemsize * 19 // 20 * itemsize
    with open(train, "rb") as file, open(val, "wb") as tail:
        file.seek(cut)
        shutil.copyfileobj(file, tail)
    os.truncate(train, cut)


def read_tokens(folder, context, vocab_size):
    """train.bin and val.bin as arrays on disk.

    UserError if a file was cut, is too short for a window, or has a token outside the vocabulary.
    """
    both = []
    kind = item_type(vocab_size)
    for path in (Path(folder, "train.bin"), Path(folder, "val.bin")):
        size = path.stat().st_size if path.exists() else 0
        if size % kind.itemsize:
            raise UserError(f"{path} was cut: {size} bytes are no multiple of {kind.itemsize}")
        if size // kind.itemsize <= context:
            raise UserError(
                f"{path} has {size // kind.itemsize} tokens, more than the context of {context} "
                "are needed"
            )
        tokens = np.memmap(path, kind, "r")
        if tokens.max() >= vocab_size:
            raise UserError(
                f"{path} has token {tokens.max()}, outside the vocabulary of {vocab_size} "
                "(--vocab-size)"
            )
        both.append(tokens)
    return both


def fingerprint(folder):
    """What tells the tokens in a folder from others: sizes in bytes, and a digest.

    It reads 64 evenly spaced blocks of a large file, so that it takes milliseconds.
    """
    digest = hashlib.sha256()
    sizes = []
    for name in ("train.bin", "val.bin"):
        content = np.memmap(Path(folder, name), np.uint8, "r")
        sizes.append(len(content))
        for start in range(0, len(content), max(4096, len(content) // 64)):
            digest.update(content[start : start + 4096])
    return {"bytes": sizes, "sha256": digest.hexdigest()}


def open_tokens(data, encoding_name, tokens, vocab_size, context, run, known):
    """What a run reads: (train.bin, val.bin, their folder, their fingerprint), prepared if need be.

    known: the fingerprint when the run was started, or None. UserError if it was another.
    """
    folder = prepare(data, encoding_name, tokens, vocab_size)
    train, held_out = read_tokens(folder, context, vocab_size)
    found = fingerprint(folder)
    if known not in (None, found):
        raise UserError(f"{data} has changed since {run} was trained: {folder}")
    return train, held_out, folder, found


def windows(tokens, starts, context, device):
    """Inputs and targets [len(starts), context], int64.

    These are `context` tokens from each start on, and for each the one after it. UserError if the
    file of the tokens was cut meanwhile, which would end the process without a message.
    """
    if isinstance(tokens, np.memmap) and os.path.getsize(tokens.filename) < tokens.nbytes:
        raise UserError(f"{tokens.filename} was cut: it had {tokens.nbytes} bytes before")
    both = np.stack([tokens[i : i + context + 1] for i in starts])
    both = torch.from_numpy(both.astype(np.int64))
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)  # the copy does not wait for the GPU
    return both[:, :-1].to(device), both[:, 1:].to(device)
