"""One pass over an uploaded file: every error with its line, and the report of what was found."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from core.errors import BadRequest
from core.ml.formats import chat, read

LISTED = 50


@dataclass(frozen=True)
class Report:
    """What a data set holds. `errors` lists the first 50, `error_count` counts all."""

    file_type: read.FileType
    format: chat.Format | None
    columns: list[str]
    rows: int
    errors: list[dict[str, Any]]
    error_count: int
    warnings: list[dict[str, Any]]
    duplicates: int
    length: dict[str, int]

    def summary(self) -> dict[str, Any]:
        """The part that is kept with the data set."""
        return {
            "warnings": self.warnings,
            "warning_count": sum(int(warning["count"]) for warning in self.warnings),
            "duplicates": self.duplicates,
            "length": self.length,
        }


def inspect(
    path: Path, *, kind: str = "auto", mapping: dict[str, Any] | None = None, line_max_bytes: int
) -> Report:
    """Read the whole file, in memory that grows by a few bytes a row.

    Raises:
        BadRequest: the file as a whole cannot be read: `unsupported_file`, `empty_file`,
            `unknown_format`, `invalid_mapping`.
    """
    _check_request(kind, mapping)
    file_type = read.file_type(path)
    decided: chat.Format | None = None
    columns: list[str] = []
    errors: list[dict[str, Any]] = []
    error_count = number = 0
    seen = _Seen()
    with path.open("rb") as file:
        for row in read.rows(file, file_type, line_max_bytes=line_max_bytes):
            number += 1
            try:
                if row.values is None:
                    assert row.problem is not None  # noqa: S101 - a row has values or a problem
                    code, message, hint = row.problem
                    raise chat.RowError("", code, message, hint)
                if decided is None:
                    columns = list(row.values)[: read.MAX_COLUMNS]
                    decided = _decide(kind, mapping, columns)
                seen.add(row.line, chat.messages(row.values, decided, mapping))
            except chat.RowError as error:
                error_count += 1
                if len(errors) < LISTED:
                    errors.append(
                        {
                            "line": row.line,
                            "row": number,
                            "field": error.field,
                            "code": error.code,
                            "message": error.message,
                            "hint": error.hint,
                        }
                    )
    if number == 0:
        raise BadRequest("empty_file", "The file has no rows.", param="file")
    return Report(
        file_type,
        decided,
        columns,
        number,
        errors,
        error_count,
        seen.warnings(),
        seen.duplicates,
        seen.quantiles(),
    )


class _Seen:
    """What is remembered of the good rows: a short hash and a length each."""

    def __init__(self) -> None:
        self.hashes: set[bytes] = set()
        self.lengths = array("q")
        self.duplicates = 0
        self.duplicate_lines: list[int] = []

    def add(self, line: int, turns: list[chat.Turn]) -> None:
        self.lengths.append(sum(len(turn["content"]) for turn in turns))
        text = "\0".join(f"{turn['role']}\0{turn['content']}" for turn in turns)
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if digest in self.hashes:
            self.duplicates += 1
            self.duplicate_lines.append(line)
            del self.duplicate_lines[10:]
        self.hashes.add(digest)

    def warnings(self) -> list[dict[str, Any]]:
        if not self.duplicates:
            return []
        return [
            {
                "code": "duplicates",
                "message": f"{self.duplicates} rows repeat an earlier row.",
                "count": self.duplicates,
                "lines": self.duplicate_lines,
            }
        ]

    def quantiles(self) -> dict[str, int]:
        ordered = sorted(self.lengths) or [0]
        return {
            "p50": ordered[len(ordered) // 2],
            "p95": ordered[int((len(ordered) - 1) * 0.95)],
            "max": ordered[-1],
        }


@dataclass(frozen=True)
class Reading:
    """How a file that `inspect` found without errors is read again."""

    file_type: read.FileType
    format: chat.Format
    mapping: dict[str, Any] | None
    line_max_bytes: int


def conversations(file: IO[bytes], how: Reading) -> Iterator[tuple[int, list[chat.Turn]]]:
    """(line, conversation) of every row of the open file."""
    for row in read.rows(file, how.file_type, line_max_bytes=how.line_max_bytes):
        if row.values is None:
            raise BadRequest("invalid_dataset", f"Line {row.line} cannot be read any more.")
        yield row.line, chat.messages(row.values, how.format, how.mapping)


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


def _check_request(kind: str, mapping: dict[str, Any] | None) -> None:
    if kind not in ("auto", *chat.FORMATS):
        raise BadRequest(
            "unknown_format",
            f'There is no format "{kind[:40]}".',
            param="format",
            hint=f"Formats are: auto, {', '.join(chat.FORMATS)}.",
        )
    if kind == "mapping" and mapping is None:
        raise BadRequest("invalid_mapping", "Format mapping needs a mapping.", param="mapping")
    if mapping is not None and kind not in ("auto", "mapping"):
        raise BadRequest(
            "invalid_mapping", f"A mapping and format {kind} exclude each other.", param="format"
        )


def _decide(kind: str, mapping: dict[str, Any] | None, columns: list[str]) -> chat.Format:
    if mapping is not None:
        chat.check_mapping(mapping, columns)
        return "mapping"
    if kind == "auto":
        return chat.detect(columns)
    return next(known for known in chat.FORMATS if known == kind)
