"""What every reader of files gives, and the bounds it keeps to."""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from core import strict_json
from core.errors import BadRequest

FileType = Literal["jsonl", "json", "csv", "parquet"]

# Text packs to a tenth, very repetitive text to a hundredth; a bomb to a thousandth.
_MAX_RATIO = 200
_FREE_BYTES = 64 * 1024**2
_MARKS = re.compile(rb"\A(?:\xef\xbb\xbf)+")


@dataclass(frozen=True)
class Limits:
    """`line_bytes` bounds one row, `depth` its nesting; the others bound the file."""

    line_bytes: int = 4 * 1024**2
    unpacked_bytes: int = 8 * 1024**3
    rows: int = 10_000_000
    columns: int = 256
    depth: int = strict_json.DEPTH


class OutOfRange:
    """In place of a value of Parquet that Python cannot hold, such as a date in the year 100,000.

    It is an error only where somebody reads its column.
    """


class Problem(NamedTuple):
    """Why a row cannot be read. `ends`: nor can the rest of the file, whose rows have no borders any more."""

    code: str
    message: str
    hint: str | None = None
    ends: bool = False


class Row(NamedTuple):
    """`values`, or what is wrong with the row. `line` is the physical line; in Parquet, which has none, the row."""

    line: int
    values: dict[str, Any]
    problem: Problem | None = None


def broken(line: int, code: str, message: str, hint: str | None = None, *, ends: bool = False) -> Row:
    return Row(line, {}, Problem(code, message, hint, ends))


def without_marks(text: bytes) -> bytes:
    """The beginning of a file without its byte order mark, of which joined files have several."""
    return _MARKS.sub(b"", text, count=1)


def unsupported(message: str, hint: str | None = None) -> BadRequest:
    """The error of a file that holds no rows at all."""
    return BadRequest(
        "unsupported_file",
        message,
        param="file",
        hint=hint
        or "Upload JSON Lines (one JSON object a line), a JSON array, CSV with a header or Parquet; plain or gzip.",
    )


def check_ratio(unpacked: int, packed: int) -> None:
    """Raises BadRequest `unsupported_file` for a ratio that no real data has."""
    if unpacked > max(_FREE_BYTES, _MAX_RATIO * packed):
        raise unsupported(
            f"The file of {packed} bytes unpacks to more than {_MAX_RATIO} times its size: that is no data set.",
            "Upload it unpacked if it is one.",
        )


def too_large(limits: Limits) -> BadRequest:
    return BadRequest(
        "file_too_large",
        f"The unpacked file is larger than {limits.unpacked_bytes} bytes.",
        status=413,
        param="file",
        hint="Upload a part of it, or raise GRAFT_UNPACKED_MAX_BYTES.",
    )
