"""CSV and Parquet."""

import datetime
import gzip
import io
import json
import math
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.corpus.case import LINE_BYTES, UNPACKED_BYTES, Bad, Case, answer, bad, good, line, pair, user

_HEAD = b"prompt,completion\n"


def _csv(name: str, content: bytes, rows: int, *warnings: str, kind: str = "prompt_completion") -> Case:
    return good(name, content, rows, kind, *warnings, filename="rows.csv")


def _bad_csv(name: str, content: bytes, code: str, at: int | None, word: str, count: int = 1) -> Case:
    return bad(name, content, code, at, word, count=count, filename="rows.csv")


def _packed(table: "pa.Table | list[dict[str, Any]]", **how: Any) -> bytes:
    if isinstance(table, list):
        table = pa.Table.from_pylist(table)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **how)
    return buffer.getvalue()


def _parquet(
    name: str, table: "pa.Table | list[dict[str, Any]]", rows: int, kind: str, *warnings: str
) -> Case:
    return good(name, _packed(table), rows, kind, *warnings, filename="rows.parquet")


def _bad_parquet(name: str, content: bytes, code: str, row: int | None, word: str, count: int = 1) -> Case:
    return bad(name, content, code, row, word, count=count, filename="rows.parquet")


def _bomb() -> bytes:
    """A text of 200 kB, kept once and told a thousand times."""
    text = "x" * (LINE_BYTES - 10_000)
    count = UNPACKED_BYTES // len(text) + 200
    return _packed(
        pa.table({"prompt": pa.array([text] * count), "completion": pa.array(["an answer"] * count)})
    )


_PAIRS = [pair(1), pair(2), pair(3)]
_GOOD = _packed(_PAIRS)
_TWICE = pa.Table.from_arrays(
    [pa.array(["a"]), pa.array(["b c"]), pa.array(["d e"])], ["prompt", "completion", "completion"]
)
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_CALLED = [
    user(),
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": "ok", "tool_call_id": "c1"},
    answer(),
]

_CSV = [
    _csv("comma", _HEAD + b"a,b c\nd,e f\n", 2),
    _csv("semicolon", b"prompt;completion\na, b;c d\ne;f, g\n", 2),
    _csv("tab", b"prompt\tcompletion\na, b\tc d\ne\tf; g\n", 2),
    _csv("bar", b"prompt|completion\na, b|c d\ne|f g\n", 2),
    _csv("CRLF, byte order mark, blank lines", b"\xef\xbb\xbfprompt,completion\r\n\r\na,b c\r\n\r\nd,e f\r\n", 2),
    _csv("no final line end", _HEAD + b"a,b c\nd,e f", 2),
    _csv("quotes and line breaks", _HEAD + b'"a\nb, c","he said ""hi""\n\nyes"\nd,e f\n', 2),
    _csv("quoted header", b'"prompt", completion \na,b c\nd,e f\n', 2),
    _bad_csv("space after a quote in the header", b'"prompt" ,"completion"\na,b c\n', "invalid_csv", 1, "quotation mark"),
    _csv("conversations in a column", b'messages\n"' + json.dumps([user(), answer()]).replace('"', '""').encode() + b'"\n', 1, "single_row", kind="messages"),
    _csv("one column", b"text\na b\nc d\n", 2, kind="text"),
    _csv("objects in cells without quotes", b'prompt\tcompletion\n{"q": "v"}\t{"k": "v w"}\n', 1, "single_row"),
    _csv("a long object in a cell", b'prompt\tcompletion\n{"q": "' + b"x" * 5000 + b'"}\ta b\n', 1, "single_row"),
    _csv("line break in the header", b'"prompt\n";"completion"\na;c d\ne;g h\n', 2),
    _bad_csv("a list as Python prints it", b"messages\n\"" + str([user(), answer()]).encode() + b"\"\n", "invalid_json", 2, "messages"),
    _csv("empty cells", _HEAD + b"a,\n,b c\n", 2, "empty_answers"),
    good("table under another name", _HEAD + b"a,b c\nd,e f\n", 2, "prompt_completion", "name_mismatch"),
    good("table in gzip", gzip.compress(_HEAD + b"a,b c\nd,e f\n"), 2, "prompt_completion", filename="rows.csv.gz"),
    _bad_csv("row too short after line breaks", _HEAD + b'"a\n\nb","c d"\nalone\nd,e f\n', "wrong_number_of_fields", 5, "1 field"),
    _bad_csv("rows too long", _HEAD + b"a,b,c\nd,e f\ng,h,i,j\n", "wrong_number_of_fields", 2, "3 fields", 2),
    _bad_csv("quote that never ends", _HEAD + b'a,b c\n"d,e f\ng,h i\n', "invalid_csv", 3, "quotation mark"),
    _bad_csv("quote inside a quoted field", _HEAD + b'a,b c\n"d" e,f g\n', "invalid_csv", 3, "quotation mark"),
    _bad_csv("same name twice", b"prompt,completion,prompt\na,b,c\n", "invalid_header", 1, "prompt"),
    _bad_csv("name lacking at the end", b"prompt,completion,\na,b c,d\n", "invalid_header", 1, "name"),
    _bad_csv("name lacking at the start", b",prompt,completion\n0,a,b c\n", "invalid_header", 1, "index=False"),
    _bad_csv("Excel's separator", b"sep=;\nprompt;completion\na;b c\n", "invalid_header", 1, "Excel"),
    _bad_csv("two separators", b"prompt,note;completion\na,b;c\n", "invalid_header", 1, "double quotes"),
    _bad_csv("a header in single quotes", b"'prompt','completion'\n'a','b c'\n", "invalid_header", 1, "quotation"),
    _bad_csv("a space before a quote", _HEAD + b'a, "b c"\nd,e f\n', "invalid_csv", 2, "space"),
    _bad_csv("header of numbers", b"1,2\na,b c\n", "unknown_format", None, "olumn"),
    _bad_csv("header only", _HEAD, "empty_file", None, "no rows"),
    _bad_csv("header only, no line end", _HEAD.strip(), "empty_file", None, "no rows"),
    _bad_csv("1,000 columns", b",".join(b"c%d" % n for n in range(1000)) + b"\n", "invalid_header", 1, "256"),
    _bad_csv("a NUL byte in a cell", _HEAD + b"a,b c\nd,e\0f\n", "invalid_text", 3, "NUL"),
    _bad_csv("a NUL byte in a cell far down", _HEAD + b"a,b c\n" * 1000 + b"d,e\0f\n", "invalid_text", 1002, "NUL"),
    _bad_csv("a line too long", _HEAD + b"a,b c\nd," + b"x" * (2 * LINE_BYTES) + b"\n", "invalid_csv", 3, "longer than"),
    _bad_csv("a row too long", _HEAD + b'a,b c\n"' + b"x y z\n" * LINE_BYTES + b'",d\n', "invalid_csv", 3, str(LINE_BYTES)),
    _bad_csv("lone carriage returns in a table", b"prompt,completion\ra,b c\rd,e f\r", "invalid_csv", 1, ""),
    _bad_csv("other columns", b"q,a\n1,2\n", "unknown_format", None, "{q}"),
    _bad_csv("no header", b"What is it?,It is a row.\nAnd that?,Another row.\n", "unknown_format", None, "olumn"),
]  # fmt: skip

_PARQUET = [
    _parquet("parquet", _PAIRS, 3, "prompt_completion"),
    good("parquet in gzip", gzip.compress(_GOOD), 3, "prompt_completion", filename="rows.parquet.gz"),
    _parquet("nested, with fields that are None", [{"messages": _CALLED}, {"messages": [user("b"), answer("c d")]}], 2, "messages"),
    _parquet("numbers for text", [pair(1, completion=1), pair(2, completion=2)], 2, "prompt_completion", "one_word_answers"),
    _parquet("extra columns of many types", [pair(n, at=datetime.date(2024, 1, 1), raw=b"\xff", n=n) for n in (1, 2)], 2, "prompt_completion", "unread_field"),
    _bad_parquet("parquet cut short", _GOOD[:-30], "unsupported_file", None, "cannot be read"),
    _bad_parquet("parquet without its end", _GOOD[: len(_GOOD) // 2], "unsupported_file", None, "cannot be read"),
    _bad_parquet("four bytes of parquet", b"PAR1", "unsupported_file", None, "cannot be read"),
    _bad_parquet("parquet with a damaged middle", _GOOD[:40] + b"\xff" * 60 + _GOOD[100:], "unsupported_file", None, "cannot be read"),
    _bad_parquet("parquet without rows", _packed(pa.Table.from_pylist(_PAIRS)[:0]), "empty_file", None, "no rows"),
    _bad_parquet("parquet without columns", _packed(pa.table({})), "empty_file", None, "no rows"),
    _parquet("bytes that are text", [pair(n, completion="it is é".encode()) for n in (1, 2)], 2, "prompt_completion"),
    _bad_parquet("bytes that are no text", _packed([pair(1, completion=b"a b"), pair(2, completion=b"\xff\xfe")]), "not_utf8", 2, "UTF-8"),
    _parquet("dates as text", [pair(n, completion=datetime.date(2024, 1, n)) for n in (1, 2)], 2, "prompt_completion", "one_word_answers"),
    _bad_parquet("a text that is None", _packed([pair(1), pair(2, completion=None)]), "missing_field", 2, "completion"),
    _bad_parquet("a number that is NaN", _packed([pair(1, completion=1.5), pair(2, completion=math.nan)]), "missing_field", 2, "completion"),
    _bad_parquet("a NUL in a text", _packed([pair(1), pair(2, prompt="a\0b")]), "invalid_text", 2, "NUL"),
    _bad_parquet("text that is not UTF-8", _packed(pa.table({"prompt": pa.array(["a", "b"]), "completion": pa.array([b"c d", b"\xff\xfe"]).view(pa.string())})), "unsupported_file", None, "UTF-8|utf-8"),
    _bad_parquet("a column twice", _packed(_TWICE), "invalid_header", None, "completion|same name"),
    _bad_parquet("300 columns", _packed([pair(1) | {f"c{n}": n for n in range(300)}]), "too_many_columns", None, "256"),
    _bad_parquet("a row longer than a line may be", _packed([pair(1), pair(2, prompt="x" * LINE_BYTES * 2)]), "line_too_long", 2, str(LINE_BYTES)),
    _bad_parquet("a wrong role in parquet", _packed([{"messages": [user(), answer()]}, {"messages": [user(), user() | {"role": "bot"}]}]), "unknown_role", 2, "bot"),
    Case("parquet bomb", _bomb, Bad("unsupported_file", None, "unpacks to more than"), "rows.parquet"),
]  # fmt: skip

_ODD = {
    "timestamp": pa.array([1, 2**62], pa.timestamp("us")),
    "date": pa.array([2**30, 1], pa.date32()),
    "time": pa.array([2**60, 1], pa.time64("us")),
    "duration": pa.array([2**62, 1], pa.duration("s")),
    "time zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Olympus")),
    "field twice": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"]),
}
_PARQUET += [
    _parquet(f"odd {name} that is not read", pa.table({"prompt": ["a", "b"], "completion": ["c d", "e f"], "odd": odd}), 2, "prompt_completion", "unread_field")
    for name, odd in _ODD.items()
] + [
    _bad_parquet("a date out of range that is read", _packed(pa.table({"prompt": ["a", "b"], "completion": _ODD["timestamp"]})), "not_text", 2, '"completion" is'),
]  # fmt: skip

_NAMES = [
    good("rows named parquet", b"".join(map(line, _PAIRS)), 3, "prompt_completion", "name_mismatch", filename="rows.parquet"),
    good("rows without an ending", b"".join(map(line, _PAIRS)), 3, "prompt_completion", filename="rows"),
]  # fmt: skip

CASES = _CSV + _PARQUET + _NAMES
