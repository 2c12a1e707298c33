"""CSV and Parquet: what is read, and the line or row of what cannot be read."""

import datetime
import decimal
import io
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from core.errors import BadRequest
from core.ml.formats import repair, validate
from core.ml.formats.files import tables
from core.ml.formats.files.rows import Limits, Row
from tests.core.formats.given import LIMIT, problems, read_all, rows_of


def table(data: bytes, limit: int = LIMIT) -> list[Row]:
    return rows_of(data, "csv", limit)


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


def test_the_separator_may_stand_behind_a_line_break_in_a_name() -> None:
    data = b'\n"Frage\n(de, kurz)";"Ant\nwort"\na;b\n"c\nd";e\n'
    expected = [(5, "a", "b"), (6, "c\nd", "e")]
    assert [(row.line, *row.values.values()) for row in read_all(data)] == expected
    assert list(read_all(data)[0].values) == ["Frage\n(de, kurz)", "Ant\nwort"]
    assert [row.line for row in table(b'5" disk,name\na,b\nc,d\n')] == [2, 3]


def test_blank_lines_before_the_header_are_passed_over() -> None:
    assert [(row.line, row.values) for row in table(b"\xef\xbb\xbf\r\n\n a;b\n1;2\n")] == [
        (4, {"a": "1", "b": "2"})
    ]
    assert problems(table(b"\n\na,a\n1,2\n")) == [(3, "invalid_header")]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_header_says_the_separator(mark: str) -> None:
    data = '"x,y;z",b\n"1,5;|\t","2"\n'.replace('",', f'"{mark}').encode()
    assert [row.values for row in table(data)] == [{"x,y;z": "1,5;|\t", "b": "2"}]


@pytest.mark.parametrize(
    "header", [b"a,b,a", b"a, a", b"a,,b", b",".join(b"c%d" % i for i in range(Limits().columns + 1))]
)
def test_csv_header_names_each_column_once(header: bytes) -> None:
    assert problems(table(header + b"\n1,2,3\n", limit=100_000)) == [(1, "invalid_header")]


@pytest.mark.parametrize(
    ("header", "words", "hint"),
    [
        (b",question,answer", "Column 1 of the header has no name", "index=False"),
        (b"sep=;\nquestion;answer", "Excel", "Remove it"),
        (b"question,note;answer", '"," and ";"', "double quotes"),
        (b"'question','answer'", "'question'", "double quotes"),
        (b'question, "the answer"', "the answer", "space"),
    ],
)
def test_a_header_that_cannot_be_told_says_what_to_do(header: bytes, words: str, hint: str) -> None:
    (found,) = read_all(header + b"\n1,2,3\n")
    assert found.problem is not None
    assert found.problem.code == "invalid_header"
    assert words in found.problem.message
    assert hint in (found.problem.hint or "")


def test_a_space_before_a_quotation_mark_is_an_error_and_a_quoted_one_is_text() -> None:
    found = table(b'a,b\nx, "an answer"\n" x"," ""yes"""\n "x",y\n"1\n2", "z"\n')
    assert problems(found) == [(2, "invalid_csv"), (4, "invalid_csv"), (5, "invalid_csv")]
    assert found[0].problem is not None
    assert 'Column "b" has a space before its quotation mark' in found[0].problem.message
    assert found[1].values == {"a": " x", "b": ' "yes"'}


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        (b'"never closed,b\n', "invalid_csv", "unexpected end"),
        (b'"closed"too early,b\n', "invalid_csv", "expected after"),
        (b"caf\xe9,b\n", "not_utf8", "not UTF-8"),
        (b"x" * (LIMIT + 1) + b",b\n", "invalid_csv", "longer than"),
        (b'"' + b"line\n" * LIMIT + b'",x\n', "invalid_csv", "longer than"),
        (b"a\x00b,c\n", "invalid_text", "NUL"),
        (b"a,b\rc,d\r", "invalid_csv", "CR alone"),
    ],
)
def test_csv_that_cannot_be_read_names_the_line(row: bytes, code: str, words: str) -> None:
    found = table(b"prompt,completion\n1,2\n3,4\n" + row)
    assert problems(found) == [(4, code)]
    assert found[2].problem is not None
    assert words in found[2].problem.message
    assert [row.values for row in found[:2]] == [
        {"prompt": "1", "completion": "2"},
        {"prompt": "3", "completion": "4"},
    ]


def test_a_csv_record_of_many_short_fields_is_bounded_too() -> None:
    endless = io.BytesIO(b"a,b\n" + b'"\n",' * 1_000_000)
    assert problems(list(tables.csv_rows(endless, Limits(line_bytes=LIMIT)))) == [(2, "invalid_csv")]
    assert endless.tell() < 10_000


# ---- Parquet


def packed(columns: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    made = pa.table(columns) if isinstance(columns, dict) else columns
    parquet.write_table(made, buffer, **options)
    return buffer.getvalue()


def test_parquet_rows_are_counted_and_hold_what_json_would() -> None:
    columns = {
        "text": ["a", None],
        "messages": [[{"role": "user", "content": "x", "name": None}], []],
        "exact": [decimal.Decimal("1.10"), None],
        "day": [datetime.date(2024, 2, 29), None],
        "bytes": ["é".encode(), None],
        "number": [1.5, float("nan")],
    }
    found = read_all(packed(columns))
    assert [row.line for row in found] == [1, 2]
    assert found[0].values == {
        "text": "a",
        "messages": [{"role": "user", "content": "x"}],
        "exact": "1.10",
        "day": "2024-02-29",
        "bytes": "é",
        "number": 1.5,
    }
    assert found[1].values == {"messages": []}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("a\0b", "invalid_text"),
        ([b"\xff"], "not_utf8"),
        ("x" * 2000, "line_too_long"),
        ([[[[["deep"]]]]], "too_deep"),
        ([["a\0"]], "invalid_text"),
        ({"a": {"b": "x" * 2000}}, "line_too_long"),
    ],
)
def test_a_parquet_row_that_is_refused_does_not_end_the_file(value: Any, code: str) -> None:
    empty = {str: "good", bytes: b"good", list: [], dict: {"a": {"b": "good"}}}[type(value)]
    found = read_all(packed({"text": [empty, value, empty]}), Limits(line_bytes=1000, depth=4))
    assert problems(found) == [(2, code)]
    assert len(found) == 3


def one_name_twice() -> Any:
    return pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"])


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(lambda: pa.array([1, 2**62], pa.timestamp("us")), id="timestamp"),
        pytest.param(lambda: pa.array([1, 2**30], pa.date32()), id="date"),
        pytest.param(lambda: pa.array([1, 2**60], pa.time64("us")), id="time"),
        pytest.param(lambda: pa.array([1, 2**62], pa.duration("s")), id="duration"),
        pytest.param(lambda: pa.array([1, 1], pa.timestamp("us", tz="Mars/Olympus")), id="time zone"),
        pytest.param(one_name_twice, id="a field twice"),
    ],
)
def test_a_value_that_cannot_be_read_is_an_error_only_where_somebody_reads_it(column: Any) -> None:
    data = packed({"prompt": ["a", "b"], "completion": ["c", "d"], "odd": column()})
    unread = validate.inspect(io.BytesIO(data))
    assert (unread.rows, unread.error_count) == (2, 0)
    read = validate.inspect(io.BytesIO(data), mapping={"prompt": "{prompt}", "completion": "{odd}"})
    assert read.error_count >= 1
    assert read.errors[-1]["row"] == 2
    assert '"odd" is' in read.errors[-1]["message"]
    target = io.BytesIO()
    bad = packed({"prompt": ["a", "b"], "completion": [None, "d"], "odd": column()})
    found = repair.examine(io.BytesIO(bad), target, kind="auto", mapping=None, filename="", limits=Limits())
    assert found.repair is not None
    assert b'"prompt": "b"' in target.getvalue()


def test_nanoseconds_are_read() -> None:
    moments = pa.array([10**18, 10**18 + 1], pa.timestamp("ns"))
    found = read_all(packed({"at": moments}))
    assert [row.values for row in found] == [
        {"at": "2001-09-09 01:46:40"},
        {"at": "2001-09-09 01:46:40.000000001"},
    ]


def refused(data: bytes, limits: Limits | None = None) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read_all(data, limits)
    return caught.value


def test_parquet_that_is_damaged_is_refused() -> None:
    data = packed({"text": ["a", "b"] * 1000})
    for broken in (data[:-20], data[: len(data) // 2], b"PAR1", b"PAR1" + b"\0" * 50 + b"PAR1"):
        assert refused(broken).code == "unsupported_file"
    turned = bytearray(data)
    turned[10:40] = b"\xff" * 30
    assert refused(bytes(turned)).code == "unsupported_file"


def test_parquet_columns_are_bounded_and_named_once() -> None:
    assert refused(packed({"a": [1], "b": [1], "c": [1]}), Limits(columns=2)).code == "too_many_columns"
    twice = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    assert refused(packed(twice)).code == "invalid_header"


def test_what_a_parquet_file_says_of_its_size_is_looked_at_first() -> None:
    texts = {"text": ["x" * 1_000_000] * 100}
    bomb = packed(texts, compression="zstd", use_dictionary=False)
    assert "times its size" in refused(bomb).message
    assert refused(bomb, Limits(unpacked_bytes=10_000_000)).code == "file_too_large"


def test_bytes_that_are_no_text_are_left_to_who_reads_them() -> None:
    assert read_all(packed({"picture": [b"\xff"]}))[0].values == {"picture": b"\xff"}


def test_a_text_that_many_rows_share_is_counted_in_every_row() -> None:
    error = refused(packed({"text": ["x" * 1000] * 1000}), Limits(unpacked_bytes=100_000))
    assert (error.code, error.status) == ("file_too_large", 413)


def test_a_long_text_in_a_parquet_dictionary_is_not_unpacked_many_times() -> None:
    text = "x" * 20_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 8, pa.int32()), pa.array([text]))
    before = pa.total_allocated_bytes()
    buffer = io.BytesIO(packed(pa.table({"text": column})))
    peak = 0
    for row in tables.parquet_rows(buffer, Limits()):
        assert row.problem is not None
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 100_000_000
