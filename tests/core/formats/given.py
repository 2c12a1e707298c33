"""Files and rows that the tests of the formats share."""

import io
import json
from typing import Any

from core.ml.formats import validate
from core.ml.formats.files import read
from core.ml.formats.files.rows import FileType, Limits, Row
from core.ml.formats.validate import Report

GOOD = b'{"prompt": "a", "completion": "b"}'
LIMIT = 1024
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello there"}


def rows_of(data: bytes, kind: FileType, limit: int = LIMIT) -> list[Row]:
    """The rows of a file that is known to be of this kind."""
    return list(read.rows(io.BytesIO(data), kind, False, Limits(line_bytes=limit)))


def read_all(data: bytes, limits: Limits | None = None) -> list[Row]:
    """The rows of a file, its kind found by its content."""
    file = io.BytesIO(data)
    kind, packed = read.identify(file)
    return list(read.rows(file, kind, packed, limits or Limits()))


def problems(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.problem[0]) for row in found if row.problem is not None]


def jsonl(*rows: dict[str, Any] | str) -> bytes:
    """JSON Lines; a string is a line as it stands."""
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


def inspect(*rows: dict[str, Any] | str, **options: Any) -> Report:
    return validate.inspect(io.BytesIO(jsonl(*rows)), **options)


def pair(prompt: str, completion: str = "two words") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def codes(report: Report) -> dict[str, int]:
    """How often each warning was given."""
    return {warning["code"]: warning["count"] for warning in report.warnings}


def warning(report: Report, code: str) -> dict[str, Any]:
    return next(item for item in report.warnings if item["code"] == code)
