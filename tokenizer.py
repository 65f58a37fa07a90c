"""Tokenizers, here called encodings: bytes, those of tiktoken, and a model's own tokenizer.json."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import tiktoken
import tokenizers
import torch

END = "<|endoftext|>"  # between documents


class UserError(ValueError):
    """What whoever runs a script can mend. They see its message only, in one line."""


@contextmanager
def explained(message):
    """Inside, whatever goes wrong becomes a UserError: this message, then the library's own.

    But for too little memory. From then on the hub's library logs nothing: our own line says it.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries have no class of their own for this
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{message} ({reason[:400]})") from error


class Tokenizer:
    """A tokenizer.json, with those methods of a tiktoken.Encoding that are used here.

    Text that looks like a special token is text. In front of every text stands what the model
    wants there, such as a token for the beginning. What it wants behind is left out, because
    generation goes on from there. json: its content; eot_token: what separates documents.
    """

    def __init__(self, json, eot_token):
        self.tokenizer = tokenizers.Tokenizer.from_str(json)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eot_token = eot_token
        self.n_vocab = max(self.tokenizer.get_vocab().values()) + 1
        self.before = self.tokenizer.encode("a", add_special_tokens=False).ids
        around = self.tokenizer.encode("a")  # with special tokens on both sides
        self.front = around.ids[: around.special_tokens_mask.index(0)]

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        # JSON can have halves of a character, which are replaced, as tiktoken does.
        whole = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
        found = self.tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        return [self.front + one.ids for one in found]

    def decode(self, tokens):
        """The text of tokens in the middle of a text. KeyError for an id without a token.

        At the beginning of a text some tokenizers drop a space, so another token stands before.
        """
        if None in map(self.tokenizer.id_to_token, tokens):
            raise KeyError(tokens)
        before = self.tokenizer.decode(self.before, skip_special_tokens=False)
        text = self.tokenizer.decode([*self.before, *tokens], skip_special_tokens=False)
        return text[len(before) :]


class TextStream:
    """Tokens become text as they come. A character may span several of them.

    (DecodeStream of tokenizers stops with an error where a vocabulary with tokens for bytes, such
    as Llama 2's, makes a line break and then half a character.)
    """

    def __init__(self, encoding):
        self.encoding = encoding
        self.waiting = []  # the tokens of an unfinished character

    def step(self, token):
        """The text that this token finishes, maybe none; "?" if no token has this id."""
        try:
            text = self.encoding.decode([*self.waiting, token])
        except KeyError:
            return self.end() + "?"
        if text.endswith("\ufffd") and len(self.waiting) < 3:  # a character has four bytes at most
            self.waiting.append(token)
            return ""
        self.waiting = []
        return text

    def end(self):
        """What stands for an unfinished character, if there is one."""
        text = self.encoding.decode(self.waiting)
        self.waiting = []
        return text


def get_encoding(name):
    """The encoding of a name or dict that `read_tokenizer` returns. UserError if it has none.

    `bytes` has 256 tokens that never merge, and one for the end of a text.
    """
    if name is None:
        raise UserError("this model has no tokenizer: it knows token numbers, but no text")
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"[^\n]*\n|[^\n]+", mergeable_ranks=ranks, special_tokens={END: 256}
        )
    if isinstance(name, dict):
        with explained("cannot use the tokenizer of this model"):
            return Tokenizer(**name)
    with explained(
        f"cannot use the tokenizer {name}: tiktoken needs a network once, or TIKTOKEN_CACHE_DIR "
        "with the cache of another machine"
    ):
        return tiktoken.get_encoding(name)


def read_tokenizer(name):
    """What a checkpoint stores of a tokenizer, and `get_encoding` takes: a name, or a dict.

    name: `bytes`, one of tiktoken's, or a folder or a model on the Hugging Face hub with
    tokenizer.json and, for the end of text, tokenizer_config.json. UserError if it is none.
    """
    if name == "bytes" or name in tiktoken.list_encoding_names():
        return name
    files = ["tokenizer.json", "tokenizer_config.json"]
    with explained(
        f"no tokenizer {name}: not bytes, none of tiktoken, and no folder or model on the "
        "Hugging Face hub with tokenizer.json and an eos_token"
    ):
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
        content, config = [(folder / file).read_text("utf-8") for file in files]
        end = json.loads(config)["eos_token"]
        end = end["content"] if isinstance(end, dict) else end
        token = tokenizers.Tokenizer.from_str(content).get_vocab()[end]
    return {"json": content, "eot_token": token}
