"""A file of any kind to its rows, unpacked on the way, within limits."""

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Generator
from contextlib import suppress
from typing import IO

from core.errors import BadRequest
from core.ml.formats.files import detect, json_rows, tables
from core.ml.formats.files.rows import FileType, Limits, Row, check_ratio, too_large, without_marks

_BUFFER = 1024**2


def identify(file: IO[bytes]) -> tuple[FileType, bool]:
    """The type of an open file, and whether it is packed with gzip. Raises as `detect.file_type`."""
    file.seek(0)
    head = file.read(detect.HEAD)
    packed = head.startswith(detect.GZIP)
    file.seek(0)
    source = unpacked(file, Limits()) if packed else file
    try:
        head = source.read(detect.HEAD)
        while without_marks(head).isspace() and (more := source.read(detect.HEAD)):
            head = more
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(0) from error
    return detect.file_type(head), packed


def rows(file: IO[bytes], kind: FileType, packed: bool, limits: Limits) -> Generator[Row]:
    """Every row of an open file in order; broken ones carry their problem instead of values.

    Raises:
        BadRequest: the file as a whole: `unsupported_file`, `damaged_file`, `file_too_large`, `too_many_rows`.
    """
    file.seek(0)
    row = None
    try:
        source = unpacked(file, limits) if packed else file
        for number, row in enumerate(_read(source, kind, packed, limits), 1):
            if number > limits.rows:
                raise BadRequest(
                    "too_many_rows",
                    f"The file has more than {limits.rows} rows.",
                    status=413,
                    param="file",
                    hint="Upload a part of it, or raise GRAFT_ROWS_MAX.",
                )
            yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(row.line if row else 0) from error


def _read(file: IO[bytes], kind: FileType, packed: bool, limits: Limits) -> Generator[Row]:
    if kind == "jsonl":
        yield from json_rows.lines(file, limits)
    elif kind == "json":
        yield from json_rows.array(file, limits)
    elif kind == "csv":
        yield from tables.csv_rows(file, limits)
    elif not packed:
        yield from tables.parquet_rows(file, limits)
    else:
        # Parquet is read from its end.
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(file, whole)
            whole.seek(0)
            yield from tables.parquet_rows(whole, limits)


def unpacked(file: IO[bytes], limits: Limits) -> IO[bytes]:
    """What a gzip file holds, as a stream that ends with an error beyond the limits."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file), size, limits), _BUFFER)


def check_unpacked(file: IO[bytes], limits: Limits) -> None:
    """Refuse a bomb before its millions of rows are read: to unpack is many times as fast as to read.

    Raises:
        BadRequest: `unsupported_file` or `file_too_large`. Damage is left to `rows`, which knows the line.
    """
    source = unpacked(file, limits)
    with suppress(EOFError, gzip.BadGzipFile, zlib.error):
        while source.read(_BUFFER):
            pass


class _Bounded(io.RawIOBase):
    """What a gzip file holds, up to a size and to a ratio that no real data has."""

    def __init__(self, source: gzip.GzipFile, packed_bytes: int, limits: Limits) -> None:
        self.source, self.packed_bytes, self.limits, self.count = source, packed_bytes, limits, 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        count = self.source.readinto(target)
        self.count += count
        if self.count > self.limits.unpacked_bytes:
            raise too_large(self.limits)
        check_ratio(self.count, self.packed_bytes)
        return count


def _damaged(line: int) -> BadRequest:
    where = f" after line {line}" if line else ""
    return BadRequest(
        "damaged_file",
        f"The gzip file is damaged or cut short{where}.",
        param="file",
        hint="Pack and upload it again.",
    )
