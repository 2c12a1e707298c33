"""Stored files as HTTP responses: ETag, conditional requests, one byte range, HEAD."""

import re
from collections.abc import Iterator
from datetime import datetime
from email.utils import format_datetime
from typing import IO
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from api.deps import Services
from api.errors import render
from core.errors import GraftError

_CHUNK = 1024 * 1024
_NOWHERE = (-1, -1)
# No file has a position of more.
_DIGITS = 18
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def respond(
    services: Services,
    request: Request,
    key: str,
    *,
    filename: str,
    etag: str,
    media_type: str,
    modified: datetime,
) -> Response:
    """The file under `key`, or the part of it that the request asks for.

    Raises:
        NotFound: `file_missing`.
    """
    headers = {
        "etag": f'"{etag}"',
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        "cache-control": "private, no-cache",
        "last-modified": format_datetime(modified, usegmt=True),
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if headers["etag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    size = services.storage.size(key)
    start, end = 0, size
    wanted = request.headers.get("range")
    if wanted and request.headers.get("if-range", headers["etag"]) == headers["etag"]:
        part = _part(wanted, size)
        if part == _NOWHERE:
            error = GraftError("range_not_satisfiable", f"The file has {size} bytes.", status=416)
            return render(error, {"content-range": f"bytes */{size}"})
        if part is not None:
            start, end = part
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    status = 206 if "content-range" in headers else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    file = services.storage.open(key)
    return StreamingResponse(_read(file, start, end), status, headers, media_type)


def _part(wanted: str, size: int) -> tuple[int, int] | None:
    """First and one-past-last byte; None for a range that is to be ignored (several, or malformed)."""
    match = _RANGE.fullmatch(wanted.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if max(len(first), len(last)) > _DIGITS:
        return _NOWHERE
    start, end = (
        (max(size - int(last), 0), size) if not first else (int(first), min(int(last or size), size - 1) + 1)
    )
    if first and last and int(last) < int(first):
        return None
    if start >= size or (not first and last == "0"):
        return _NOWHERE
    return start, end


def _read(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while start < end and (chunk := file.read(min(_CHUNK, end - start))):
            start += len(chunk)
            yield chunk
