"""What a broken file most likely means: the mapping to use, and its rows as they should have been written.

Nothing is repaired in silence: a repair is proposed, shown as a diff, and uploaded by who wants it.
"""

import gzip
import itertools
import zlib
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any

from core import strict_json
from core.errors import BadRequest
from core.ml.formats import detect, mend, tolerant, validate
from core.ml.formats.chat.example import RowError
from core.ml.formats.chat.mapping import Mapping
from core.ml.formats.chat.rows import Format, Reader, reader
from core.ml.formats.detect import Detection
from core.ml.formats.files import read
from core.ml.formats.files.rows import Limits
from core.ml.formats.findings import Findings

_SHOWN = 5
_SHOWN_LINES = 40
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
        # Where no row is as the report says, the rows it saw were parts of others.
        if report.detection is not None:
            repair = _written(file, target, limits, kind, mapping, report.detection)
        repair = repair or _written(file, target, limits, kind, mapping)
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
        suggested, columns = _suggestion(file, limits)
        proposed = suggested if mapping is None else None  # another one would hide what is wrong with it
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
    file: IO[bytes],
    target: IO[bytes],
    limits: Limits,
    kind: str,
    mapping: Mapping | None,
    found: Detection | None = None,
) -> Repair | None:
    """As `write`; None, too, where nothing says the format, or the file ends before its end."""
    target.seek(0)
    target.truncate()
    try:
        found = found or _detection(file, limits, kind, mapping)
        return write(file, target, limits, found) if found else None
    except (BadRequest, EOFError, gzip.BadGzipFile, zlib.error):
        return None  # cut short or too large, beyond the rows that told the format


def _detection(file: IO[bytes], limits: Limits, kind: str, mapping: Mapping | None) -> Detection | None:
    """The format of the first rows that can be read somehow."""
    sample: list[dict[str, Any]] = []
    size = 0
    with closing(tolerant.rows(file, limits)) as rows:
        for row in rows:
            if row.values is not None and len(row.values) <= limits.columns:
                sample.append(row.values)
                size += len(row.text)
            if len(sample) == detect.SAMPLE or size > detect.SAMPLE_CHARS:
                break
    mended = [mend.row(values, None) for values in sample] if mapping is None else []
    for values in (sample, mended):
        try:
            return validate.decide(kind, mapping, values, list(dict.fromkeys(itertools.chain(*values))))
        except BadRequest:
            continue
    return None


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


def write(file: IO[bytes], target: IO[bytes], limits: Limits, found: Detection) -> Repair | None:
    """Write the repaired rows as JSON Lines; None where no row can be read even so."""
    read_row = reader(found.format, found.mapping)
    count = changed = left_out = 0
    diff: list[str] = []
    with closing(tolerant.rows(file, limits)) as rows:
        for row in rows:
            mended = None
            if row.values is not None and len(row.values) <= limits.columns:
                mended = _readable(read_row, row.values, found.format)
            if mended is None:
                left_out += 1
                after = None
            else:
                count += 1
                after = strict_json.dumps(mended)
                target.write(after.encode() + b"\n")
            if not row.exact or mended is not row.values:
                changed += after is not None
                if len(diff) < _SHOWN:
                    diff.append(_difference(row.line, row.text, after))
    return Repair(count, changed, left_out, "".join(diff)) if count else None


def _readable(read_row: Reader, values: dict[str, Any], kind: Format) -> dict[str, Any] | None:
    """The row as it stands, or else as it may have been meant: a good one is never touched."""
    if _reads(read_row, values):
        return values
    mended = mend.row(values, kind)
    return mended if _reads(read_row, mended) else None


def _reads(read_row: Reader, values: dict[str, Any]) -> bool:
    try:
        read_row(values)
    except RowError:
        return False
    return True


def _difference(line: int, before: str, after: str | None) -> str:
    old = before[: _SHOWN_LINES * _SHOWN_CHARS].split("\n")[:_SHOWN_LINES]
    new = [] if after is None else [after]
    lines = [*(f"-{text}" for text in old), *(f"+{text}" for text in new)]
    return f"@@ line {line} @@\n" + "".join(f"{text[: _SHOWN_CHARS + 1]}\n" for text in lines)
