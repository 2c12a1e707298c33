"""Files to raw rows: JSON Lines and CSV, one row at a time, with the physical line of each."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from core.errors import BadRequest

FileType = Literal["jsonl", "csv"]
MAX_DEPTH = 32
MAX_COLUMNS = 256

_OTHER_TYPES = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"%PDF": "a PDF document",
    b"GGUF": "a GGUF model",
}


@dataclass(frozen=True)
class Row:
    """`values`, or where the line could not be read, what is wrong with it."""

    line: int
    values: dict[str, Any] | None
    problem: tuple[str, str, str | None] | None = None


def file_type(path: Path) -> FileType:
    """Which kind of file this is, by its content.

    Raises:
        BadRequest: `unsupported_file`, saying what it looks like.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        while head.isspace() and (more := file.read(4096)):
            head = more
    for magic, what in _OTHER_TYPES.items():
        if head.startswith(magic):
            raise _unsupported(f"The file is {what}, not JSON Lines or CSV.")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise BadRequest("empty_file", "The file has no rows.", param="file")
    if b"\x00" in head:
        raise _unsupported("The file holds binary data, not text.")
    if start.startswith(b"["):
        raise _unsupported("The file is one JSON array; write one JSON object a line (JSON Lines) instead.")
    if start[:1] in b"{":
        return "jsonl"
    if start[:9].lower().startswith((b"<!doctype", b"<html")):
        raise _unsupported("The file is an HTML page, perhaps a login or error page saved in its place.")
    if b"," in start.split(b"\n", 1)[0]:
        return "csv"
    # Not a table, so most likely JSON Lines with a broken first line: its reader says what is wrong.
    return "jsonl"


def rows(file: IO[bytes], kind: FileType, *, line_max_bytes: int) -> Iterator[Row]:
    """Every row of an open file in order; broken ones carry their problem instead of values."""
    return _jsonl(file, line_max_bytes) if kind == "jsonl" else _csv(file, line_max_bytes)


def _jsonl(file: IO[bytes], line_max_bytes: int) -> Iterator[Row]:
    number = 0
    while raw := file.readline(line_max_bytes + 1):
        number += 1
        if len(raw) > line_max_bytes and not raw.endswith(b"\n"):
            yield Row(
                number,
                None,
                ("line_too_long", f"The line is longer than {line_max_bytes} bytes.", None),
            )
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(line_max_bytes)
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield _parse(number, raw)


def _parse(number: int, raw: bytes) -> Row:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Row(
            number,
            None,
            (
                "not_utf8",
                f"Byte {error.start + 1} of the line is not UTF-8.",
                "Save the file as UTF-8.",
            ),
        )
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        return Row(
            number,
            None,
            (
                "invalid_json",
                f"Not valid JSON: {error.msg} at column {error.colno}.",
                "Write one complete JSON object on each line.",
            ),
        )
    except (RecursionError, ValueError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Row(number, None, ("invalid_json", f"Not valid JSON: {what}.", None))
    if not isinstance(value, dict):
        return Row(
            number,
            None,
            (
                "not_an_object",
                f"The line is a JSON {_json_name(value)}, not an object.",
                'Each line must be an object such as {"messages": […]}.',
            ),
        )
    if _deeper(value, MAX_DEPTH):
        return Row(
            number,
            None,
            ("too_deep", f"The row is nested more than {MAX_DEPTH} levels deep.", None),
        )
    if (bad := _unwritable(text)) is not None:
        return Row(number, None, ("invalid_text", f"The row holds {bad}, which is not text.", "Remove it."))
    return Row(number, value)


def _csv(file: IO[bytes], line_max_bytes: int) -> Iterator[Row]:
    reader = csv.reader(_text_lines(file, line_max_bytes), strict=True)
    csv.field_size_limit(line_max_bytes)
    start = 1
    try:
        header = [name.strip() for name in next(reader)]
        if len(header) > MAX_COLUMNS or len(set(header)) != len(header) or "" in header:
            yield Row(
                1,
                None,
                (
                    "invalid_header",
                    f"The header must name each column once, at most {MAX_COLUMNS}.",
                    None,
                ),
            )
            return
        start = reader.line_num + 1
        for values in reader:
            if any(value.strip() for value in values):
                if len(values) == len(header):
                    yield Row(start, dict(zip(header, values, strict=True)))
                else:
                    yield Row(
                        start,
                        None,
                        (
                            "wrong_number_of_fields",
                            f"The row has {len(values)} fields, the header {len(header)}.",
                            "Put fields that hold commas or line breaks in double quotes.",
                        ),
                    )
            start = reader.line_num + 1
    except _NulError:
        yield Row(
            start, None, ("invalid_text", "The row holds a NUL character, which is not text.", "Remove it.")
        )
    except csv.Error as error:
        yield Row(start, None, ("invalid_csv", f"Not valid CSV: {error}.", None))
    except UnicodeDecodeError:
        yield Row(
            start,
            None,
            ("not_utf8", "The file is not UTF-8 from this line on.", "Save the file as UTF-8."),
        )


class _NulError(Exception):
    pass


def _text_lines(file: IO[bytes], line_max_bytes: int) -> Iterator[str]:
    first = True
    while raw := file.readline(line_max_bytes + 1):
        if len(raw) > line_max_bytes:
            raise csv.Error(f"a line is longer than {line_max_bytes} bytes")
        if b"\0" in raw:
            raise _NulError
        yield (raw.removeprefix(b"\xef\xbb\xbf") if first else raw).decode("utf-8")
        first = False


def _deeper(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if left == 0:
        return True
    return any(_deeper(item, left - 1) for item in (value.values() if isinstance(value, dict) else value))


def _unwritable(text: str) -> str | None:
    # Escapes are the only way such characters get into a decoded line.
    if "\\u" not in text:
        return None
    plain = json.dumps(json.loads(text), ensure_ascii=False)
    try:
        plain.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return "a NUL character" if _has_nul(json.loads(text)) else None


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(_has_nul(item) for item in value)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _json_name(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _unsupported(message: str) -> BadRequest:
    return BadRequest(
        "unsupported_file",
        message,
        param="file",
        hint="Upload JSON Lines (one JSON object a line) or CSV with a header, in UTF-8.",
    )
