"""Texts become tokens on disk (`prepare`), are read as arrays (`read_tokens`) and cut into batches (`windows`)."""

import hashlib
import json
import logging
import shutil
import sysconfig
from itertools import groupby, islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tiktoken
import torch
from tqdm import tqdm


class UserError(ValueError):
    """What whoever runs a script can mend."""


END = "<|endoftext|>"  # between documents
TYPES = (
    np.dtype(np.uint16),
    np.dtype(np.uint32),
)  # of tokens on disk: the second for a vocabulary over 2^16


def get_encoding(name):
    """`bytes`: 256 tokens that never merge; `gpt2`: GPT-2's vocabulary; a dict: a pretrained model's Tokenizer."""
    if isinstance(name, dict):
        from pretrained import Tokenizer  # needed only here

        return Tokenizer(**name)
    if name is None:
        raise ValueError(
            "this model came without a tokenizer, so it knows token numbers, but no text"
        )
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"[^\n]*\n|[^\n]+", mergeable_ranks=ranks, special_tokens={END: 256}
        )
    try:
        return tiktoken.get_encoding(name)  # downloaded once
    except OSError as error:
        raise OSError(
            f"the GPT-2 vocabulary cannot be downloaded ({type(error).__name__}): run this once with a "
            "network, or set TIKTOKEN_CACHE_DIR to the tiktoken cache of a machine that has it"
        ) from None


def text_files(data):
    """The text files of `data`, sorted; [] if nothing here has this name. OSError: no such file, or an empty folder."""
    if data == "stdlib":  # the reader's own: about 480 files, 9 MB
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {
            "test",
            "tests",
            "idlelib",
            "lib2to3",
            "encodings",
            "site-packages",
            "dist-packages",
        }
        return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    path, kinds = Path(data), (".txt", ".jsonl", ".parquet")
    files = sorted(
        p
        for p in path.rglob("*")
        if p.suffix in kinds
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    if not files and (path.is_dir() or path.suffix in kinds and not path.exists()):
        raise FileNotFoundError(
            f"no file {path}, and no .txt, .jsonl or .parquet files in a folder of that name"
        )
    return files or [path] * path.exists()


def read(source):
    """The rows of a .jsonl or .parquet file or a data set on the hub, as dicts. Of any other file the text, in strings
    of 2^16 characters and the rest of their line, so that a long one is never held whole. Only the last is shorter."""
    if isinstance(source, str):
        import datasets  # slow to import

        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # our own line says it
        name, _, config = {"fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT"}.get(
            source, source
        ).partition(":")
        yield from datasets.load_dataset(name, config or None, split="train", streaming=True)
    elif source.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile  # comes with datasets

        with ParquetFile(source) as file:
            for batch in file.iter_batches(
                1000, columns=["text"] if "text" in file.schema_arrow.names else None
            ):
                yield from batch.to_pylist()
    else:
        with open(source, encoding="utf-8") as file:
            if source.suffix == ".jsonl":
                yield from (dict(json.loads(line)) for line in file if line.strip())
            else:
                while len(part := file.read(2**16)) == 2**16:
                    yield part + file.readline(2**16)
                yield part  # an empty file is a document, too


def texts(data):
    """Pairs of a text of `data` and True where a document ends: a long .txt comes in parts. OSError: no such data."""
    for source in text_files(data) or [data]:
        try:
            for number, row in enumerate(read(source)):
                if isinstance(row, str):
                    yield row, len(row) < 2**16
                elif (
                    not isinstance(row.get("text"), str | None) or number == 0 and "text" not in row
                ):
                    raise ValueError(
                        f"row {number + 1} has no string named 'text', only {', '.join(row)}"
                    )
                elif row.get("text"):  # later rows may have none
                    yield row["text"], True
        except Exception as error:  # whatever is wrong with the data of others
            cure = (
                ""
                if isinstance(source, Path)
                else (
                    ": no file here, so the Hugging Face hub was asked; without a network, --data takes .parquet files"
                )
            )
            raise OSError(f"cannot read {source}{cure} ({type(error).__name__}: {error})") from None


def encode(data, encoding):
    """Pairs of a document's number and the tokens of the next part of it. In front of its first part stands what a
    pretrained model wants there, behind its last part the end of text."""
    end, front = [encoding.eot_token], len(encoding.encode_ordinary(""))
    parts, number, skip = texts(data), 0, 0
    while batch := list(islice(parts, 128)):  # at once, they are work for several threads
        for tokens, (_, ended) in zip(
            encoding.encode_ordinary_batch([text for text, _ in batch]), batch
        ):
            yield number, tokens[skip:] + end * ended
            number, skip = (number + 1, 0) if ended else (number, front)


def prepare(data, encoding_name, tokens, vocab_size):
    """Folder with train.bin and val.bin of `data`, made unless it is there. It ends after so many `tokens`; 0: has all.
    One document in 200 is held out in val.bin, one in 20 of the standard library; of few or short documents, the last
    20th of all tokens. A document equal to an earlier one is left out, so that no text is on both sides."""
    if Path(data, "train.bin").exists():
        return Path(data)
    kind = TYPES[vocab_size > 2**16]  # as read_tokens finds it
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in text_files(data)]
    version = hashlib.sha1(repr((data, encoding_name, tokens, kind, stamps)).encode()).hexdigest()[
        :8
    ]
    folder = Path("data", f"{Path(data).stem}-{version}")
    if (folder / "train.bin").exists():
        return folder
    parts, held_out, seen = (
        encode(data, get_encoding(encoding_name)),
        20 if data == "stdlib" else 200,
        set(),
    )
    Path("data").mkdir(exist_ok=True)
    with TemporaryDirectory(
        prefix=f"{folder.name}.", dir="data"
    ) as own:  # another run may prepare the same
        with (
            tqdm(
                desc="tokens",
                unit="tok",
                unit_scale=True,
                total=tokens or None,
                leave=False,
                disable=None,
            ) as bar,
            open(Path(own, "train.bin"), "w+b") as train,
            open(Path(own, "val.bin"), "w+b") as val,
        ):
            more = lambda _: not tokens or train.tell() + val.tell() < tokens * kind.itemsize
            for number, document in groupby(takewhile(more, parts), lambda part: part[0]):
                file = train if number % held_out else val  # whole documents are held out
                start, digest = file.tell(), 0
                for _, part in document:
                    file.write(np.array(part, kind).tobytes())
                    digest = hash((digest, *part))
                    bar.update(len(part))
                if digest in seen and data != "stdlib":  # only tiny ones are equal in the library
                    file.truncate(file.seek(start))
                seen.add(digest)
            if len(seen) < held_out or val.tell() < 10_000 * kind.itemsize:  # few, or short
                train.seek(0)
                shutil.copyfileobj(train, val)
                train, val = val, train  # now all is in train
                cut = train.seek(train.tell() // kind.itemsize * 19 // 20 * kind.itemsize)
                val.truncate(val.seek(0))
                shutil.copyfileobj(train, val)
                train.truncate(cut)
        folder.mkdir(exist_ok=True)
        Path(val.name).replace(folder / "val.bin")
        Path(train.name).replace(folder / "train.bin")  # last: where it is, both are whole
    return folder


def read_tokens(folder, context, vocab_size):
    """train.bin and val.bin as arrays on disk. ValueError if one has too few tokens for a window, or a token outside
    the vocabulary."""
    both, kind = [], TYPES[vocab_size > 2**16]
    for path in (folder / "train.bin", folder / "val.bin"):
        size = path.stat().st_size // kind.itemsize if path.exists() else 0
        if size <= context:
            raise ValueError(
                f"{path} has {size} tokens, more than the context of {context} are needed"
            )
        both.append(np.memmap(path, kind, "r"))
        if (top := both[-1].max()) >= vocab_size:
            raise ValueError(
                f"{path} has token {top}, outside the vocabulary of {vocab_size} (--vocab-size)"
            )
    return both


def windows(tokens, starts, context, device):
    """Inputs and targets [len(starts), context]: `context` tokens from each start on, and for each the one after it."""
    both = torch.from_numpy(
        np.stack([tokens[i : i + context + 1] for i in starts]).astype(np.int64)
    )
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)  # the copy does not wait for the GPU
    return both[:, :-1].to(device), both[:, 1:].to(device)
