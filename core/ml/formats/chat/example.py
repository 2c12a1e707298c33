"""What one row becomes: a conversation or a plain text; and what is wrong with a row that becomes neither."""

import json
import math
from typing import Any, NamedTuple, NotRequired, TypedDict

from core import strict_json
from core.ml.formats.files.rows import OutOfRange
from core.strict_json import JsonError, Number


class Turn(TypedDict):
    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


class Conversation(NamedTuple):
    """`untrained` are the indexes of answers with weight 0; `unread` names fields that were passed over."""

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    unread: frozenset[str] = frozenset()


# A row that is trained: a conversation, or a plain text without turns.
Example = Conversation | str


class RowError(Exception):
    """What is wrong with one row, and where in it."""

    def __init__(self, field: str, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.field, self.code, self.message, self.hint = field, code, message, hint


def parsed(text: str, where: str) -> Any:
    """The value of a text that must be JSON. Raises RowError."""
    try:
        return strict_json.loads(text, depth=strict_json.DEPTH)
    except JsonError as error:
        raise RowError(
            where, "invalid_json", f"{where} holds text that is not JSON: {error.message}"
        ) from error


def text_of(row: dict[str, Any], column: str, *, optional: bool = False) -> str:
    """A column's text; numbers as they are written. Raises RowError."""
    value = row.get(column)
    if type(value) is str:
        return value
    if value is None:
        if optional:
            return ""
        raise RowError(column, "missing_field", f'The row has no "{column[:60]}".')
    if isinstance(value, Number):
        return value.written
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, bytes):
        raise RowError(column, "not_utf8", f'"{column}" holds bytes that are not UTF-8.')
    if isinstance(value, OutOfRange):
        message = (
            f'"{column[:60]}" is a date beyond the calendar, of an unknown time zone, or names a field twice.'
        )
        raise RowError(column, "not_text", message)
    raise RowError(column, "not_text", f'"{column[:60]}" is {kind_of(value)}, not text.')


def with_system(row: dict[str, Any], made: Conversation) -> Conversation:
    """The conversation with the row's column `system`, if it has one, as its first turn."""
    system = text_of(row, "system", optional=True)
    if not system:
        return made
    if made.turns[0]["role"] == "system":
        raise RowError("system", "two_systems", 'The row has a "system" column and a system message.')
    return made._replace(
        turns=[Turn(role="system", content=system), *made.turns],
        untrained=frozenset(i + 1 for i in made.untrained),
    )


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"
