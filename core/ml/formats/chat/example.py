"""What one row becomes: a conversation or a plain text; and what is wrong with a row that becomes neither."""

from typing import Any, NamedTuple, NotRequired, TypedDict

from core import strict_json
from core.strict_json import JsonError


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
