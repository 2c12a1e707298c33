"""What a broken file most likely means: the mapping to use, and its rows as they should have been written.

Nothing is repaired in silence: a repair is proposed, shown as a diff, and uploaded by who wants it.
"""

import difflib
import gzip
import json
import zlib
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any

from core import strict_json
from core.errors import BadRequest
from core.ml.formats import detect, mend, tolerant, validate
from core.ml.formats.chat.example import RowError
from core.ml.formats.chat.mapping import Mapping
from core.ml.formats.chat.rows import Reader, reader
from core.ml.formats.files import read
from core.ml.formats.files.rows import Limits
from core.ml.formats.findings import Findings

_SHOWN = 5
_SHOWN_CHARS = 400
_COLUMN_CHARS = 200


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
    """Inspect a file; where that fails, find the mapping or write the repaired rows to `target`.

    Raises:
        BadRequest: `invalid_format`.
    """
    validate.check_format(kind)
    try:
        report = validate.inspect(
            file, kind=kind, mapping=mapping, filename=filename, limits=limits, other=other
        )
    except BadRequest as failure:
        return _of_unreadable(file, target, limits, kind, mapping, failure)
    repair = None
    if report.error_count:
        repair = _written(file, target, limits, kind, mapping)
    elif report.detection:
        mapping = report.detection.mapping
    return Examination(report, report.errors, report.error_count, mapping, report.columns, repair)


def _of_unreadable(
    file: IO[bytes],
    target: IO[bytes],
    limits: Limits,
    kind: str,
    mapping: Mapping | None,
    failure: BadRequest,
) -> Examination:
    """Of a file that is refused as a whole."""
    proposed, repair = mapping, None
    columns: list[str] = []
    if failure.code in ("unknown_format", "invalid_mapping"):
        proposed, columns = _suggestion(file, limits)
    if failure.code == "unknown_format":
        repair = _written(file, target, limits, kind, proposed)
        if repair is None and mapping != proposed:
            # The rows that could be read were parts of others, such as lines of an object over several.
            repair = _written(file, target, limits, kind, mapping)
            proposed = proposed if repair is None else mapping
    error = {
        "line": None,
        "row": None,
        "field": failure.param or "file",
        "code": failure.code,
        "message": failure.message,
        "hint": failure.hint,
    }
    if repair is not None and not repair.changed and not repair.left_out:
        repair = None  # a mapping is all that lacks
    return Examination(None, [error], 1, proposed, columns, repair)


def _written(
    file: IO[bytes], target: IO[bytes], limits: Limits, kind: str, mapping: Mapping | None
) -> Repair | None:
    """As `write`; None where the file ends before its end, too."""
    target.seek(0)
    target.truncate()
    try:
        return write(file, target, limits, kind=kind, mapping=mapping)
    except (BadRequest, EOFError, gzip.BadGzipFile, zlib.error):
        return None  # cut short or too large, beyond the rows that told the format


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
    for line, before, values in tolerant.rows(file, limits):
        mended = None
        if values is not None and len(values) <= limits.columns:
            mended = mend.row(values, rename=mapping is None)
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
