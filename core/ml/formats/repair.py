"""What a broken file most likely means: the mapping to use, and its rows as they should have been written.

Nothing is repaired in silence: a repair is proposed, shown as a diff, and uploaded by who wants it.
"""

import ast
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any

from core import strict_json
from core.errors import BadRequest
from core.ml.formats import detect, mend, validate
from core.ml.formats.chat.example import RowError
from core.ml.formats.chat.mapping import Mapping
from core.ml.formats.chat.rows import Reader, reader
from core.ml.formats.files import json_rows, read
from core.ml.formats.files.rows import Limits, Row
from core.ml.formats.findings import Findings
from core.strict_json import JsonError

_SHOWN = 5
_SHOWN_CHARS = 400
_COLUMN_CHARS = 200
# Longer texts are not evaluated as Python.
_LITERAL_CHARS = 200_000
_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
# Strings, which are passed over, and commas before a bracket.
_NEEDLESS = re.compile(_STRING.pattern + r"|,(\s*[}\]])")
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)
_NUL = {"\\u0000": ""}


@dataclass(frozen=True)
class Repair:
    """`rows` are in the repaired file; `changed` of them differ, `left_out` could not be read."""

    rows: int
    changed: int
    left_out: int
    diff: str


@dataclass(frozen=True)
class Examination:
    """A file looked at: what is in it, or why nothing is; the mapping to use; the repair, written aside."""

    report: validate.Report | None
    errors: list[dict[str, Any]]
    error_count: int
    mapping: Mapping | None
    columns: list[str]
    repair: Repair | None

    @property
    def valid(self) -> bool:
        return self.error_count == 0


def examine(
    file: IO[bytes],
    target: IO[bytes],
    *,
    kind: str,
    mapping: Mapping | None,
    filename: str,
    limits: Limits,
    other: Findings | None = None,
) -> Examination:
    """Inspect a file; where that fails, find the mapping or write the repaired rows to `target`."""
    validate.check_format(kind)
    report = failure = None
    given = mapping
    columns: list[str] = []
    try:
        report = validate.inspect(
            file, kind=kind, mapping=mapping, filename=filename, limits=limits, other=other
        )
    except BadRequest as error:
        failure = error
    if report is not None and not report.error_count:
        found = report.detection.mapping if report.detection else None
        return Examination(report, [], 0, found, report.columns, None)
    if failure is not None and failure.code in ("unknown_format", "invalid_mapping"):
        mapping, columns = _suggestion(file, limits)
    errors, count = (report.errors, report.error_count) if report is not None else ([_of_file(failure)], 1)
    readable = failure is None or failure.code == "unknown_format"
    repair = _written(file, target, limits, kind, mapping) if readable else None
    if repair is None and readable and mapping is not given:
        # The rows that could be read were parts of others, such as lines of an object over several.
        target.seek(0)
        target.truncate()
        repair = _written(file, target, limits, kind, given)
        mapping = mapping if repair is None else given
    if repair is not None and not repair.changed and not repair.left_out:
        repair = None  # nothing to repair: a mapping is all that lacks
    return Examination(report, errors, count, mapping, columns, repair)


def _written(
    file: IO[bytes], target: IO[bytes], limits: Limits, kind: str, mapping: Mapping | None
) -> Repair | None:
    try:
        return write(file, target, limits, kind=kind, mapping=mapping)
    except (BadRequest, EOFError, gzip.BadGzipFile, zlib.error):
        return None  # cut short or too large, beyond the rows that told the format


def _of_file(error: BadRequest | None) -> dict[str, Any]:
    assert error is not None  # noqa: S101 - there is a report or an error
    return {
        "line": None,
        "row": None,
        "field": error.param or "file",
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
    }


def _suggestion(file: IO[bytes], limits: Limits) -> tuple[Mapping | None, list[str]]:
    """A mapping with which the first rows can be read, and the columns. Raises as `read.identify`."""
    kind, packed = read.identify(file)
    with closing(read.rows(file, kind, packed, limits)) as rows:
        sample = [row.values for row in validate.first_rows(rows) if row.problem is None]
    if not sample:
        return None, []
    columns = list(dict.fromkeys(name for values in sample for name in values))
    if max(map(len, columns), default=0) > _COLUMN_CHARS:
        return None, [name[:_COLUMN_CHARS] for name in columns]
    if (mapping := detect.suggest(columns, sample)) is None:
        return None, columns
    try:
        report = validate.inspect(file, mapping=mapping, limits=limits)
    except BadRequest:
        return None, columns
    return (mapping if report.error_count < report.rows else None), columns


def write(
    file: IO[bytes], target: IO[bytes], limits: Limits, *, kind: str, mapping: Mapping | None
) -> Repair | None:
    """Write the repaired rows as JSON Lines; None where no row can be read even so."""
    read_row: Reader | None = None
    rows = changed = left_out = 0
    diff: list[str] = []
    for line, before, values in _values(file, limits):
        mended = None if values is None else mend.row(values, rename=mapping is None)
        if mended is not None and read_row is None:
            read_row = _reader(mended, kind, mapping)
        if mended is None or read_row is None or not _readable(read_row, mended):
            left_out += 1
            after = None
        else:
            rows += 1
            after = strict_json.dumps(mended)
            target.write(after.encode() + b"\n")
        if mended is None or after is None or mended != values or not _same(before, mended):
            changed += after is not None
            if len(diff) < _SHOWN:
                diff.append(_difference(line, before, after))
    return Repair(rows, changed, left_out, "".join(diff)) if rows else None


def _value(row: Row) -> tuple[int, str, dict[str, Any] | None]:
    if row.problem is not None and row.problem.ends:
        raise BadRequest("not_repairable", row.problem.message)
    # Bytes of a Parquet column that nobody reads have no place in JSON.
    values = {name: value for name, value in row.values.items() if not isinstance(value, bytes)}
    return (row.line, strict_json.dumps(values), values) if row.problem is None else (row.line, "", None)


def _values(file: IO[bytes], limits: Limits) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """(line, text, values) of every row, broken ones read as well as can be.

    Raises:
        BadRequest: `not_repairable`, the rows after a broken one have no borders.
    """
    kind, packed = read.identify(file)
    if kind != "jsonl":
        with closing(read.rows(file, kind, packed, limits)) as rows:
            yield from map(_value, rows)
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


def _reader(values: dict[str, Any], kind: str, mapping: Mapping | None) -> Reader | None:
    try:
        found = validate.decide(kind, mapping, [values], list(values))
    except BadRequest:
        return None
    return reader(found.format, found.mapping)


def _readable(read_row: Reader, values: dict[str, Any]) -> bool:
    try:
        read_row(values)
    except RowError:
        return False
    return True


def _same(before: str, values: dict[str, Any]) -> bool:
    try:
        return "\n" not in before and bool(json.loads(before) == values)
    except ValueError:
        return False


def _difference(line: int, before: str, after: str | None) -> str:
    old = [f"{text[:_SHOWN_CHARS]}\n" for text in before.splitlines()]
    new = [f"{after[:_SHOWN_CHARS]}\n"] if after is not None else []
    return f"@@ line {line} @@\n" + "".join(list(difflib.unified_diff(old, new, n=0))[3:])
