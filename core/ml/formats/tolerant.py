"""The rows of a broken file, read as well as can be: what they most likely mean, for core.ml.formats.repair.

A line may be megabytes long and hostile: whatever is done to one takes time in proportion to its length.
"""

import json
import re
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import IO, Any, NamedTuple

from core import strict_json
from core.errors import BadRequest
from core.ml.formats.files import json_rows, read
from core.ml.formats.files.rows import Limits, OutOfRange, Row
from core.strict_json import JsonError

# A string, or one that never ends: where that did not match, every quotation mark in it would begin a new search.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
# Strings, which are passed over, and commas before a bracket.
_NEEDLESS = re.compile(_STRING.pattern + r"|,(\s*[}\]])", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)
_NUL = {"\\u0000": ""}
# The same as Python prints it.
_PYTHON = re.compile(
    r"""u?'((?:[^'\\]|\\.)*+)'|u?"((?:[^"\\]|\\.)*+)"|["'].*|,(\s*[}\]])|\b(True|False|None)\b""", re.DOTALL
)
_PYTHON_ESCAPE = re.compile(r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|"', re.DOTALL)
_WORDS = {"True": "true", "False": "false", "None": "null"}
_NO_ESCAPE = "\\x"  # JSON has none of this name: the row is left out

# What no text of a Western language holds in Windows-1252: rare signs, signs inside a word, four accents in a row,
# a word of nothing but accents. That is another encoding, and nobody knows which.
_ACCENT = rb"\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xc0-\xd6\xd8-\xf6\xf8-\xff"
_FOREIGN = re.compile(
    rb"[\x81-\x83\x87-\x89\x8d\x8f\x90\x98\x9d]"
    rb"|[a-zA-Z%b][\xa1-\xac\xae-\xb3\xb5\xb6\xb8-\xbf\xd7\xf7][a-zA-Z%b]"
    rb"|[%b]{4}|(?<![a-zA-Z%b])[%b]{2,}(?![a-zA-Z%b])".replace(b"%b", _ACCENT)
)


class Found(NamedTuple):
    """`text` is shown. `values` is None for what cannot be read; `exact` says that they stand there like that."""

    line: int
    text: str
    values: dict[str, Any] | None
    exact: bool = False


def rows(file: IO[bytes], limits: Limits) -> Generator[Found]:
    """Every row, broken ones read as well as can be.

    Raises:
        BadRequest: `not_repairable`, the rows after a broken one have no borders.
    """
    kind, packed = read.identify(file)
    if kind != "jsonl":
        with closing(read.rows(file, kind, packed, limits)) as found:
            yield from map(_found, found)
        return
    file.seek(0)
    yield from _joined(read.unpacked(file, limits) if packed else file, limits)


def _found(row: Row) -> Found:
    if row.problem is not None:
        if row.problem.ends:
            raise BadRequest("not_repairable", row.problem.message)
        return Found(row.line, f"({row.problem.message})", None)
    # What of a Parquet file is no text has no place in JSON.
    values = {name: value for name, value in row.values.items() if not isinstance(value, bytes | OutOfRange)}
    return Found(row.line, strict_json.dumps(values), values, exact=True)


def _joined(source: IO[bytes], limits: Limits) -> Iterator[Found]:
    """The rows of JSON Lines, the lines of an object over several of them as one."""
    pending: list[str] = []  # the lines of an object that is not closed yet
    start = size = opened = 0
    amiss = ""
    for number, fault, line in _lines(source, limits):
        if pending and (line is None or line.startswith("{") or size > limits.line_bytes):
            yield Found(start, "\n".join(pending), None)
            pending = []
        if line is None:
            yield Found(number, f"({fault})", None)
        if not (text := (line or "").strip()):
            continue
        if not pending:
            start, size, opened, amiss = number, 0, 0, ""
        pending.append(text)
        size += len(text)
        opened += _opened(text)
        amiss = amiss or fault
        if opened <= 0 or (text[0] not in "{[" and len(pending) == 1):
            yield _read(start, amiss, pending, limits)
            pending = []
    if pending:
        yield Found(start, "\n".join(pending), None)


def _lines(source: IO[bytes], limits: Limits) -> Iterator[tuple[int, str, str | None]]:
    """(number, what is wrong with it, text) of every line; no text where nobody knows what it says."""
    for number, raw in json_rows.raw_lines(source, limits):
        if raw is None:
            yield number, f"longer than {limits.line_bytes} bytes", None
            continue
        fault = ""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            fault = "not UTF-8"
            if _FOREIGN.search(raw):
                yield number, f"{fault}: {raw[:1000].decode('utf-8', 'replace').strip()}", None
                continue
            text = raw.decode("cp1252")
        if text.startswith("\ufeff"):
            text, fault = text.lstrip("\ufeff"), "byte order mark"
        text = text.rstrip("\r\n")
        if "\r" in text and _strict(text, limits) is None:
            for part in text.split("\r"):
                yield number, "ends in CR alone", part
        else:
            yield number, fault, text


def _opened(line: str) -> int:
    """How many more braces it opens than it closes."""
    bare = _STRING.sub("", line)
    return bare.count("{") - bare.count("}")


def _read(line: int, amiss: str, parts: list[str], limits: Limits) -> Found:
    text = "\n".join(parts)
    values = _strict(text, limits)
    if values is not None and not amiss and len(parts) == 1:
        return Found(line, text, values, exact=True)
    return Found(line, f"({amiss}) {text}" if amiss else text, values or _meant(text, limits))


def _strict(text: str, limits: Limits) -> dict[str, Any] | None:
    try:
        value = strict_json.loads(text, depth=limits.depth)
    except JsonError:
        return None
    return value if isinstance(value, dict) else None


def _meant(text: str, limits: Limits) -> dict[str, Any] | None:
    text = text.rstrip(",")
    for tidied in (str, _without_commas, _from_python):
        try:
            value = strict_json.loads(tidied(text), depth=limits.depth)
        except JsonError as error:
            if error.code == "duplicate_key":
                return None  # nobody knows which of them is meant
            continue
        return value if isinstance(value, dict) else None
    return None


def _without_commas(text: str) -> str:
    return _NEEDLESS.sub(_kept, text)


def _kept(found: re.Match[str]) -> str:
    """What is left of a string, or of a comma and the bracket behind it."""
    return found[1] if found[1] else _ESCAPE.sub(lambda escape: _NUL.get(escape[0], escape[0]), found[0])


def _from_python(text: str) -> str:
    """{'key': 'value', 'other': None}, as Python prints it, in JSON. What JSON cannot say stays and is refused."""
    return _PYTHON.sub(_token, text)


def _token(found: re.Match[str]) -> str:
    string, quoted, bracket, word = found.groups()
    if string is None and quoted is None:
        return bracket or _WORDS.get(word, found[0])
    return f'"{_PYTHON_ESCAPE.sub(_escape, string if quoted is None else quoted)}"'


def _escape(found: re.Match[str]) -> str:
    escape: str = found[0]
    if escape == '"':
        return '\\"'
    if escape == "\\'":
        return "'"
    if len(escape) > 2 and escape[1] in "xU":
        code = int(escape[2:], 16)
        return json.dumps(chr(code))[1:-1] if code < 0x110000 else _NO_ESCAPE
    return escape if escape[1] in '\\"nrtbfu' else _NO_ESCAPE
