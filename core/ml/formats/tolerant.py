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

# What a row that is not UTF-8 may hold besides ASCII: what means the same wherever the row may come from. These
# letters do in all of the code pages; these signs in all but the last, which has nothing in their place.
_CODE_PAGES = ("cp1250", "cp1252", "cp1254", "cp1257", "iso8859-15")
_MEANT = ({bytes([code]).decode(page, "replace") for page in _CODE_PAGES} for code in range(128, 256))
_LETTERS = "".join(min(meant) for meant in _MEANT if len(meant) == 1 and min(meant).isalpha()).encode(
    "cp1252"
)
_SIGNS = rb"\x80\x84\x85\x91-\x94\x96\x97"  # the euro sign, quotation marks, three dots and dashes
# Another byte; or a word of such letters alone, or a quotation mark inside a word, as older code pages have them.
_UNSURE = re.compile(
    rb"[^\0-\x7f%l%s]|(?<![a-zA-Z%l])[%l]++(?![a-zA-Z])|(?<=[a-zA-Z])[\x84\x93\x94](?=[a-zA-Z])".replace(
        b"%l", _LETTERS
    ).replace(b"%s", _SIGNS)
)
# An object of these alone is a part of a conversation, not a row.
_OF_MESSAGE = frozenset({"role", "content", "from", "value", "name", "tool_calls", "tool_call_id"})


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


class _Line(NamedTuple):
    number: int
    fault: str
    text: str


def _joined(source: IO[bytes], limits: Limits) -> Iterator[Found]:
    """The rows of JSON Lines, the lines of an object over several of them as one."""
    pending: list[_Line] = []  # the lines of an object that is not closed yet
    size = opened = margin = 0
    for number, fault, line in _lines(source, limits):
        text = (line or "").strip()
        indent = len(line or "") - len((line or "").lstrip())
        # What an object holds stands further to the right than its beginning.
        another = text.startswith("{") and indent <= margin
        if pending and (line is None or another or size > limits.line_bytes):
            yield from _apart(pending, limits)
            pending = []
        if line is None:
            yield Found(number, f"({fault})", None)
        if not text:
            continue
        if not pending:
            size, opened, margin = 0, 0, indent
        pending.append(_Line(number, fault, text))
        size += len(text)
        opened += _opened(text)
        if opened <= 0 or (len(pending) == 1 and _is_whole(pending, limits)):
            found = _read(pending, limits)
            yield from [found] if found.values is not None else _apart(pending, limits)
            pending = []
    yield from _apart(pending, limits)


def _is_whole(alone: list[_Line], limits: Limits) -> bool:
    """Whether a line is no beginning of an object, for all the braces in its strings."""
    text = alone[0].text
    return text[0] not in "{[" or (
        text.rstrip(", ").endswith("}") and _read(alone, limits).values is not None
    )


def _apart(pending: list[_Line], limits: Limits) -> Iterator[Found]:
    """The lines of what is no object together: those that are rows by themselves, and what lies between them."""
    lost: list[_Line] = []
    for line in pending:
        if line.text.startswith("{"):
            found = _read([line], limits)
            if found.values is not None and not found.values.keys() <= _OF_MESSAGE:
                yield from _lost(lost)
                yield found
                lost = []
                continue
        lost.append(line)
    yield from _lost(lost)


def _lost(lines: list[_Line]) -> Iterator[Found]:
    if lines:
        amiss = _amiss(lines)
        text = "\n".join(line.text for line in lines)
        yield Found(lines[0].number, f"({amiss}) {text}" if amiss else text, None)


def _amiss(lines: list[_Line]) -> str:
    return next((line.fault for line in lines if line.fault), "")


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
            if _UNSURE.search(raw):
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


def _read(lines: list[_Line], limits: Limits) -> Found:
    text = "\n".join(line.text for line in lines)
    values = _strict(text, limits)
    amiss = _amiss(lines)
    if values is not None and not amiss and len(lines) == 1:
        return Found(lines[0].number, text, values, exact=True)
    return Found(lines[0].number, f"({amiss}) {text}" if amiss else text, values or _meant(text, limits))


def _strict(text: str, limits: Limits) -> dict[str, Any] | None:
    try:
        value = strict_json.loads(text, depth=limits.depth)
    except JsonError:
        return None
    return value if isinstance(value, dict) else None


def _meant(text: str, limits: Limits) -> dict[str, Any] | None:
    value = meant(text.rstrip(","), limits.depth)
    return value if isinstance(value, dict) else None


def meant(text: str, depth: int) -> Any:
    """What a text holds that is JSON but for needless commas, or as Python prints it; None where it is neither."""
    for tidied in (str, _without_commas, _from_python):
        try:
            return strict_json.loads(tidied(text), depth=depth)
        except JsonError as error:
            if error.code == "duplicate_key":
                return None  # nobody knows which of them is meant
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
