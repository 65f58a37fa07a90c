"""Texts, tokens and tokenizers: what data.py promises."""

import errno
import json
import os
import tracemalloc
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import data
import tokenizer


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, "utf-8", "surrogateescape")


def write_parquet(name, texts, **options):
    pyarrow.parquet.write_table(
        pyarrow.table({"n": [0] * len(texts), "text": texts}), name, **options
    )


def refuses(words, call, *arguments):
    """It raises a UserError of one line in which these words are found."""
    with pytest.raises(tokenizer.UserError, match=words) as refusal:
        call(*arguments)
    assert "\n" not in str(refusal.value)


def prepared(name, tokens=0, encoding="bytes", vocabulary=2**16):
    both = data.read_tokens(data.prepare(name, encoding, tokens, vocabulary), 0, vocabulary)
    return [side.tolist() for side in both]


def tokens_of(*texts):
    return [token for text in texts for token in [*text.encode(), 256]]


def a_tokenizer(template="$A", byte_level=True):
    """All bytes, like GPT-2's or SentencePiece's, and <s> and </s> as the template has them."""
    if byte_level:
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        decoder = decoders.ByteLevel()
    else:  # the last of its decoders drops a space at the beginning of a text
        pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
        steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
        decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    made = Tokenizer(model)
    made.decoder = decoder
    made.normalizer = None if byte_level else normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else None
    made.add_special_tokens(["<s>", "</s>"])
    ends = [(piece, made.token_to_id(piece)) for piece in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
    made.enable_padding(direction="left", length=20)
    made.enable_truncation(30)
    return {"json": made.to_str(), "eot_token": made.token_to_id("</s>")}


def test_a_folder_has_the_texts_of_our_kinds_and_names_what_is_left_out(capsys):
    names = "b/a1.txt b/a[1].txt c1/a.txt c[1]/A.TXT c[1]/s/b.jsonl.gz .h/a.txt"
    names += " .h/.copies/a.txt .h/b/.c.txt .h/README.md .h/d.csv .h/e.json"
    for name in names.split():
        write(name, name)
    for name, right, left_out in (
        ("b/a[1].txt", "b/a[1].txt", []),
        (".h/b/.c.txt", ".h/b/.c.txt", []),
        ("c[1]", "c[1]/A.TXT", ["1 of 2 files", "c[1]/s/b.jsonl.gz"]),
        (".h", ".h/a.txt", ["5 of 6 files", ".h/README.md, .h/d.csv, .h/e.json"]),
    ):
        assert list(data.texts(name)) == [(right, True)]
        line = capsys.readouterr().err
        assert all(words in line for words in left_out) and line.count("\n") == bool(left_out)


def test_only_the_text_is_read_of_each_kind_and_from_the_hub(monkeypatch):
    write("texts/1.jsonl", "")
    write(
        "texts/2.JSONL",
        '\ufeff{"text": "a", "n": 1}\n{"text": "b", "n": "one"}\n\n{"text": null}\n',
    )
    write_parquet("texts/3.PARQUET", ["c", "d"])
    write("texts/4.txt", "\ufeffe")
    write("texts/5.txt", "")  # a text, too
    assert list(data.texts("texts")) == [(text, True) for text in ("a", "b", "c", "d", "e", "")]
    assert list(data.rows(Path("texts/3.PARQUET"))) == [{"text": "c"}, {"text": "d"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *name, **_: [{"text": f"{name}", "n": 1}])
    ((name, _),) = data.texts("fineweb-edu")
    assert name == "('HuggingFaceFW/fineweb-edu', 'sample-10BT')"
    monkeypatch.setattr("datasets.load_dataset", None)
    refuses("owner/name, .*no file here.*hub", list, data.texts("owner/name"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing.jsonl", "", "^no .*missing.jsonl"),
        ("empty", "", "^no .*empty"),
        ("table.csv", "text", "^no .*table.csv"),
        ("number.jsonl", '{"text": "a"}\n{"text": 1}', "number.*row 2 .*: {'text': 1}"),
        ("string.jsonl", '"text"', "string.*row 1 .*: text"),
        ("names.jsonl", '{"body": "a", "url": "x"}', "names.*'text'.*body.*url"),
        ("bytes.parquet", [b"a"], "a string, not bytes: .*b'a'"),
        ("byte.txt", "\udc93", "byte.txt .Unicode.*utf-8"),
        ("half.jsonl", '{"text": "a"}\n{"text": ', "half.*JSON"),
        ("half.parquet", "PAR1", "half.parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line_and_leaves_nothing(name, content, words):
    write("empty/a.md", "")
    if isinstance(content, list):
        write_parquet(name, content)
    elif content:
        write(name, content)
    refuses(words, data.prepare, name, "bytes", 0, 258)
    assert not list(Path().glob("data/*"))


def test_a_long_text_is_not_held_whole_and_of_a_table_one_row():
    text = "no line at all, é " * 300_000
    write("long.txt", text)
    tracemalloc.start()
    size = sum(len(part) for part, _ in data.texts("long.txt"))
    assert size == len(text) and tracemalloc.get_traced_memory()[1] < size / 4
    tracemalloc.stop()
    assert sum(map(len, prepared("long.txt", tokens=500))) < 200_000, "the rest is read for nothing"
    write("lines.txt", "a line\n" * 2**15)
    assert {part[-7:] for part, _ in data.texts("lines.txt")} == {"a line\n"}
    write("long.jsonl", json.dumps({"text": text}))
    assert list(data.texts("long.jsonl")) == list(data.texts("long.txt"))

    write_parquet("books.parquet", ["a" * 10**6] * 40, use_dictionary=False, write_batch_size=1)
    before = pyarrow.total_allocated_bytes()
    rows = data.texts("books.parquet")
    assert next(rows) and pyarrow.total_allocated_bytes() - before < 10**7


@pytest.mark.parametrize("dots", [6000, 0])
def test_one_document_in_200_is_held_out_of_short_ones_the_last_20th_and_no_text_is_on_both_sides(
    dots,
):
    some = [f"document {i}: é{'.' * (i if i % 200 else dots)}" for i in range(450)]
    copies = [*some[:400], some[1], *some[400:], some[0]]  # each for the other side
    write("a.jsonl", "".join(json.dumps({"text": one}) + "\n" for one in copies))
    held, rest = tokens_of(some[0], some[200]), tokens_of(*some[1:200], *some[201:])
    cut = len(held + rest) * 19 // 20
    tail = [(held + rest)[:cut], (held + rest)[cut:]]
    assert prepared("a.jsonl") == ([rest, held] if dots else tail)
    most = len(tokens_of(*some[:2])) + 1
    assert sum(prepared("a.jsonl", most), []) == tokens_of(*some[:3]), "limit"


def test_one_file_in_20_of_the_standard_library_is_held_out():
    files = [path.read_text("utf-8") for path in data.find_files("stdlib")[0]]
    train, val = prepared("stdlib")
    assert len(files) > 300 and val == tokens_of(*files[::20])
    assert len(train + val) == len(tokens_of(*files))


@pytest.mark.parametrize("size, kind", [(2**16, np.uint16), (2**16 + 5, np.uint32)])
def test_tokens_have_the_type_that_the_vocabulary_needs_and_wrong_files_are_refused(size, kind):
    np.arange(size - 100, size, dtype=kind).tofile("train.bin")
    np.arange(99, dtype=kind).tofile("val.bin")
    assert prepared(".", vocabulary=size) == [[*range(size - 100, size)], [*range(99)]]
    refuses("val.* 99 tokens.* 99 ", data.read_tokens, ".", 99, size)
    refuses(f"train.* {size - 1}.* {size - 1} ", data.read_tokens, ".", 50, size - 1)
    os.truncate("val.bin", 99)
    refuses("val.* 99 bytes", data.read_tokens, ".", 0, size)

    write("a.txt", "a text")
    assert prepared("a.txt") == prepared("a.txt", vocabulary=size) == [[*b"a text"], [256]]
    refuses("256 .*257", data.prepare, "a.txt", "bytes", 1, 256)


def test_a_changed_text_is_prepared_anew_and_a_full_disk_leaves_nothing_half_written():
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    for count, (text, time) in enumerate((("a text", 1), ("b text", 2), ("another text", 2))):
        write("a.txt", text)
        os.utime("a.txt", (time, time))
        with patch("os.fsync", full):
            refuses("No space left", data.prepare, "a.txt", "bytes", 0, 257)
        assert len(list(Path("data").iterdir())) == count
        assert sum(prepared("a.txt"), []) == tokens_of(text)


SOME = np.random.default_rng(0).integers(2**16, size=2**20).astype(np.uint16)


def test_a_fingerprint_tells_other_tokens():
    prints = []
    for train, val in (
        (SOME, SOME[:9]),
        (SOME, SOME[:8]),
        (SOME[:-1], SOME[:9]),
        (SOME[::-1], SOME[:9]),
    ):
        train.tofile("train.bin")
        val.tofile("val.bin")
        prints.append(json.dumps(data.fingerprint(".")))
    assert len({*prints}) == 4 and prints[3] == json.dumps(data.fingerprint("."))
    assert data.fingerprint(".")["bytes"] == [2**21, 18]


def test_windows_are_of_the_file_which_may_not_be_cut_meanwhile():
    SOME.tofile("tokens.bin")
    tokens = np.memmap("tokens.bin", np.uint16, "r")
    x, y = data.windows(tokens, [3, 2**20 - 8], 7, torch.device("cpu"))
    assert x.tolist() == [SOME[3:10].tolist(), SOME[-8:-1].tolist()]
    assert y.tolist() == [SOME[4:11].tolist(), SOME[-7:].tolist()]
    os.truncate("tokens.bin", 2**20)
    refuses("tokens.bin was cut", data.windows, tokens, [2**20 - 8], 7, torch.device("cpu"))


@pytest.mark.parametrize(
    "name, end",
    [
        ("bytes", "<|endoftext|>"),
        (a_tokenizer(), "</s>"),
        (a_tokenizer(byte_level=False), "</s>"),
    ],
    ids=["bytes", "level", "pieces"],
)
def test_tokens_become_the_text_again_as_they_come(name, end):
    encoding = tokenizer.get_encoding(name)
    stream = tokenizer.TextStream(encoding)
    text = " def f():\r\n\n\treturn 'é日本'  \n\na </s> <|endoftext|>"
    assert "".join(map(stream.step, encoding.encode_ordinary(text))) == text
    assert len(encoding.encode_ordinary(end)) > 1, "text that looks special is text"
    assert stream.step(encoding.eot_token) == end
    half, _ = encoding.encode_ordinary("é")
    line, a = encoding.encode_ordinary("\na")
    steps = [stream.step(token) for token in (line, half, a, half, 10**6, half)]
    assert steps == ["\n", "", "\ufffda", "", "\ufffd?", ""]
    assert stream.end() == "\ufffd" and stream.end() == ""
    assert encoding.encode_ordinary("a \udcff") == encoding.encode_ordinary("a \ufffd")


def test_a_tokenizer_is_a_name_or_a_folder_or_a_model_on_the_hub_or_refused(monkeypatch):
    for name in "bytes", "gpt2":
        assert tokenizer.read_tokenizer(name) == name
    made = a_tokenizer()
    write("model/tokenizer.json", made["json"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: f"model/{name}/..")
    Path("model/owner").mkdir()
    for end in ("</s>", {"content": "</s>", "special": True}):
        write("model/tokenizer_config.json", json.dumps({"eos_token": end}))
        assert tokenizer.read_tokenizer("model") == tokenizer.read_tokenizer("owner") == made

    for file, content, words in (
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "model.*<end>"),
        ("tokenizer_config.json", "{}", "model.*eos_token"),
        ("tokenizer.json", "{}", "model"),
    ):
        write(f"model/{file}", content)
        refuses(words, tokenizer.read_tokenizer, "model")
    refuses("no tokenizer", tokenizer.get_encoding, None)
    refuses("gpt0", tokenizer.get_encoding, "gpt0")
    refuses("cannot use", tokenizer.get_encoding, {"json": "{}", "eot_token": 0})


@pytest.mark.parametrize(
    "template, front", [("$A", []), ("<s> $A", [256]), ("<s> $A </s>", [256]), ("$A </s>", [])]
)
def test_a_template_is_once_in_front_of_a_document_and_never_behind(template, front):
    plain = tokenizer.get_encoding(a_tokenizer())
    ends = [f"{begin * 2**17}\n{end}" for begin in "ab" for end in "ab"]  # each of two parts
    some = ["a" * 2**16, *ends]
    for i, text in enumerate([*some, some[2]]):
        write(f"texts/{i}.txt", text)
    right = [[*front, *plain.encode_ordinary(text), 257] for text in some]
    found = sum(prepared("texts", 0, a_tokenizer(template)), [])
    assert found == sum(right, []) != sum(prepared("texts"), [])
