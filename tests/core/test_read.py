"""Files to rows: what is read, and the physical line of what cannot be read."""

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.formats import read
from core.ml.formats.read import FileType, Row

GOOD = b'{"prompt": "a", "completion": "b"}'
LIMIT = 1024


def jsonl(data: bytes, limit: int = LIMIT) -> list[Row]:
    return rows(data, "jsonl", limit)


def table(data: bytes, limit: int = LIMIT) -> list[Row]:
    return rows(data, "csv", limit)


def rows(data: bytes, kind: FileType, limit: int) -> list[Row]:
    return list(read.rows(io.BytesIO(data), kind, line_max_bytes=limit))


def problems(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.problem[0]) for row in found if row.problem is not None]


# ---- JSON Lines


def test_jsonl_takes_bom_crlf_blank_lines_and_no_final_newline() -> None:
    found = jsonl(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD + b"\n\n" + GOOD)
    assert [row.line for row in found] == [1, 4, 6]
    assert all(row.values == {"prompt": "a", "completion": "b"} for row in found)


def test_a_broken_line_in_the_middle_is_named_by_its_physical_line() -> None:
    found = jsonl(GOOD + b"\n\n" + b'{"prompt": "a", \n' + GOOD + b"\n")
    assert problems(found) == [(3, "invalid_json")]
    assert [row.line for row in found] == [1, 3, 4]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"prompt": NaN, "completion": "b"}', "invalid_json"),
        (b'{"prompt": -Infinity, "completion": "b"}', "invalid_json"),
        (b'{"prompt": 1e999, "completion": "b"}', "invalid_json"),
        (b'{"prompt": "a\\u0000b", "completion": "b"}', "invalid_text"),
        (b'{"prompt": "a\x00b", "completion": "b"}', "invalid_json"),
        (b'{"prompt": "\\ud83d", "completion": "b"}', "invalid_text"),
        (b'{"prompt": "\\uDE00\\uD83D", "completion": "b"}', "invalid_text"),
        (b'{"\\udead": 1}', "invalid_text"),
        (b'{"prompt": ' + b"7" * 5000 + b', "completion": "b"}', "invalid_json"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "not_utf8"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "not_utf8"),
        (b'["prompt", "completion"]', "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"12", "not_an_object"),
        (b"null", "not_an_object"),
        (b"{} {}", "invalid_json"),
        (b"{'prompt': 'a'}", "invalid_json"),
    ],
)
def test_what_is_no_row_says_why(line: bytes, code: str) -> None:
    found = jsonl(GOOD + b"\n" + line + b"\n" + GOOD + b"\n", limit=10_000)
    assert problems(found) == [(2, code)]
    assert [row.line for row in found] == [1, 2, 3]


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_five_thousand_levels_of_nesting_are_one_broken_line(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    deep = b'{"prompt": ' + opening * 5000 + b"1" + closing * 5000 + b"}"
    found = jsonl(GOOD + b"\n" + deep + b"\n" + GOOD + b"\n", limit=100_000)
    assert [line for line, _ in problems(found)] == [2]
    assert problems(found)[0][1] in ("invalid_json", "too_deep")
    assert [row.line for row in found] == [1, 2, 3]


def test_nesting_is_bounded() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert problems(jsonl(nested(read.MAX_DEPTH))) == []
    assert problems(jsonl(nested(read.MAX_DEPTH + 1))) == [(1, "too_deep")]


def test_whole_surrogate_pairs_and_written_escapes_are_text() -> None:
    found = jsonl(b'{"a": "\\ud83d\\ude00"}\n' + rb'{"a": "\\ud83d and C:\\ud"}')
    assert [row.values for row in found] == [{"a": "😀"}, {"a": "\\ud83d and C:\\ud"}]


def test_a_backslash_followed_by_u0000_is_text_and_no_nul() -> None:
    line = json.dumps({"prompt": r"What is \u0000 in JSON?", "completion": "NUL"}).encode()
    assert jsonl(line)[0].values == {"prompt": r"What is \u0000 in JSON?", "completion": "NUL"}


def row_of(size: int) -> bytes:
    """A JSON line of exactly `size` bytes."""
    return b'{"a": "' + b"x" * (size - 9) + b'"}'


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(ending: bytes) -> None:
    assert problems(jsonl(GOOD + b"\n" + row_of(LIMIT) + ending)) == []
    assert problems(jsonl(GOOD + b"\n" + row_of(LIMIT + 1) + ending)) == [(2, "line_too_long")]


@pytest.mark.parametrize("times", [2, 3, 10])
def test_lines_after_a_too_long_one_keep_their_numbers(times: int) -> None:
    found = jsonl(GOOD + b"\n" + row_of(LIMIT * times) + b"\n" + GOOD + b"\nbroken\n")
    assert problems(found) == [(2, "line_too_long"), (4, "invalid_json")]


def test_a_too_long_first_line_after_a_bom_is_one_line() -> None:
    found = jsonl(b"\xef\xbb\xbf" + row_of(LIMIT * 2) + b"\n" + GOOD + b"\nbroken\n")
    assert problems(found) == [(1, "line_too_long"), (3, "invalid_json")]


# ---- CSV


def test_csv_takes_bom_crlf_quotes_and_unicode() -> None:
    data = '\ufeffprompt,completion\r\n"say ""hi"", now",ja\r\nZürich,"été, 東京"\r\n'.encode()
    assert [(row.line, row.values) for row in table(data)] == [
        (2, {"prompt": 'say "hi", now', "completion": "ja"}),
        (3, {"prompt": "Zürich", "completion": "été, 東京"}),
    ]


def test_csv_lines_are_physical_where_a_field_holds_line_breaks() -> None:
    data = b'prompt,completion\n"one\ntwo\nthree",x\n\na,b,c\n"four\r\nfive",y\nlonely\n'
    found = table(data)
    assert [row.line for row in found] == [2, 6, 7, 9]
    assert found[0].values == {"prompt": "one\ntwo\nthree", "completion": "x"}
    assert found[2].values == {"prompt": "four\r\nfive", "completion": "y"}
    assert problems(found) == [(6, "wrong_number_of_fields"), (9, "wrong_number_of_fields")]


def test_csv_header_with_a_line_break_moves_the_rows() -> None:
    assert [row.line for row in table(b'"a\nb",c\n1,2\n')] == [3]


@pytest.mark.parametrize(
    "header", [b"a,b,a", b"a, a", b"a,,b", b",".join(b"c%d" % i for i in range(read.MAX_COLUMNS + 1))]
)
def test_csv_header_names_each_column_once(header: bytes) -> None:
    assert problems(table(header + b"\n1,2,3\n", limit=100_000)) == [(1, "invalid_header")]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (b'"never closed,b\n', "invalid_csv"),
        (b'"closed"too early,b\n', "invalid_csv"),
        (b"caf\xe9,b\n", "not_utf8"),
        (b"x" * (LIMIT + 1) + b",b\n", "invalid_csv"),
        (b"a\x00b,c\n", "invalid_text"),
    ],
)
def test_csv_that_cannot_be_read_names_the_line(row: bytes, code: str) -> None:
    found = table(b"prompt,completion\n1,2\n3,4\n" + row)
    assert problems(found) == [(4, code)]
    assert [row.values for row in found[:2]] == [
        {"prompt": "1", "completion": "2"},
        {"prompt": "3", "completion": "4"},
    ]


def test_a_csv_field_larger_than_the_line_limit_is_refused() -> None:
    data = b'a,b\n"' + b"line\n" * LIMIT + b'",x\n'
    assert problems(table(data)) == [(2, "invalid_csv")]


# ---- Kinds of files


def kind_of(data: bytes, tmp_path: Path) -> FileType:
    file = tmp_path / "file"
    file.write_bytes(data)
    return read.file_type(file)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (GOOD, "jsonl"),
        (b"\xef\xbb\xbf\n\n  " + GOOD, "jsonl"),
        (b"a,b\n1,2", "csv"),
        (b"\xef\xbb\xbfa,b\r\n1,2", "csv"),
        (b'"a","b"\n1,2', "csv"),
        (b"oops\n" + GOOD, "jsonl"),
        (b"\n" * 5000 + GOOD, "jsonl"),
    ],
)
def test_the_content_says_which_kind_a_file_is(data: bytes, kind: str, tmp_path: Path) -> None:
    assert kind_of(data, tmp_path) == kind


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", GOOD)
    return buffer.getvalue()


def wrong_kinds() -> list[Any]:
    return [
        pytest.param(gzip.compress(GOOD), "gzip", id="gzip"),
        pytest.param(zip_file(), "zip", id="zip"),
        pytest.param(b"PAR1\x15\x04\x15" + b"\x00" * 50 + b"PAR1", "Parquet", id="parquet"),
        pytest.param(pickle.dumps({"a": 1}, protocol=4), "pickle", id="pickle 4"),
        pytest.param(pickle.dumps({"a": 1}, protocol=5), "pickle", id="pickle 5"),
        pytest.param(pickle.dumps({"a": 1}, protocol=2), "binary", id="pickle 2"),
        pytest.param(b"<!DOCTYPE html>\n<title>Log in, please</title>", "HTML", id="doctype"),
        pytest.param(b"  <html lang=en>, hello", "HTML", id="html"),
        pytest.param(b'[\n{"a": 1},\n{"a": 2}\n]', "array", id="array"),
        pytest.param(b"\x7fELF\x02\x01\x01\x00\x00", "binary", id="binary"),
        pytest.param("a,b\n1,2\n".encode("utf-16"), "binary", id="utf-16"),
    ]


@pytest.mark.parametrize(("data", "what"), wrong_kinds())
def test_other_kinds_are_refused_by_name(data: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        kind_of(data, tmp_path)
    assert caught.value.code == "unsupported_file"
    assert what in caught.value.message
    assert caught.value.param == "file"


@pytest.mark.parametrize("data", [b"", b"\n \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_rows_is_empty(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        kind_of(data, tmp_path)
    assert caught.value.code == "empty_file"
