"""Texts, tokens and tokenizers: what data.py and the Tokenizer of pretrained.py promise."""

import json
import os
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch

import data

END = 256    # of the encoding "bytes", which has no download


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    """A file of a text, or a .jsonl of a list of rows."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    Path(name).write_text(text, "utf-8")


def prepared(name, tokens=0):
    """The tokens of both sides, as lists, and nothing else in data/ than their folder."""
    folder = data.prepare(name, "bytes", tokens)
    assert sorted(p.name for p in folder.iterdir()) == ["train.bin", "val.bin"]
    return [np.fromfile(folder / side, np.uint16).tolist() for side in ("train.bin", "val.bin")]


def tokens_of(texts):
    return [token for text in texts for token in [*text.encode(), END]]


# ---------------------------------------------------------------- texts


def test_a_name_is_not_a_pattern():
    write("b/a1.jsonl", [{"text": "another file"}])
    write("b/a[1].jsonl", [{"text": "the file"}])
    write("c[1]/a.txt", "in a folder")
    write("c1/a.txt", "in another folder")
    assert list(data.documents("b/a[1].jsonl")) == ["the file"]
    assert list(data.documents("c[1]")) == ["in a folder"]


def test_what_begins_with_a_dot_is_no_data_unless_it_is_named():
    write(".h/a.txt", "a text")
    write(".h/.ipynb_checkpoints/a-checkpoint.txt", "a copy")
    write(".h/b/.c.txt", "hidden")
    assert list(data.documents(".h")) == ["a text"]
    assert list(data.documents(".h/b/.c.txt")) == ["hidden"]


def test_only_the_text_column_is_read():
    import pyarrow
    import pyarrow.parquet

    write("texts/1.jsonl", "")                                                                    # an empty first part
    write("texts/2.jsonl", [{"text": "a", "n": 1}] + [{"text": "b", "n": "one"}] * 2)             # a type that changes
    write("texts/3.jsonl", [{"text": "c", "url": "x"}, {"text": None}, {"url": "x"}, {"text": ""}, {"text": "d"}])
    rows = pyarrow.table({"map": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
                          "text": ["e", "f"]})
    pyarrow.parquet.write_table(rows, "texts/4.parquet")
    assert list(data.documents("texts")) == ["a", "b", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("line", ["a line of a text, é\n", "no line at all, é "])
def test_a_long_text_is_not_held_whole(line):
    text = line * 300_000
    write("long.txt", text)
    tracemalloc.start()
    size = sum(map(len, data.documents("long.txt")))
    assert size == len(text) and tracemalloc.get_traced_memory()[1] < len(text) / 4
    tracemalloc.stop()
    train, val = prepared("long.txt")
    assert train + val == tokens_of([text]), "the parts are not the text, with one end"
    assert len(train) == len(train + val) * 19 // 20, "not the last 20th of it is held out"


def test_a_data_set_on_the_hub_may_have_a_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        return [{"text": "a", "url": "x"}]

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    how = {"split": "train", "streaming": True}
    for name in ("fineweb-edu", "owner/name", "owner/name:20231101.en"):
        assert list(data.documents(name)) == ["a"]
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT", how), ("owner/name", None, how),
                     ("owner/name", "20231101.en", how)]
    fake.load_dataset = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route"))
    with pytest.raises(OSError, match="owner/name.* hub .*--data.*no route"):
        list(data.documents("owner/name"))


@pytest.mark.parametrize("name, content, words", [
    ("missing.jsonl", None, "missing.jsonl"),
    ("empty/notes.md", "a text", "empty.* no .txt"),
    ("names.jsonl", [{"body": "a", "url": "x"}], "names.jsonl.*'text'.*body, url"),
    ("numbers.jsonl", [{"text": 1}], "numbers.jsonl.*'text'"),
    ("string.jsonl", '"text"\n', "string.jsonl"),
    ("half.jsonl", '{"text": "a"}\n{"text": ', "half.jsonl"),
    ("half.parquet", "PAR1", "half.parquet"),
    ("binary.txt", None, "binary.txt.*(utf|UTF)-8"),
])
def test_data_that_cannot_be_read_is_refused_by_name(name, content, words):
    if content is not None:
        write(name, content)
    elif name == "binary.txt":
        Path(name).write_bytes(b"\x93NUMPY")
    with pytest.raises((ValueError, OSError), match=words) as refused:
        data.prepare(name.partition("/")[0], "bytes")
    assert "\n" not in str(refused.value)
    assert not Path("data").exists() or not any(Path("data").iterdir()), "something is left of it"


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_one_document_in_200_is_held_out_whole(kind):
    import pyarrow
    import pyarrow.parquet

    texts = [f"document {i}: é{'.' * 20 * i}" for i in range(450)]
    if kind == "txt":
        for i, text in enumerate(texts):
            write(f"texts/{i:03}.txt", text)
    elif kind == "jsonl":
        write("texts/part.jsonl", [{"text": text} for text in [None, *texts]])
    else:
        Path("texts").mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "texts/part.parquet")
    train, val = prepared("texts")
    assert val == tokens_of(texts[::200])
    assert train == tokens_of(text for i, text in enumerate(texts) if i % 200)
    assert len(list(Path("data").iterdir())) == 1


def test_of_short_documents_the_last_20th_is_held_out_and_a_limit_ends_at_a_document():
    texts = [f"number {i}" for i in range(1000)]
    write("short.jsonl", [{"text": text} for text in texts])
    train, val = prepared("short.jsonl")
    assert len(train) == len(tokens_of(texts)) * 19 // 20
    assert train + val == tokens_of([*texts[::200], *(text for i, text in enumerate(texts) if i % 200)])
    train, val = prepared("short.jsonl", tokens=500)
    enough = next(i for i in range(1000) if len(tokens_of(texts[:i])) >= 500)
    assert train + val == tokens_of(texts[:enough])
    write("long.txt", "a line of a text\n" * 100_000)
    assert len(sum(prepared("long.txt", tokens=500), [])) < 200_000, "the rest of a long text is read for nothing"


@pytest.mark.parametrize("count", [2, 3, 450])
def test_documents_with_the_same_text_are_not_on_both_sides(count):
    texts = [f"document {i}: {'.' * 20 * i}" for i in range(count - 1)]
    for i, text in enumerate([*texts, texts[0]]):                                                # the last is a copy
        write(f"texts/{i:03}.txt", text)
    assert sorted(sum(prepared("texts"), [])) == sorted(tokens_of(texts))


def test_long_texts_that_begin_or_end_alike_are_both_kept():
    texts = [f"{begin * 2**16}\n{end * 1000}" for begin in "ab" for end in "ab"]                  # of two parts each
    for i, text in enumerate([*texts, texts[0]]):
        write(f"texts/{i}.txt", text)
    assert sum(prepared("texts"), []) == tokens_of(texts)


def test_of_the_standard_library_one_file_in_20_is_held_out():
    train, val = prepared("stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    texts = [p.read_text("utf-8") for p in files]
    assert val == tokens_of(texts[::20])
    assert len(train + val) == sum(len(text.encode()) + 1 for text in texts), "a file is missing"


KILLED = """
import os, data

def documents(*arguments, **options):
    for i, text in enumerate(real(*arguments, **options)):
        if i == 200:
            os.kill(os.getpid(), 9)
        yield text

real, data.documents = data.documents, documents
data.prepare("texts.jsonl", "bytes")
"""


def test_a_killed_preparation_is_done_again():
    texts = [f"number {i}" for i in range(300)]
    write("texts.jsonl", [{"text": text} for text in texts])
    killed = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | {"PYTHONPATH": Path(data.__file__).parent})
    assert killed.returncode == -9 and list(Path("data").iterdir())
    assert sorted(sum(prepared("texts.jsonl"), [])) == sorted(tokens_of(texts))


def test_two_runs_may_prepare_the_same_text_at_once_and_a_third_takes_it_as_it_is(monkeypatch):
    texts, real, seen = [f"number {i}" for i in range(300)], data.documents, []
    write("texts.jsonl", [{"text": text} for text in texts])

    def while_another_run_finishes(*arguments, **options):
        yield from real(*arguments, **options)
        monkeypatch.setattr(data, "documents", real)
        seen.extend(data.read_tokens(data.prepare("texts.jsonl", "bytes"), 4, 257))

    monkeypatch.setattr(data, "documents", while_another_run_finishes)
    both = prepared("texts.jsonl")
    assert both == [tokens.tolist() for tokens in seen] and sorted(sum(both, [])) == sorted(tokens_of(texts))
    monkeypatch.setattr(data, "get_encoding", None)                                               # or it is called
    assert prepared("texts.jsonl") == both


def test_a_text_that_has_changed_is_prepared_again():
    for text in ("a text", "another text"):
        write("a.txt", text)
        assert sum(prepared("a.txt"), []) == tokens_of([text])


def test_tokens_that_the_model_cannot_read_are_refused_with_both_numbers():
    Path("mine").mkdir()
    np.arange(100, dtype=np.uint16).tofile("mine/train.bin")
    np.arange(99, dtype=np.uint16).tofile("mine/val.bin")
    assert data.prepare("mine", "bytes") == Path("mine")
    train, val = data.read_tokens(Path("mine"), 98, 100)
    assert isinstance(train, np.memmap) and train.dtype == np.uint16 and (len(train), len(val)) == (100, 99)
    with pytest.raises(ValueError, match="mine.* 99 tokens.* 99 "):
        data.read_tokens(Path("mine"), 99, 100)
    with pytest.raises(ValueError, match="mine.* token 99.* 99 "):
        data.read_tokens(Path("mine"), 50, 99)


def test_windows_are_inputs_and_the_tokens_after_them():
    tokens = np.arange(50, 90, dtype=np.uint16)
    x, y = data.windows(tokens, [0, 7], 5, torch.device("cpu"))
    assert x.tolist() == [[50, 51, 52, 53, 54], [57, 58, 59, 60, 61]] and x.dtype == torch.int64
    assert torch.equal(y, x + 1)


# ---------------------------------------------------------------- encodings


def test_bytes_survive_the_encoding():
    encoding, text = data.get_encoding("bytes"), "def f():\r\n\n\treturn 'é日本'  \n\n"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode(data.END, allowed_special="all") == [encoding.eot_token] == [END]
    assert data.token_bytes(encoding, 65) == b"A" and data.token_bytes(encoding, 300) == b"?"
    with pytest.raises(ValueError, match="without a tokenizer"):
        data.get_encoding(None)


def byte_level(template="$A", added=(), end=257, padded=False):
    """A tokenizer of all bytes, with <s> and </s> around a text as in the template, for get_encoding."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(list(added))
    both = [("<s>", 256), ("</s>", 257)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=both)
    if padded:
        tokenizer.enable_padding(direction="left", pad_id=257, length=20)
    return {"json": tokenizer.to_str(), "eot_token": end}


def sentencepiece(added=()):
    """A tokenizer with ▁ for a space and <0x0A> for a byte that has no letter."""
    vocab = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ByteLevel"]
    ids = {piece: i for i, piece in enumerate(vocab)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.add_tokens(list(added))
    return {"json": tokenizer.to_str(), "eot_token": 0}


def text_of(encoding, tokens):
    return b"".join(data.token_bytes(encoding, token) for token in tokens).decode(errors="replace")


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_a_tokenizer_keeps_every_byte_and_takes_special_tokens_in_a_text_as_text(kind):
    encoding, text = data.get_encoding(kind()), "def f():\r\n\n\treturn 'é日本'  \n\na </s> b"
    tokens = encoding.encode_ordinary(text)
    assert text_of(encoding, tokens) == text and encoding.eot_token not in tokens
    assert encoding.encode_ordinary_batch([text, ""], num_threads=2) == [tokens, []]


@pytest.mark.parametrize("template, front", [("$A", ""), ("<s> $A", "<s>"), ("<s> $A </s>", "<s>"), ("$A </s>", "")])
def test_a_tokenizer_puts_in_front_what_the_model_wants_and_nothing_behind(template, front):
    encoding = data.get_encoding(byte_level(template))
    for text in ("ab", ""):
        assert text_of(encoding, encoding.encode_ordinary(text)) == front + text
        assert encoding.encode_ordinary_batch([text], num_threads=2) == [encoding.encode_ordinary(text)]
    assert data.get_encoding(byte_level(template, padded=True)).encode_ordinary("ab") == encoding.encode_ordinary("ab")


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_added_tokens_are_written_as_they_are(kind):
    added = "señor", "<|begin▁of|>"
    encoding = data.get_encoding(kind(added=added))
    for text in added:
        assert len(encoding.encode_ordinary(text)) == 1
        assert text_of(encoding, encoding.encode_ordinary(f"a {text}")) == f"a {text}"


def test_a_tokenizer_without_an_end_of_text_reads_prompts_but_separates_no_documents():
    encoding = byte_level(end=None)
    assert text_of(data.get_encoding(encoding), data.get_encoding(encoding).encode_ordinary("ab")) == "ab"
    write("a.txt", "a text")
    with pytest.raises(ValueError, match="no end of text"):
        data.prepare("a.txt", encoding)
    assert not Path("data").exists()


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1", byte_level()["json"][:1000], "{}"])
def test_a_tokenizer_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="tokenizer cannot be read") as refused:
        data.get_encoding({"json": text, "eot_token": 0})
    assert "\n" not in str(refused.value)


def test_a_prompt_that_is_not_utf8_is_refused():
    encoding = data.get_encoding(byte_level())
    prompt = b"a \xff".decode(errors="surrogateescape")                                           # as Python reads argv
    with pytest.raises(ValueError, match="UTF-8.*udcff"):
        encoding.encode_ordinary(prompt)
    with pytest.raises(ValueError, match="UTF-8.*udcff"):
        encoding.encode_ordinary_batch(["b", prompt], num_threads=2)


def test_a_vocabulary_too_large_for_uint16_is_kept_in_uint32():
    vocab = {"a": 0, "b": 70_000, "c": 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="c"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    write("a.txt", "a b " * 100)
    folder = data.prepare("a.txt", {"json": words.to_str(), "eot_token": 1})
    train, val = data.read_tokens(folder, 5, 70_001)
    assert [*train, *val] == [0, 70_000] * 100 + [1]
    with pytest.raises(ValueError, match="outside the vocabulary of 70000"):
        data.read_tokens(folder, 5, 70_000)
