"""CSV and Parquet to rows."""

import csv
import itertools
import math
import re
from collections.abc import Generator, Iterator
from typing import IO, Any

from core import strict_json
from core.errors import BadRequest
from core.ml.formats.files.rows import (
    Limits,
    OutOfRange,
    Row,
    broken,
    check_ratio,
    too_large,
    unsupported,
    without_marks,
)

_SEPARATORS = ",;\t|"
_SPACED_QUOTE = re.compile(r'[ \t]+"')
_HEADER = 4096  # characters
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
        record = first_record(itertools.chain([first], source))
        source.given_back = record[::-1]
        marks = separators("".join(record))
        reader = csv.reader(source, delimiter=marks[0] if marks else ",", strict=True)
        header = [name.strip() for name in next(reader, [])]
        if (wrong := _wrong_header(first.strip(), header, marks, limits)) is not None:
            yield broken(start, "invalid_header", *wrong, ends=True)
            return
        source.new_record()
        start = source.line + 1
        for values in reader:
            if any(value.strip() for value in values):
                yield _record(start, header, values, source.record, reader.dialect.delimiter)
            source.new_record()
            start = source.line + 1
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


def _wrong_header(line: str, header: list[str], marks: str, limits: Limits) -> tuple[str, str | None] | None:
    """What is wrong with a header and what to do about it."""
    if re.fullmatch(r"sep=.?", line):
        return f'The first line is "{line}", which only Excel reads.', "Remove it."
    if len(marks) > 1:
        shown = " and ".join(f'"{mark}"' for mark in marks)
        return (
            f"The header has as many of {shown}: nobody knows which of them divides it.",
            "Put names that hold one of them in double quotes.",
        )
    if len(header) > limits.columns:
        return f"The header has {len(header)} columns; {limits.columns} are read.", None
    if "" in header:
        hint = (
            "pandas writes its row numbers so: save with to_csv(…, index=False)." if not header[0] else None
        )
        return f"Column {header.index('') + 1} of the header has no name.", hint
    if (quoted := next((name for name in header if re.match(r"\".|'.*'$", name)), None)) is not None:
        return (
            f"The column name {quoted[:60]} stands in quotation marks that CSV takes for a part of it.",
            "Quote with double quotes, and without a space before them, or not at all.",
        )
    if (twice := next((name for name in header if header.count(name) > 1), None)) is not None:
        return f'The header names the column "{twice[:60]}" more than once.', None
    return None


def _record(line: int, header: list[str], values: list[str], written: list[str], mark: str) -> Row:
    if len(values) != len(header):
        return broken(
            line,
            "wrong_number_of_fields",
            f"The row has {len(values)} fields, the header {len(header)}.",
            "Put fields that hold the separator or line breaks in double quotes.",
        )
    text = mark + "".join(written)
    if ' "' in text or '\t"' in text:
        for name, value in zip(header, values, strict=True):
            # A field of which this is the text is written in quotes, and the ones inside it are doubled.
            if _SPACED_QUOTE.match(value) and mark + value in text:
                message = (
                    f'Column "{name[:60]}" has a space before its quotation mark, so that both are its text.'
                )
                hint = "Remove the space between separator and quotation mark."
                return broken(line, "invalid_csv", message, hint)
    return Row(line, dict(zip(header, values, strict=True)))


def first_record(lines: Iterator[str]) -> list[str]:
    """The lines of the header: a name in quotes may hold line breaks, but not many."""
    found: list[str] = []
    for line in lines:
        found.append(line)
        parts = "".join(found).split('"')
        # An odd number of marks, the last of which begins a name: it goes on in the next line.
        if len(parts) % 2 or parts[-2][-1:] not in _SEPARATORS or sum(map(len, found)) > _HEADER:
            break
    return found


def separators(header: str) -> str:
    """What divides a header: the most frequent of comma, semicolon, tab and bar outside quotes; several in a tie."""
    bare = "".join(header.split('"')[::2])
    most = max(map(bare.count, _SEPARATORS))
    return "".join(mark for mark in _SEPARATORS if most and bare.count(mark) == most)


class _NulError(Exception):
    pass


class _Lines:
    """The decoded lines of a file. `line` counts them; those of one `record` are bounded together."""

    def __init__(self, file: IO[bytes], line_bytes: int) -> None:
        self.file, self.line_bytes = file, line_bytes
        self.given_back: list[str] = []  # the last of them first
        self.line = 0
        self.new_record()

    def new_record(self) -> None:
        self.record: list[str] = []
        self._record_bytes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.given_back:
            return self.given_back.pop()
        raw = self.file.readline(self.line_bytes + 1)
        if not raw:
            raise StopIteration
        self.line += 1
        self._record_bytes += len(raw)
        if self._record_bytes > self.line_bytes:
            raise csv.Error(f"the row is longer than {self.line_bytes} bytes")
        if b"\0" in raw:
            raise _NulError
        text = (without_marks(raw) if self.line == 1 else raw).decode("utf-8")
        self.record.append(text)
        return text


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
        groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
        at_once = max(1, min([_BATCH, *(_BATCH_BYTES // _row_bytes(group, texts) for group in groups)]))
        for batch in table.iter_batches(batch_size=at_once):
            for i in range(len(batch)):
                number += 1
                values = _values(batch.slice(i, 1))
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


def _row_bytes(group: Any, texts: list[str]) -> int:
    """What a row of a group may take in memory: its share, or the whole of columns with dictionaries of their own.

    A dictionary is stored once, but where it is not read as one, every row may hold its longest text.
    """
    chunks = [group.column(i) for i in range(group.num_columns)]
    folded: int = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema not in texts)
    mean: int = group.total_byte_size // max(1, group.num_rows)
    return max(1, folded, mean)


def _values(row: Any) -> dict[str, Any]:
    """The values of a batch of one row."""
    try:
        values: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError:
        raise
    except (ArithmeticError, LookupError, ValueError):
        return {name: _value(row.column(name)) for name in row.schema.names}
    return values


def _value(column: Any) -> Any:
    try:
        return column.to_pylist()[0]
    except UnicodeDecodeError:
        raise
    except (ArithmeticError, LookupError, ValueError):
        return OutOfRange()


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
    if isinstance(value, OutOfRange):
        return value
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
