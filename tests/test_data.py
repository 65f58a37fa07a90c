"""Texts, tokens and tokenizers: what data.py and the Tokenizer of pretrained.py promise."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import data


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, "utf-8", "surrogateescape")


def prepared(name, tokens=0, encoding="bytes", vocabulary=2**16):
    both = data.read_tokens(data.prepare(name, encoding, tokens, vocabulary), 0, vocabulary)
    return [side.tolist() for side in both]


def tokens_of(*texts):
    return [token for text in texts for token in [*text.encode(), 256]]


def tokenizer(template="$A", byte_level=True):
    """All bytes, like GPT-2's or like SentencePiece's, and <s> and </s> around a text as in the template."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ByteLevel"]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else pieces
    made = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    made.normalizer = None if byte_level else normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else None
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["señor", "<|begin▁of|>"])
    made.post_processor = processors.TemplateProcessing(
        template, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    made.enable_padding(direction="left", length=20)
    return {"json": made.to_str(), "eot_token": 257}


def test_a_name_is_not_a_pattern_and_what_begins_with_a_dot_is_no_data_unless_it_is_named():
    for name in (
        "b/a1.txt",
        "b/a[1].txt",
        "c1/a.txt",
        "c[1]/a.txt",
        ".h/a.txt",
        ".h/.copies/a.txt",
        ".h/b/.c.txt",
    ):
        write(name, name)
    for name, right in (
        ("b/a[1].txt",) * 2,
        (".h/b/.c.txt",) * 2,
        ("c[1]", "c[1]/a.txt"),
        (".h", ".h/a.txt"),
    ):
        assert list(data.texts(name)) == [(right, True)]


def test_only_the_text_column_is_read_also_from_the_hub(monkeypatch):
    write("texts/1.jsonl", "")  # an empty first part
    write(
        "texts/2.jsonl",
        '{"text": "a", "n": 1}\n{"text": "b", "n": "one"}\n\n{"n": 1}\n{"text": null}\n',
    )
    maps = pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"map": maps, "text": ["c", "d"]}), "texts/3.parquet")
    assert [text for text, _ in data.texts("texts")] == ["a", "b", "c", "d"]
    assert list(data.read(Path("texts/3.parquet"))) == [{"text": "c"}, {"text": "d"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *name, **_: [{"text": f"{name}", "n": 1}])
    assert list(data.texts("owner/name:config")) == [("('owner/name', 'config')", True)]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing.jsonl", "", "no file missing.jsonl"),
        ("empty", "", "empty.*no .txt"),
        ("number.jsonl", '{"text": 1}', "number.*'text'"),
        ("string.jsonl", '"text"', "string.*dictionary"),
        ("names.jsonl", '{"body": "a", "url": "x"}', "names.*'text'.*body, url"),
        ("byte.txt", "\udc93", "byte.txt.*utf-8"),
        ("half.jsonl", '{"text": "a"}\n{"text": ', "half.*JSON"),
        ("half.parquet", "PAR1", "half.parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line_and_leaves_nothing(name, content, words):
    write("empty/a.md", "")
    if content:
        write(name, content)
    with pytest.raises(OSError, match=words) as refused:
        data.prepare(name, "bytes", 0, 258)
    assert "\n" not in str(refused.value) and not list(Path().glob("data/*"))


def test_a_long_text_is_not_held_whole():
    write("long.txt", "no line at all, é " * 300_000)
    tracemalloc.start()
    size = sum(len(text) for text, _ in data.texts("long.txt"))
    assert size == 300_000 * 18 and tracemalloc.get_traced_memory()[1] < size / 4
    tracemalloc.stop()
    assert len(sum(prepared("long.txt", tokens=500), [])) < 200_000, (
        "the rest of it is read for nothing"
    )


@pytest.mark.parametrize("dots", [6000, 0])
def test_one_document_in_200_is_held_out_of_short_ones_the_last_20th_and_no_text_is_on_both_sides(
    dots,
):
    some = [f"document {i}: é{'.' * (i if i % 200 else dots)}" for i in range(450)]
    copies = [*some[:400], some[1], *some[400:], some[0]]  # each for the other side
    write("a.jsonl", "".join(json.dumps({"text": one}) + "\n" for one in copies))
    held, rest = tokens_of(some[0], some[200]), tokens_of(*some[1:200], *some[201:])
    cut = len(held + rest) * 19 // 20
    assert prepared("a.jsonl") == (
        [rest, held] if dots else [(held + rest)[:cut], (held + rest)[cut:]]
    )
    assert sum(prepared("a.jsonl", len(tokens_of(*some[:2])) + 1), []) == tokens_of(*some[:3]), (
        "limit"
    )
    files = [path.read_text("utf-8") for path in data.text_files("stdlib")]  # one in 20 of these
    assert len(files) > 300 and prepared("stdlib")[1] == tokens_of(*files[::20])


@pytest.mark.parametrize("size, kind", [(2**16, np.uint16), (2**16 + 5, np.uint32)])
def test_tokens_are_of_the_type_that_the_vocabulary_needs_and_refused_outside_of_it_with_both_numbers(
    size, kind
):
    np.arange(size - 100, size, dtype=kind).tofile("train.bin")
    np.arange(99, dtype=kind).tofile("val.bin")
    assert prepared(".", vocabulary=size) == [[*range(size - 100, size)], [*range(99)]]
    for context, vocabulary, words in (
        (99, size, "val.* 99 tokens.* 99 "),
        (50, size - 1, f"{size - 1}.* {size - 1} "),
    ):
        with pytest.raises(ValueError, match=words):
            data.read_tokens(Path(), context, vocabulary)
    write("a.txt", "a text")  # the tokenizer has 257
    assert prepared("a.txt") == prepared("a.txt", vocabulary=size) == [[*b"a text"], [256]]
    write("a.txt", "another text")  # is prepared, too
    assert sum(prepared("a.txt"), []) == tokens_of("another text")


@pytest.mark.parametrize(
    "name", ["bytes", tokenizer(), tokenizer(byte_level=False)], ids=["bytes", "level", "pieces"]
)
def test_every_byte_is_kept_and_special_and_added_tokens_are_written_as_they_are(name):
    encoding, text = (
        data.get_encoding(name),
        "def f():\r\n\n\treturn 'é日本'  \n\na </s> <|begin▁of|> señor",
    )
    tokens = encoding.encode_ordinary(text)
    assert b"".join(map(encoding.decode_single_token_bytes, tokens)) == text.encode()
    assert encoding.encode_ordinary("a \udcff") == encoding.encode_ordinary(
        "a \ufffd"
    )  # a half of a character
    if name != "bytes":
        assert len(encoding.encode_ordinary("señor")) == 1 < len(encoding.encode_ordinary("</s>"))


@pytest.mark.parametrize(
    "template, front", [("$A", []), ("<s> $A", [256]), ("<s> $A </s>", [256]), ("$A </s>", [])]
)
def test_a_template_is_once_in_front_of_a_document_and_never_behind(template, front):
    plain = data.get_encoding(tokenizer())
    some = [
        "a" * 2**16,
        *(f"{begin * 2**17}\n{end}" for begin in "ab" for end in "ab"),
    ]  # not each of one part
    for i, text in enumerate([*some, some[2]]):
        write(f"texts/{i}.txt", text)
    right = [[*front, *plain.encode_ordinary(text), 257] for text in some]
    assert (
        sum(prepared("texts", 0, tokenizer(template)), [])
        == sum(right, [])
        != sum(prepared("texts"), [])
    )
