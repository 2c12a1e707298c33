"""CSV and Parquet to rows."""

import csv
import math
from collections.abc import Generator
from typing import IO, Any

from core import strict_json
from core.errors import BadRequest
from core.ml.formats.files.rows import Limits, Row, broken, check_ratio, too_large, unsupported

DELIMITERS = ",;\t|"
_BATCH = 256
# What a batch of Parquet rows may take.
_BATCH_BYTES = 256 * 1024**2


def csv_rows(file: IO[bytes], limits: Limits) -> Generator[Row]:
    """One row a record, with the line it begins on. Broken quoting, NUL and bytes that are no text end the reading."""
    csv.field_size_limit(limits.line_bytes)
    source = _Lines(file, limits.line_bytes)
    start = 1
    try:
        while (first := next(source, "")) and not first.strip():
            start += 1
        source.given_back = first
        reader = csv.reader(source, delimiter=delimiter(first), strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(header) > limits.columns or len(set(header)) != len(header) or "" in header:
            yield broken(start, "invalid_header", _header_problem(header, limits), ends=True)
            return
        source.record_bytes, start = 0, source.line + 1
        for values in reader:
            if any(value.strip() for value in values):
                yield _record(start, header, values)
            source.record_bytes, start = 0, source.line + 1
    except _NulError:
        yield broken(
            start,
            "invalid_text",
            "The row holds a NUL character, which is not text.",
            "Remove it.",
            ends=True,
        )
    except csv.Error as error:
        what, hint = str(error), "Is a quotation mark missing or too many?"
        if what.startswith("new-line character"):
            what, hint = "a line ends in CR alone", "Save the file with LF or CRLF at the end of each line."
        yield broken(start, "invalid_csv", f"Not valid CSV: {what}.", hint, ends=True)
    except UnicodeDecodeError:
        message = "The file is not UTF-8 from this line on."
        yield broken(start, "not_utf8", message, "Save the file as UTF-8.", ends=True)


def _header_problem(header: list[str], limits: Limits) -> str:
    if len(header) > limits.columns:
        return f"The header has {len(header)} columns; {limits.columns} are read."
    if "" in header:
        return f"Column {header.index('') + 1} of the header has no name."
    twice = next(name for name in header if header.count(name) > 1)
    return f'The header names the column "{twice[:60]}" more than once.'


def _record(line: int, header: list[str], values: list[str]) -> Row:
    if len(values) == len(header):
        return Row(line, dict(zip(header, values, strict=True)))
    return broken(
        line,
        "wrong_number_of_fields",
        f"The row has {len(values)} fields, the header {len(header)}.",
        "Put fields that hold the separator or line breaks in double quotes.",
    )


def delimiter(header: str) -> str:
    """The separator of a header line: the most frequent of comma, semicolon, tab and bar outside quotes."""
    bare = "".join(header.split('"')[::2])
    return max(DELIMITERS, key=bare.count)


class _NulError(Exception):
    pass


class _Lines:
    """The decoded lines of a file. `line` counts them, `record_bytes` bounds those of one record."""

    def __init__(self, file: IO[bytes], line_bytes: int) -> None:
        self.file, self.line_bytes, self.given_back = file, line_bytes, ""
        self.line = self.record_bytes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.given_back:
            text, self.given_back = self.given_back, ""
            return text
        raw = self.file.readline(self.line_bytes + 1)
        if not raw:
            raise StopIteration
        self.line += 1
        self.record_bytes += len(raw)
        if self.record_bytes > self.line_bytes:
            raise csv.Error(f"the row is longer than {self.line_bytes} bytes")
        if b"\0" in raw:
            raise _NulError
        return raw.removeprefix(b"\xef\xbb\xbf" if self.line == 1 else b"").decode("utf-8")


def parquet_rows(file: IO[bytes], limits: Limits) -> Generator[Row]:
    """Raises BadRequest `unsupported_file`, `file_too_large` or `too_many_columns` by what the file says of itself."""
    import pyarrow as pa  # noqa: PLC0415 - 40 MB, and few data sets are Parquet
    from pyarrow import parquet  # noqa: PLC0415

    number = unpacked = 0
    try:
        schema = parquet.read_schema(file)
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        # What stands once in the file stands once in memory.
        table = parquet.ParquetFile(file, pre_buffer=False, read_dictionary=texts)
        facts = table.metadata
        sizes = [facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)]
        if sum(sizes) > limits.unpacked_bytes:
            raise too_large(limits)
        packed = file.seek(0, 2)
        check_ratio(sum(sizes), packed)
        names = table.schema_arrow.names
        if len(names) > limits.columns:
            message = f"The file has {len(names)} columns; {limits.columns} are read."
            raise BadRequest("too_many_columns", message, param="file")
        if len(set(names)) < len(names):
            raise BadRequest("invalid_header", "Two columns of the file have the same name.", param="file")
        # A dictionary is stored once, but every row may hold its longest text.
        at_once = min(_BATCH, max(1, _BATCH_BYTES // max([1, *sizes])))
        for batch in table.iter_batches(batch_size=at_once):
            for i in range(len(batch)):
                number += 1
                values = batch.slice(i, 1).to_pylist()[0]
                size = _characters(values)
                unpacked += size
                if unpacked > limits.unpacked_bytes:
                    raise too_large(limits)
                check_ratio(unpacked, packed)
                yield _parquet_row(number, values, size, limits)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f" after row {number}" if number else ""
        raise unsupported(
            f"The file begins like Parquet but cannot be read{where}: {str(error).splitlines()[0][:200]}",
            "Write it again; it may be cut short.",
        ) from error


def _parquet_row(number: int, values: dict[str, Any], size: int, limits: Limits) -> Row:
    if size > limits.line_bytes:
        message = f"The row has {size} characters; {limits.line_bytes} are read."
        return broken(number, "line_too_long", message)
    try:
        values = {name: _cell(value, limits.depth - 1) for name, value in values.items()}
    except UnicodeDecodeError:
        return broken(number, "not_utf8", "The row holds bytes that are not UTF-8.", "Leave that column out.")
    except RecursionError:
        return broken(number, "too_deep", f"It is nested more than {limits.depth} levels deep.")
    if strict_json.has_nul(values):
        return broken(
            number, "invalid_text", "The row holds a NUL character, which is not text.", "Remove it."
        )
    return Row(number, {name: value for name, value in values.items() if value is not None})


def _cell(value: Any, left: int) -> Any:
    """A column may hold bytes that are no text, such as pictures, as long as nobody reads it."""
    try:
        return _json_like(value, left)
    except UnicodeDecodeError:
        if isinstance(value, bytes):
            return value
        raise


def _json_like(value: Any, left: int) -> Any:
    """What JSON would hold. A struct column gives every field to every value; one that is not there comes as None."""
    if isinstance(value, dict | list | tuple):
        if left == 0:
            raise RecursionError
        if isinstance(value, dict):
            made = {name: _json_like(item, left - 1) for name, item in value.items()}
            return {name: item for name, item in made.items() if item is not None}
        return [_json_like(item, left - 1) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and not math.isinf(value):
        return None if math.isnan(value) else value  # what pandas writes for a value that is missing
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)  # a date, an exact decimal


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str | bytes) else 0
