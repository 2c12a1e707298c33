"""One pass over an uploaded file: every error with its line, and the report of what was found."""

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import IO, Any

from core.errors import BadRequest
from core.ml.formats import detect
from core.ml.formats.chat import mapping as mappings
from core.ml.formats.chat.example import Conversation, Example, RowError
from core.ml.formats.chat.mapping import Mapping
from core.ml.formats.chat.rows import COLUMNS, FORMATS, Format, Reader, reader
from core.ml.formats.detect import Detection
from core.ml.formats.files import read
from core.ml.formats.files.detect import name_mismatch
from core.ml.formats.files.rows import FileType, Limits, Row
from core.ml.formats.findings import Findings

LISTED = 50


@dataclass(frozen=True)
class Reading:
    """How a file that `inspect` found without errors is read again."""

    file_type: FileType
    packed: bool
    format: Format
    mapping: Mapping | None
    limits: Limits = field(default_factory=Limits)


@dataclass
class Report:
    """What a file holds. `errors` lists the first 50, `error_count` counts all."""

    file_type: FileType
    packed: bool
    detection: Detection | None = None
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    error_count: int = 0
    warnings: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    length: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The part that is kept with the data set."""
        return {
            "detection": self.detection.as_dict() if self.detection else None,
            "warnings": self.warnings,
            "warning_count": sum(int(warning["count"]) for warning in self.warnings),
            "duplicates": self.duplicates,
            "length": self.length,
        }

    def add_error(self, line: int, row: int, error: RowError) -> None:
        self.error_count += 1
        if len(self.errors) < LISTED:
            self.errors.append(
                {
                    "line": line,
                    "row": row,
                    "field": error.field,
                    "code": error.code,
                    "message": error.message,
                    "hint": error.hint,
                }
            )


def inspect(
    file: IO[bytes],
    *,
    kind: str = "auto",
    mapping: Mapping | None = None,
    filename: str = "",
    limits: Limits | None = None,
    other: Findings | None = None,
) -> Report:
    """Read the whole open file. `other` are the findings of a data set that must not share rows with it.

    Raises:
        BadRequest: the file as a whole cannot be read: `unsupported_file`, `empty_file`,
            `invalid_format`, `unknown_format`, `ambiguous_format`, `invalid_mapping` and those of `read.rows`.
    """
    _check_request(kind, mapping)
    limits = limits or Limits()
    file_type, packed = read.identify(file)
    if packed:
        read.check_unpacked(file, limits)
    report = Report(file_type, packed)
    findings = Findings()
    with closing(read.rows(file, file_type, packed, limits)) as rows:
        for number, (line, result) in enumerate(_examples(rows, kind, mapping, report, findings), 1):
            report.rows = number
            if isinstance(result, RowError):
                report.add_error(line, number, result)
            else:
                findings.add(line, result)
    if not report.rows:
        raise BadRequest("empty_file", "The file has no rows.", param="file")
    report.warnings = findings.warnings(other)
    if (words := name_mismatch(filename, file_type, packed)) is not None:
        report.warnings.append({"code": "name_mismatch", "message": words, "count": 1, "lines": []})
    report.duplicates = findings.duplicates
    report.length = findings.length()
    return report


def _examples(
    rows: Iterator[Row], kind: str, mapping: Mapping | None, report: Report, findings: Findings
) -> Iterator[tuple[int, Example | RowError]]:
    """(line, example or what is wrong) of every row, the format decided by the first good ones."""
    head = first_rows(rows)
    sample = [row.values for row in head if row.problem is None]
    read_row: Reader | None = None
    known: frozenset[str] = frozenset()
    later: set[str] = set()  # columns of the mapping that no row had so far
    for row in itertools.chain(head, rows):
        if row.problem is not None:
            yield row.line, RowError("", *row.problem[:3])
            continue
        if read_row is None:
            sample = sample or [row.values]  # none of the first rows could be read
            report.columns = list(dict.fromkeys(name for values in sample for name in values))
            if mapping is None:
                found = decide(kind, None, sample, report.columns)
            else:
                mappings.check_form(mapping)
                later = mappings.in_braces(mapping).difference(report.columns)
                found = _of_mapping(mapping)
            report.detection = found
            read_row = reader(found.format, found.mapping)
            known = _known_columns(found)
        if later:
            report.columns += [name for name in row.values if name in later]
            later.difference_update(row.values)
        try:
            example = read_row(row.values)
        except RowError as error:
            yield row.line, error
            continue
        if not known.issuperset(row.values) or (type(example) is Conversation and example.unread):
            _note_unread(row, example, known, findings)
        yield row.line, example
    if read_row is not None and mapping is not None:
        mappings.check(mapping, report.columns)


def first_rows(rows: Iterator[Row]) -> list[Row]:
    """The first rows, as far as they fit into memory with ease."""
    head: list[Row] = []
    size = 0
    for row in itertools.islice(rows, detect.SAMPLE):
        head.append(row)
        size += len(str(row.values))
        if size > detect.SAMPLE_CHARS:
            break
    return head


def _note_unread(row: Row, example: Example, known: frozenset[str], findings: Findings) -> None:
    for name, value in row.values.items():
        if name not in known and value not in (None, "", [], {}):
            findings.unread(row.line, name)
    if isinstance(example, Conversation):
        for name in sorted(example.unread):
            findings.unread(row.line, name)


def _known_columns(detection: Detection) -> frozenset[str]:
    if detection.mapping is not None:
        return mappings.columns_of(detection.mapping)
    return COLUMNS[detection.format]


def decide(kind: str, mapping: Mapping | None, sample: list[dict[str, Any]], columns: list[str]) -> Detection:
    """The format of rows with these columns; raises as `detect.detect` and `mapping.check`."""
    if mapping is not None:
        mappings.check(mapping, columns)
        return _of_mapping(mapping)
    if kind == "auto":
        return detect.detect(sample)
    if kind == "text":
        return detect.text(sample)
    if kind == "mapping":
        raise _no_mapping()
    chosen = next(known for known in FORMATS if known == kind)
    return Detection(chosen, "certain", "The format of the request.")


def _of_mapping(mapping: Mapping) -> Detection:
    return Detection("mapping", "certain", "The mapping of the request.", [], mapping)


def conversations(file: IO[bytes], how: Reading) -> Iterator[tuple[int, Example]]:
    """(line, example) of every row of the open file."""
    read_row = reader(how.format, how.mapping)
    with closing(read.rows(file, how.file_type, how.packed, how.limits)) as rows:
        for row in rows:
            if row.problem is not None:
                raise BadRequest("invalid_dataset", f"Line {row.line} cannot be read any more.")
            try:
                yield row.line, read_row(row.values)
            except RowError as error:  # kept by an older version that knew less
                message = f"Line {row.line}: {error.message}"
                raise BadRequest("invalid_dataset", message, param="file", hint=error.hint) from error


def findings_of(file: IO[bytes], how: Reading) -> Findings:
    """What is compared when another file must not share rows with this one."""
    findings = Findings()
    for line, example in conversations(file, how):
        findings.add(line, example)
    return findings


def refuse(report: Report) -> BadRequest:
    """The error that an upload with broken rows is answered with."""
    first = report.errors[0]
    more = f" ({report.error_count} rows have errors.)" if report.error_count > 1 else ""
    return BadRequest(
        "invalid_dataset",
        f"Line {first['line']}: {first['message']}{more}",
        param="file",
        hint=first["hint"],
        errors=report.errors,
        error_count=report.error_count,
    )


def _check_request(kind: str, mapping: Mapping | None) -> None:
    check_format(kind)
    if kind == "mapping" and mapping is None:
        raise _no_mapping()
    if mapping is not None and kind not in ("auto", "mapping") and not (kind == "text" and "text" in mapping):
        raise BadRequest(
            "invalid_mapping", f"A mapping and format {kind} exclude each other.", param="format"
        )


def check_format(kind: str) -> None:
    """Raises BadRequest `invalid_format`."""
    if kind not in ("auto", *FORMATS):
        raise BadRequest(
            "invalid_format",
            f'There is no format "{kind[:40]}".',
            param="format",
            hint=f"Formats are: auto, {', '.join(FORMATS)}.",
        )


def _no_mapping() -> BadRequest:
    return BadRequest("invalid_mapping", "Format mapping needs a mapping.", param="mapping")
