"""The rows of a broken file, read as well as can be: what they most likely mean, for core.ml.formats.repair."""

import ast
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import IO, Any

from core import strict_json
from core.errors import BadRequest
from core.ml.formats.files import json_rows, read
from core.ml.formats.files.rows import Limits, Row
from core.strict_json import JsonError

# Longer texts are not evaluated as Python.
_LITERAL_CHARS = 200_000
_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
# Strings, which are passed over, and commas before a bracket.
_NEEDLESS = re.compile(_STRING.pattern + r"|,(\s*[}\]])")
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)
_NUL = {"\\u0000": ""}


def _value(row: Row) -> tuple[int, str, dict[str, Any] | None]:
    if row.problem is not None and row.problem.ends:
        raise BadRequest("not_repairable", row.problem.message)
    # Bytes of a Parquet column that nobody reads have no place in JSON.
    values = {name: value for name, value in row.values.items() if not isinstance(value, bytes)}
    return (row.line, strict_json.dumps(values), values) if row.problem is None else (row.line, "", None)


def rows(file: IO[bytes], limits: Limits) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """(line, text, values) of every row, broken ones read as well as can be.

    Raises:
        BadRequest: `not_repairable`, the rows after a broken one have no borders.
    """
    kind, packed = read.identify(file)
    if kind != "jsonl":
        with closing(read.rows(file, kind, packed, limits)) as found:
            yield from map(_value, found)
        return
    file.seek(0)
    source = read.unpacked(file, limits) if packed else file
    pending: list[str] = []  # the lines of an object that is not closed yet
    start = size = opened = 0
    recoded = False
    for number, raw in json_rows.raw_lines(source, limits):
        line = _decoded(raw)
        if pending and (line is None or line.startswith("{") or size > limits.line_bytes):
            yield start, "\n".join(pending), None
            pending = []
        if line is None:
            yield number, "", None
        if not (text := (line or "").strip()):
            continue
        if not pending:
            start = number
            size = opened = 0
            recoded = False
        pending.append(text)
        size += len(text)
        opened += _opened(text)
        recoded = recoded or (not text.isascii() and text.encode() not in (raw or b""))
        if opened <= 0 or (text[0] not in "{[" and len(pending) == 1):
            whole = "\n".join(pending)
            yield start, f"(not UTF-8) {whole}" if recoded else whole, _parsed(whole, limits)
            pending = []
    if pending:
        yield start, "\n".join(pending), None


def _decoded(raw: bytes | None) -> str | None:
    """The text of a line; None where it is too long, or bytes of no encoding that is tried."""
    if raw is None:
        return None
    for encoding in ("utf-8", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def _opened(line: str) -> int:
    """How many more braces it opens than it closes."""
    bare = _STRING.sub("", line)
    return bare.count("{") - bare.count("}")


def _parsed(text: str, limits: Limits) -> dict[str, Any] | None:
    text = text.strip().rstrip(",")
    for candidate in (text, _NEEDLESS.sub(_kept, text)):
        try:
            value = strict_json.loads(candidate, depth=limits.depth)
        except JsonError as error:
            if error.code == "duplicate_key":
                return None  # nobody knows which of them is meant
            continue
        return value if isinstance(value, dict) else None
    if len(text) <= _LITERAL_CHARS and text.startswith("{"):
        try:
            value = ast.literal_eval(text)  # {'key': 'value', 'other': None}, as Python prints it
            value = strict_json.loads(json.dumps(value), depth=limits.depth)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
        return value if isinstance(value, dict) else None
    return None


def _kept(found: re.Match[str]) -> str:
    """What is left of a string, or of a comma and the bracket behind it."""
    return found[1] if found[1] else _ESCAPE.sub(lambda escape: _NUL.get(escape[0], escape[0]), found[0])
