"""JSON with one meaning: what its readers treat differently is refused, not guessed.

Refused are repeated keys, NaN and Infinity, numbers beyond a double, half surrogate pairs and NUL.
"""

import json
import math
import re
from typing import Any

import orjson

_ESCAPE = re.compile(r"\\.", re.DOTALL)
# Levels of nesting that are read where nothing else is said.
DEPTH = 32
_ESCAPES = re.compile(rb'\\(["\\u])').findall
_DOUBTFUL_BYTES = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_DOUBTFUL = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


class JsonError(ValueError):
    """`offset` is where reading ended, `end` where the value does that could be read but is refused."""

    def __init__(
        self,
        code: str,
        message: str,
        hint: str | None = None,
        offset: int | None = None,
        end: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.offset, self.end = code, message, hint, offset, end


class Number(float):
    """A float that remembers how it was written: put into a text it must not change."""

    __slots__ = ("written",)
    written: str


def loads_line(raw: bytes, *, depth: int) -> Any:
    """`loads` for UTF-8 bytes, several times as fast where nothing in them is doubtful.

    Raises:
        UnicodeDecodeError: the bytes are not UTF-8.
        JsonError: as `loads`.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return loads(raw.decode("utf-8"), depth=depth)
    strings = _strings(value, depth, floats=False)
    quotes = raw.count(b'"')
    if escapes := _ESCAPES(raw):
        quotes -= escapes.count(b'"')
        if b"\\" in escapes or (b"u" in escapes and _DOUBTFUL_BYTES.search(raw)):
            strings = None
    # orjson keeps the last of repeated keys, and makes floats of long numbers.
    if strings is None or quotes != 2 * strings:
        return loads(raw.decode("utf-8"), depth=depth)
    return value


def loads(text: str, *, depth: int) -> Any:
    """The value of a text that holds nothing else.

    Raises:
        JsonError: `invalid_json`, `too_deep`, `duplicate_key` or `invalid_text`.
    """
    start = 0 if text[:1] == "{" else len(text) - len(text.lstrip(" \t\r\n"))
    value, end = load_at(text, start, depth=depth)
    if end < len(text) and text[end:].strip(" \t\r\n"):
        raise JsonError("invalid_json", f"Not valid JSON: extra data at column {end + 1}.", offset=end)
    return value


def load_at(text: str, start: int, *, depth: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends. Raises as `loads`."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        message = f"Not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}."
        raise JsonError("invalid_json", message, offset=error.pos) from error
    except RecursionError:
        raise JsonError("too_deep", f"It is nested more than {depth} levels deep.") from None
    except ValueError as error:
        raise JsonError("invalid_json", f"Not valid JSON: {error}.") from error
    if (strings := _strings(value, depth)) is None:
        raise JsonError("too_deep", f"It is nested more than {depth} levels deep.", end=end)
    _check_keys(text, start, end, strings)
    if (match := _DOUBTFUL.search(text, start, end)) is not None and (bad := _no_text(value)):
        raise JsonError(
            "invalid_text", f"It holds {bad}, which is not text.", "Remove it.", match.start(), end
        )
    return value, end


def _check_keys(text: str, start: int, end: int, strings: int) -> None:
    """Every string of the text is in the value, or a key was there twice and its first value is lost."""
    if text.find("\\\\", start, end) < 0:
        quotes = text.count('"', start, end) - text.count('\\"', start, end)
    else:
        quotes = _ESCAPE.sub("", text[start:end]).count('"')
    if quotes != 2 * strings:
        try:
            json.loads(text[start:end], object_pairs_hook=_unique)
        except JsonError as error:
            error.end = end
            raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise JsonError(
                "duplicate_key", f'The key "{key[:60]}" stands twice in one object.', "Keep one of them."
            )
        values[key] = value
    return values


def _strings(value: Any, left: int, *, floats: bool = True) -> int | None:
    """How many strings a value holds, keys among them.

    None where it is nested more than `left` levels deep, or holds a float and must not.
    """
    kind = type(value)
    if kind is dict:
        count, items = len(value), value.values()
    elif kind is list:
        count, items = 0, value
    else:
        return None if kind is float and not floats else int(kind is str)
    if left == 0:
        return None
    for item in items:
        kind = type(item)
        if kind is str:
            count += 1
        elif kind is dict or kind is list or (kind is float and not floats):
            inner = _strings(item, left - 1, floats=floats)
            if inner is None:
                return None
            count += inner
    return count


def dumps(value: Any) -> str:
    """The value as JSON, its numbers as they were written."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name, ensure_ascii=False)}: {dumps(item)}" for name, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return value.written if isinstance(value, Number) else json.dumps(value, ensure_ascii=False)


def _no_text(value: Any) -> str | None:
    plain = json.dumps(value, ensure_ascii=False)
    try:
        plain.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return "a NUL character" if has_nul(value) else None


def has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(has_nul(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(has_nul(item) for item in value)


def _number(written: str) -> Number:
    value = Number(written)
    if not math.isfinite(value):
        raise ValueError(f"{written[:20]} is too large a number")
    value.written = written
    return value


def _integer(written: str) -> int:
    try:
        return int(written)
    except ValueError:
        raise ValueError(f"a number of {len(written)} digits") from None


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_float=_number, parse_int=_integer, parse_constant=_constant)
