"""JSON Lines and JSON arrays to rows, in bounded memory."""

import codecs
import re
from collections.abc import Generator
from typing import IO

from core import strict_json
from core.ml.formats.files.rows import Limits, Row, broken, without_marks
from core.strict_json import JsonError

_CHUNK = 1024**2
_REST = "The rest of the array is not read."
_COLUMN = re.compile(r" at column \d+")
# An escape or a literal that is cut is not longer.
_NEAR = 16
_SPACE = re.compile(r"[ \t\r\n]*")


def lines(file: IO[bytes], limits: Limits) -> Generator[Row]:
    """One row a line; blank lines are no rows. A broken line does not end the reading."""
    depth, columns = limits.depth, limits.columns
    for number, raw in raw_lines(file, limits):
        if raw is None:
            yield _too_long(number, limits)
            continue
        if not raw or raw.isspace():
            continue
        try:
            value = strict_json.loads_line(raw, depth=depth)
        except (UnicodeDecodeError, JsonError) as error:
            yield _unreadable(number, raw, error)
            continue
        if type(value) is dict and len(value) <= columns:
            yield Row(number, value)
        else:
            yield _row(number, value, limits)


def raw_lines(file: IO[bytes], limits: Limits) -> Generator[tuple[int, bytes | None]]:
    """(number, bytes) of every line, the first without byte order marks; None for one that is too long."""
    number = 0
    while raw := file.readline(limits.line_bytes + 1):
        number += 1
        if len(raw) > limits.line_bytes and not raw.endswith(b"\n"):
            yield number, None
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(limits.line_bytes)
        else:
            yield number, raw if number > 1 else without_marks(raw)


def _unreadable(number: int, raw: bytes, error: UnicodeDecodeError | JsonError) -> Row:
    if isinstance(error, UnicodeDecodeError):
        message = f"Byte {error.start + 1} of the line is not UTF-8."
        return broken(number, "not_utf8", message, "Save the file as UTF-8.")
    hint = error.hint or "Write one complete JSON object on each line."
    text = raw.decode("utf-8").rstrip()
    if text.startswith("\ufeff"):
        message = "The line begins with a byte order mark, which may stand only at the beginning of a file."
        return broken(number, error.code, message, "Remove it; joining files leaves it there.")
    if error.offset is not None and text.find("\r", 0, error.offset + 1) >= 0:
        message = "A line ends in CR alone, so that what follows is taken for the same line."
        return broken(number, error.code, message, "Save the file with LF or CRLF at the end of each line.")
    if error.offset is not None and error.offset >= len(text) and text.lstrip()[:1] in ("{", "["):
        hint = "It goes on in the next line: write each object on one line, or all of them as a JSON array."
    return broken(number, error.code, error.message, hint)


def _row(line: int, value: object, limits: Limits) -> Row:
    if not isinstance(value, dict):
        name = {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
        hint = 'Each row must be an object such as {"messages": […]}.'
        if name == "string" and line == 1:
            hint += " If the file is CSV with a single column, give that a name without spaces, such as text."
        return broken(line, "not_an_object", f"The row is a JSON {name}, not an object.", hint)
    if len(value) > limits.columns:
        return broken(
            line, "too_many_columns", f"The row has {len(value)} columns; {limits.columns} are read.", None
        )
    return Row(line, value)


def array(file: IO[bytes], limits: Limits) -> Generator[Row]:
    """One row an element, with the line it begins on. Broken syntax ends the reading: the rest has no borders."""
    window = _Window(file)
    try:
        while window.skip() == "\ufeff":
            window.pos += 1
        window.pos += 1  # the bracket, which detection has seen
        if window.skip() == "]":
            window.pos += 1
        else:
            yield from _elements(window, limits)
        if window.skip():
            message = "Something follows the end of the array."
            yield broken(window.line, "invalid_json", message, ends=True)
    except UnicodeDecodeError:
        message = "The file is not UTF-8 from this line on."
        yield broken(window.line_of_end(), "not_utf8", message, "Save it as UTF-8.", ends=True)


def _elements(window: "_Window", limits: Limits) -> Generator[Row]:
    while True:
        line = window.line
        try:
            value = window.take(limits)
        except JsonError as error:
            if error.end is None:
                at = window.line_at(error.offset)
                message = _COLUMN.sub("", error.message)  # of a window, not of a line
                yield broken(at, error.code, message, error.hint or _REST, ends=True)
                window.finish()
                return
            yield broken(line, error.code, error.message, error.hint)
            window.pos = error.end
        else:
            yield _row(line, value, limits)
        mark = window.skip()
        window.pos += 1
        if mark == "]":
            return
        if mark != ",":
            what = f'"{mark}"' if mark else "the end of the file"
            yield broken(
                window.line,
                "invalid_json",
                f"Not valid JSON: after an element comes {what} instead of a comma or a bracket.",
                _REST,
                ends=True,
            )
            window.finish()
            return
        window.skip()


class _Window:
    """A part of the file's text. `line` is the physical line of `pos`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.text, self.pos, self.line, self.ended = file, "", 0, 1, False
        self._counted = 0
        self._bad: UnicodeDecodeError | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def more(self) -> bool:
        """Read on, forgetting what lies before `pos`; False at the end of the file.

        Raises:
            UnicodeDecodeError: all that stands before the bad byte was given before.
        """
        if self._bad is not None:
            raise self._bad
        if self.ended:
            return False
        chunk = self.file.read(_CHUNK)
        self.ended = not chunk
        try:
            text = self._decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            self._bad = error
            text = error.object[: error.start].decode("utf-8")
        self._count()
        self.text = self.text[self.pos :] + text
        self.pos = self._counted = 0
        return True

    def skip(self) -> str:
        """Pass over white space; the next character, or "" at the end of the file."""
        while True:
            self.pos = _SPACE.match(self.text, self.pos).end()  # type: ignore[union-attr]
            if self.pos < len(self.text):
                self._count()
                return self.text[self.pos]
            if not self.more():
                self._count()
                return ""

    def take(self, limits: Limits) -> object:
        """The value at `pos`. Raises JsonError."""
        while True:
            try:
                value, end = strict_json.load_at(self.text, self.pos, depth=limits.depth)
            except JsonError as error:
                if error.code != "invalid_json":
                    raise
                if not self._may_go_on(error):
                    raise
                if len(self.text) - self.pos > limits.line_bytes:
                    raise _too_long_error(limits, error) from error
                if not self.more():
                    raise
                continue
            if end == len(self.text) and self.more():
                continue  # the value may go on
            if end - self.pos > limits.line_bytes:
                raise _too_long_error(limits, None)
            self.pos = end
            return value

    def _may_go_on(self, error: JsonError) -> bool:
        """Whether more text may mend it: only if it is at the end of the text, or a string is open there."""
        if error.offset is None:
            return False
        return "Unterminated" in error.message or len(self.text[error.offset :].strip()) <= _NEAR

    def line_at(self, offset: int | None) -> int:
        return self.line if offset is None else self.line + self.text.count("\n", self.pos, offset)

    def line_of_end(self) -> int:
        return self.line + self.text.count("\n", self.pos)

    def finish(self) -> None:
        """Nothing more is read."""
        self.text, self.pos, self._counted, self.ended = "", 0, 0, True

    def _count(self) -> None:
        self.line += self.text.count("\n", self._counted, self.pos)
        self._counted = self.pos


def _too_long(line: int, limits: Limits) -> Row:
    return broken(line, "line_too_long", f"The line is longer than {limits.line_bytes} bytes.", None)


def _too_long_error(limits: Limits, error: JsonError | None) -> JsonError:
    return JsonError(
        "line_too_long",
        f"From here on no element ends within {limits.line_bytes} characters.",
        "Is a bracket or a quotation mark missing?" if error else None,
    )
