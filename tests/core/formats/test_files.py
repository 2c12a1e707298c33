"""Which kind a file is, by its content; packed files; and the bounds of a whole file."""

import collections
import datetime
import gzip
import io
import json
import pickle
import time
import zipfile
import zlib
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from core.errors import BadRequest
from core.ml.formats import validate
from core.ml.formats.files import detect, read
from core.ml.formats.files.rows import Limits
from tests.core.formats.given import GOOD, problems, read_all


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (GOOD, "jsonl"),
        (b"\xef\xbb\xbf\n\n  " + GOOD, "jsonl"),
        (b"\n" * 5000 + GOOD, "jsonl"),
        (b"oops\n" + GOOD, "jsonl"),
        (b'"prompt": "a", "completion": "b"}\n' + GOOD, "jsonl"),
        (b'{"prompt": "a\x00b", "completion": "b"}\n', "jsonl"),
        (b'[\n{"a": 1},\n{"a": 2}\n]', "json"),
        (b"\xef\xbb\xbf [", "json"),
        (b"a,b\n1,2", "csv"),
        (b"\xef\xbb\xbfa,b\r\n1,2", "csv"),
        (b'"a","b"\n1,2', "csv"),
        (b"question;answer\n1;2", "csv"),
        (b"question\tanswer\n1\t2", "csv"),
        (b"text\nhello\n", "csv"),
        (b"category\ncard\nlost\n", "csv"),
        (b"ORCID,name\n1,2\n", "csv"),
        (b"1,2\n3,4\n", "csv"),
        (b"2024,answer\n1,2\n", "csv"),
        (b"-a,b\n1,2\n", "csv"),
        (b"(a),b\n1,2\n", "csv"),
        (b"'a','b'\n'1','2'\n", "csv"),
        ("имя\nимя\n".encode(), "csv"),
        (b'a,b\n{"a":1},x\n', "csv"),
        (b"ORC,FEA1\n1,2\n", "csv"),
        (b"oops\noops\n" + GOOD, "jsonl"),
        (b"// made, by hand\n" + GOOD + b",\n" + GOOD + b",\n", "jsonl"),
        (b"oops\n{'prompt': 'a', 'completion': 'b'}\n", "jsonl"),
        (b'oops, this\n{"prompt": "' + b"x" * 5000 + b'"}\n', "jsonl"),
        (b'"prompt": "a", "completion": "b"}\n{broken\n', "jsonl"),
        (b'"one, two"\n"three"\n', "jsonl"),
        (b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD, "jsonl"),
        (b"\xef\xbb\xbf\xef\xbb\xbf[" + GOOD + b"]", "json"),
        (b'{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n', "jsonl"),
        (b'{"data": [{"a": 1}\n{"data": [{"a": 2}]}\n', "jsonl"),
        (b'{\n "messages": [\n  {"role": "user"}\n ]\n}\n', "jsonl"),
        (b"PAR1", "parquet"),
        (b"content\nfoo\n(bar baz)\n", "csv"),
        (b"comment\nfine\n(Very good)\n(test).", "csv"),
        (b"c\np1\np2\n(text)\n", "csv"),
        (b'prompt\tcompletion\n{"q": "v"}\t{"k": "v"}\n', "csv"),
        (b'prompt,completion\n{"q": "v"},{"k": "v"}\n', "csv"),
        (b'prompt\tcompletion\n{"q": "' + b"x" * 5000 + b'"}\tb\n', "csv"),
        (b'prompt,completion\n{"q": "' + b"x" * 5000 + b'"},b\n', "csv"),
        (b"prompt,completion\n{'prompt': 'a', 'completion': 'b'}\n", "jsonl"),
        (b'"Die Frage\n(de)";"Antwort"\na;b\n', "csv"),
        (b'"prompt": "a, "completion": "b"}\n' + GOOD, "jsonl"),
    ],
)
def test_the_content_says_which_kind_a_file_is(data: bytes, kind: str) -> None:
    assert read.identify(io.BytesIO(data)) == (kind, False)
    assert read.identify(io.BytesIO(gzip.compress(data))) == (kind, True)


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", GOOD)
    return buffer.getvalue()


def wrong_kinds() -> list[Any]:
    tar = b"data.jsonl".ljust(257, b"\0") + b"ustar\x0000"
    return [
        pytest.param(zip_file(), "zip", id="zip"),
        pytest.param(pickle.dumps({"a": 1}, protocol=4), "pickle", id="pickle 4"),
        pytest.param(pickle.dumps({"a": 1}, protocol=2), "pickle", id="pickle 2"),
        pytest.param(pickle.dumps({"a": 1}, protocol=1), "pickle", id="pickle 1"),
        pytest.param(b"cos\nsystem\n(S'id'\ntR.", "pickle", id="pickle 0"),
        pytest.param(pickle.dumps(collections.OrderedDict(a=1), 0), "pickle", id="pickle 0 of a dict"),
        pytest.param(pickle.dumps(datetime.date(2024, 1, 1), 0), "pickle", id="pickle 0 of a date"),
        pytest.param(pickle.dumps(Limits(), 0), "pickle", id="pickle 0 of an object"),
        pytest.param(pickle.dumps(Limits, 0), "pickle", id="pickle 0 of a class"),
        pytest.param(b"<!DOCTYPE html>\n<title>Log in, please</title>", "HTML", id="doctype"),
        pytest.param(b"  <html lang=en>, hello", "HTML", id="html"),
        pytest.param(b"<p>Access denied, sorry</p>", "HTML", id="paragraph"),
        pytest.param(b'<?xml version="1.0"?><Error/>', "HTML or XML", id="xml"),
        pytest.param(b"\x7fELF\x02\x01\x01\x00\x00", "program", id="program"),
        pytest.param(b"\x01\x00\xfe\xff", "binary", id="binary"),
        pytest.param("a,b\n1,2\n".encode("utf-16"), "UTF-16", id="utf-16"),
        pytest.param('{"a": 1}'.encode("utf-16-le"), "UTF-16", id="utf-16 without a mark"),
        pytest.param("a,b\n".encode("utf-32"), "UTF-32", id="utf-32"),
        pytest.param('{"a": 1}'.encode("utf-32-le"), "UTF-32", id="utf-32-le without a mark"),
        pytest.param("a,b\n".encode("utf-32-be"), "UTF-32", id="utf-32-be without a mark"),
        pytest.param(b"RIFF\x24\0\0\0WEBPVP8 ", "picture", id="webp"),
        pytest.param(b"ORC\n\x0b\0\0", "ORC", id="orc"),
        pytest.param(b"FEA1\0\0\0\0", "Feather", id="feather"),
        pytest.param("Привет всем\n".encode(), "plain text", id="prose in Russian"),
        pytest.param(b'{\n "rows": [\n  {"a": 1}\n ]\n}', '"rows"', id="object with rows"),
        pytest.param(
            b'{"v": "1", "n": 2,\n"data": [\n{"a": 1},\n{"a": 2}\n]}', '"data"', id="object with data"
        ),
        pytest.param(b'\x20\0\0\0\0\0\0\0{"w": {}}', "safetensors", id="safetensors"),
        pytest.param(tar, "tar", id="tar"),
        pytest.param(b"SQLite format 3\0", "SQLite", id="sqlite"),
        pytest.param(b"# Title\n\nSome words.\n", "plain text", id="markdown"),
    ]


@pytest.mark.parametrize(("data", "what"), wrong_kinds())
def test_other_kinds_are_refused_by_name(data: bytes, what: str) -> None:
    for packed in (data, gzip.compress(data)):
        with pytest.raises(BadRequest) as caught:
            read.identify(io.BytesIO(packed))
        assert caught.value.code == "unsupported_file"
        assert what in caught.value.message
        assert caught.value.param == "file"
        assert caught.value.hint


@pytest.mark.parametrize("data", [b"Customer review\nGood food\n", b'"Customer review"\n"Good food"\n'])
def test_a_single_column_whose_name_holds_a_space_says_what_to_do(data: bytes) -> None:
    try:
        hint = read_all(data)[0][2][2]  # type: ignore[index]
    except BadRequest as error:
        hint = error.hint
    assert "a name without spaces" in str(hint)


@pytest.mark.parametrize("data", [b"", b"\n \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_rows_is_empty(data: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        read.identify(io.BytesIO(data))
    assert caught.value.code == "empty_file"


@pytest.mark.parametrize(
    ("name", "kind", "packed", "said"),
    [
        ("a.jsonl", "jsonl", False, None),
        ("a.v1.ndjson", "jsonl", False, None),
        ("a.jsonl.gz", "jsonl", True, None),
        ("a.gz", "json", True, None),
        ("A.PARQUET", "parquet", False, None),
        ("", "csv", False, None),
        ("rows", "csv", False, None),
        ("a.json", "jsonl", False, "JSON Lines"),
        ("a.csv", "json", False, "a JSON array"),
        ("a.jsonl", "jsonl", True, "packed with gzip"),
        ("a.jsonl.gz", "jsonl", False, "JSON Lines"),
    ],
)
def test_a_name_that_says_something_else_is_told(
    name: str, kind: Any, packed: bool, said: str | None
) -> None:
    words = detect.name_mismatch(name, kind, packed)
    assert (words is None) if said is None else (words is not None and said in words)


# ---- gzip


def refused(data: bytes, limits: Limits | None = None) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read_all(data, limits)
    return caught.value


def test_a_packed_file_is_read_as_if_it_were_not() -> None:
    assert [row.line for row in read_all(gzip.compress(GOOD + b"\n\n" + GOOD))] == [1, 3]
    members = gzip.compress(GOOD + b"\n") + gzip.compress(GOOD + b"\n")
    assert [row.line for row in read_all(members)] == [1, 2]


def test_a_gzip_bomb_is_refused_long_before_it_is_unpacked() -> None:
    packer = zlib.compressobj(9, wbits=31)
    zeros = b" " * 1024**2
    bomb = (
        packer.compress(GOOD + b"\n") + b"".join(packer.compress(zeros) for _ in range(300)) + packer.flush()
    )
    error = refused(bomb)
    assert error.code == "unsupported_file"
    assert "times its size" in error.message


def test_the_unpacked_size_is_bounded() -> None:
    error = refused(gzip.compress((GOOD + b"\n") * 1000), Limits(unpacked_bytes=10_000))
    assert (error.code, error.status) == ("file_too_large", 413)


@pytest.mark.parametrize("cut", [8, 30, 200])
def test_a_gzip_file_that_is_cut_short_says_after_which_line(cut: int) -> None:
    lines = b"".join(b'{"prompt": "%d", "completion": "b"}\n' % (i * 7919) for i in range(100_000))
    error = refused(gzip.compress(lines)[:-cut])
    assert error.code == "damaged_file"
    assert "after line 9" in error.message


def test_a_gzip_file_with_a_wrong_checksum_is_damaged() -> None:
    packed = bytearray(gzip.compress(GOOD * 3))
    packed[-6] ^= 1
    assert refused(bytes(packed)).code == "damaged_file"
    assert refused(b"\x1f\x8b\x08\x00").code == "damaged_file"
    assert refused(gzip.compress(GOOD + b"\n") + b"something else").code == "damaged_file"


def test_gzip_in_gzip_is_refused_by_name() -> None:
    error = refused(gzip.compress(gzip.compress(GOOD)))
    assert error.code == "unsupported_file"
    assert "gzip file inside a gzip file" in error.message


def test_parquet_in_gzip_is_read() -> None:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), buffer)
    assert [row.values for row in read_all(gzip.compress(buffer.getvalue()))] == [json.loads(GOOD)]


# ---- Bounds


def test_rows_are_bounded() -> None:
    assert len(read_all((GOOD + b"\n") * 3, Limits(rows=3))) == 3
    error = refused((GOOD + b"\n") * 4, Limits(rows=3))
    assert (error.code, error.status) == ("too_many_rows", 413)


@pytest.mark.parametrize("open_", [b"%s\n", b"[%s]"])
def test_columns_and_nesting_of_a_row_are_bounded(open_: bytes) -> None:
    wide, deep = b'{"a": 1, "b": 2, "c": 3}', b'{"a": [[[1]]]}'
    assert problems(read_all(open_ % wide, Limits(columns=2))) == [(1, "too_many_columns")]
    assert problems(read_all(open_ % deep, Limits(depth=3))) == [(1, "too_deep")]
    assert problems(read_all(open_ % deep, Limits(depth=4))) == []


def test_a_bomb_of_good_rows_is_refused_before_they_are_read() -> None:
    packed = gzip.compress(GOOD.ljust(63) + b"\n", 9) + gzip.compress((GOOD.ljust(63) + b"\n") * 3_000_000, 9)
    began = time.process_time()
    with pytest.raises(BadRequest, match="200 times"):
        validate.inspect(io.BytesIO(packed))
    assert time.process_time() - began < 5  # its rows take half a minute
