"""Texts, tokens and tokenizers: what data.py and the Tokenizer of pretrained.py promise."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

import data


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    """A file of a text, or a .jsonl of a list of texts."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else "".join(json.dumps({"text": one}) + "\n" for one in content)
    Path(name).write_text(text, "utf-8", "surrogateescape")


def prepared(name, tokens=0, encoding="bytes", vocabulary=257):
    """The tokens of both sides, as lists."""
    folder = data.prepare(name, encoding, tokens, vocabulary)
    return [side.tolist() for side in data.read_tokens(folder, 0, vocabulary)]


def tokens_of(texts):
    return [token for text in texts for token in [*text.encode(), 256]]


def test_a_name_is_not_a_pattern_and_what_begins_with_a_dot_is_no_data_unless_it_is_named():
    for name in "b/a1.txt", "b/a[1].txt", "c1/a.txt", "c[1]/a.txt", ".h/a.txt", ".h/.copies/a.txt", ".h/b/.c.txt":
        write(name, name)
    for name, right in ("b/a[1].txt",) * 2, (".h/b/.c.txt",) * 2, ("c[1]", "c[1]/a.txt"), (".h", ".h/a.txt"):
        assert list(data.texts(name)) == [(right, True)]


def test_only_the_text_column_is_read_also_from_the_hub(monkeypatch):
    write("texts/1.jsonl", "")                                                          # an empty first part
    write("texts/2.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": "one"}\n\n{"n": 1}\n{"text": null}\n')
    maps = pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"map": maps, "text": ["c", "d"]}), "texts/3.parquet")
    assert [text for text, _ in data.texts("texts")] == ["a", "b", "c", "d"]
    monkeypatch.setattr("datasets.load_dataset", lambda *name, **_: [{"text": f"{name}", "n": 1}])
    assert list(data.texts("owner/name:config")) == [("('owner/name', 'config')", True)]


@pytest.mark.parametrize("name, content, words", [
    ("missing.jsonl", None, ""), ("empty/a.md", "a text", "no .txt"), ("numbers.jsonl", [1], "'text'"),
    ("names.jsonl", '{"body": "a", "url": "x"}', "'text'.*body, url"), ("string.jsonl", '"text"', "dictionary"),
    ("half.jsonl", '{"text": "a"}\n{"text": ', "JSON"), ("half.parquet", "PAR1", ""), ("byte.txt", "\udc93", "utf-8")])
def test_data_that_cannot_be_read_is_refused_by_name_and_leaves_nothing(name, content, words):
    name, _ = name.split("/")[0], content and write(name, content)
    with pytest.raises(OSError, match=f"{name}.*{words}") as refused:
        data.prepare(name, "bytes")
    assert "\n" not in str(refused.value) and not list(Path().glob("data/*"))


@pytest.mark.parametrize("line", ["a line of a text, é\n", "no line at all, é "])
def test_a_long_text_is_not_held_whole(line):
    write("long.txt", line * 300_000)
    tracemalloc.start()
    size = sum(len(text) for text, _ in data.texts("long.txt") if text.endswith(line[-1]) or "\n" not in line)
    assert size == 300_000 * len(line) and tracemalloc.get_traced_memory()[1] < size / 4
    tracemalloc.stop()
    assert len(sum(prepared("long.txt", tokens=500), [])) < 200_000, "the rest of it is read for nothing"


def test_one_document_in_200_is_held_out_and_no_text_is_on_both_sides():
    some = [f"document {i}: é{'.' * (i if i % 200 else 6000)}" for i in range(450)]
    write("a.jsonl", [*some[:400], some[1], *some[400:], some[0]])                      # copies, for the other side
    assert prepared("a.jsonl") == [tokens_of(some[1:200] + some[201:]), tokens_of([some[0], some[200]])]
    assert len(list(Path("data").rglob("*"))) == 3, "more than a folder of two files is left"


def test_of_the_standard_library_one_file_in_20_is_held_out():
    texts = [path.read_text("utf-8") for path in data.text_files("stdlib")]
    train, val = prepared("stdlib")
    assert len(texts) > 300 and val == tokens_of(texts[::20]) and len(train + val) == len(tokens_of(texts))


@pytest.mark.parametrize("count", [3, 1000])
def test_of_few_or_short_documents_the_last_20th_is_held_out_and_a_limit_ends_at_a_document(count):
    some = [f"number {i}" for i in range(count)]
    write("a.jsonl", [*some, some[0]])                                                  # a copy, for the other side
    train, val = prepared("a.jsonl")
    assert train + val == tokens_of([*some[::200], *(text for i, text in enumerate(some) if i % 200)])
    assert len(train) == len(train + val) * 19 // 20
    for limit, whole in (18, 2), (19, 3):                                               # 9 tokens each
        assert sum(prepared("a.jsonl", limit), []) == tokens_of(some[:whole])


KILLED = """import os, data
data.np.array = lambda *_: os.kill(os.getpid(), 9)
data.prepare("a.jsonl", "bytes")"""


def test_a_killed_preparation_is_done_again_two_may_run_at_once_and_a_third_takes_what_is_there(monkeypatch):
    real, seen = data.texts, []
    write("a.jsonl", ["a text", "another"])
    monkeypatch.setenv("PYTHONPATH", str(Path(data.__file__).parent))
    assert subprocess.run([sys.executable, "-c", KILLED]).returncode == -9 and list(Path("data").iterdir())

    def while_another_run_finishes(name):
        yield from real(name)
        monkeypatch.setattr(data, "texts", real)
        seen.extend(prepared(name))

    monkeypatch.setattr(data, "texts", while_another_run_finishes)
    assert prepared("a.jsonl") == seen and sum(seen, []) == tokens_of(["a text", "another"])
    monkeypatch.setattr(data, "texts", None)                                            # or it is called
    assert prepared("a.jsonl") == seen
    monkeypatch.undo()


@pytest.mark.parametrize("size, kind", [(2**16 - 5, np.uint16), (2**16 + 5, np.uint32)])
def test_tokens_are_of_the_type_that_the_vocabulary_needs_and_refused_outside_of_it_with_both_numbers(size, kind):
    np.arange(size - 100, size, dtype=kind).tofile("train.bin")
    np.arange(99, dtype=kind).tofile("val.bin")
    assert prepared(".", vocabulary=size) == [[*range(size - 100, size)], [*range(99)]]
    for context, vocabulary, words in (99, size, "val.* 99 tokens.* 99 "), (50, size - 1, f"{size - 1}.* {size - 1} "):
        with pytest.raises(ValueError, match=words):
            data.read_tokens(Path(), context, vocabulary)
    write("a.txt", "a text")
    assert sum(prepared("a.txt", vocabulary=size), []) == tokens_of(["a text"]), "a padded vocabulary"


def byte_level(template, end=257):
    """A tokenizer of all bytes with <s> and </s> around a text as in the template, as get_encoding takes it."""
    alphabet, both = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), [("<s>", 256), ("</s>", 257)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["señor", "<|begin▁of|>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=both)
    tokenizer.enable_padding(direction="left", pad_id=257, length=20)
    return {"json": tokenizer.to_str(), "eot_token": end}


def sentencepiece():
    """A tokenizer with ▁ for a space and <0x0A> for a byte that has no letter."""
    vocab = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ByteLevel"]
    ids = {piece: i for i, piece in enumerate(vocab)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.add_tokens(["señor", "<|begin▁of|>"])
    return {"json": tokenizer.to_str(), "eot_token": 0}


def text_of(encoding, tokens):
    return b"".join(data.token_bytes(encoding, token) for token in tokens).decode(errors="replace")


@pytest.mark.parametrize("name", ["bytes", byte_level("$A"), sentencepiece()], ids=["bytes", "byte level", "pieces"])
def test_every_byte_is_kept_and_what_looks_special_is_text(name):
    encoding, text = data.get_encoding(name), "def f():\r\n\n\treturn 'é日本'  \n\na </s> b"
    tokens = encoding.encode_ordinary(text)
    assert text_of(encoding, tokens) == text and encoding.eot_token not in tokens
    assert encoding.encode_ordinary_batch([text, ""], num_threads=2) == [tokens, []]


@pytest.mark.parametrize("template, front", [("$A", []), ("<s> $A", [256]), ("<s> $A </s>", [256]), ("$A </s>", [])])
def test_a_tokenizer_puts_in_front_of_a_document_what_the_model_wants_and_nothing_behind(template, front):
    encoding, long = data.get_encoding(byte_level(template)), "a" * 2**17
    for text in "ab", "":
        assert text_of(encoding, encoding.encode_ordinary(text)) == "<s>" * len(front) + text
    write("a.txt", long)                                                                # of two parts
    tokens = [token for _, part in data.encode("a.txt", encoding) for token in part]
    assert tokens == [*front, *encoding.encode_ordinary(long)[len(front) :], 257]


@pytest.mark.parametrize("name", [byte_level("$A"), sentencepiece()], ids=["byte level", "pieces"])
def test_added_tokens_are_written_as_they_are(name):
    encoding = data.get_encoding(name)
    for text in "señor", "<|begin▁of|>":
        assert len(encoding.encode_ordinary(text)) == 1
        assert text_of(encoding, encoding.encode_ordinary(f"a {text}")) == f"a {text}"


@pytest.mark.parametrize("name, text, words", [
    (None, "", "without a tokenizer"), (byte_level("$A", end=None), "a", "no end of text"),
    ({"json": "version https://git-lfs.github.com/spec/v1", "eot_token": 0}, "", "cannot be read"),
    ({"json": byte_level("$A")["json"][:1000], "eot_token": 0}, "", "cannot be read"),
    (byte_level("$A"), "a \udcff", "UTF-8.*udcff"),                                     # as Python reads argv
])
def test_what_no_tokenizer_can_do_is_refused_in_one_line_and_leaves_nothing(name, text, words):
    with pytest.raises(ValueError, match=words) as refused:
        encoding = data.get_encoding(name)
        encoding.encode_ordinary_batch(["b", text])
        write("a.txt", text)
        data.prepare("a.txt", name)
    assert "\n" not in str(refused.value) and not list(Path().glob("data/*"))
