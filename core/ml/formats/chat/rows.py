"""A row of a known format to the example that is trained."""

from collections.abc import Callable
from typing import Any, Literal

from core.ml.formats.chat import mapping, messages
from core.ml.formats.chat.calls import tools_of
from core.ml.formats.chat.example import Conversation, Example, RowError, Turn
from core.ml.formats.chat.mapping import Mapping, text_of

Format = Literal["messages", "prompt_completion", "text", "alpaca", "sharegpt", "mapping"]
FORMATS: tuple[Format, ...] = ("messages", "prompt_completion", "text", "alpaca", "sharegpt", "mapping")
# The columns that each format reads.
COLUMNS: dict[Format, frozenset[str]] = {
    "messages": frozenset({"messages", "tools", "functions", "parallel_tool_calls"}),
    "sharegpt": frozenset({"conversations", "tools", "system"}),
    "prompt_completion": frozenset({"prompt", "completion", "tools", "system"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "text": frozenset({"text"}),
    "mapping": frozenset(),
}
# What would change the training if it were passed over.
_MEANINGFUL = ("system", "tools", "functions", "history", "weight")

Reader = Callable[[dict[str, Any]], Example]


def reader(kind: Format, by: Mapping | None) -> Reader:
    """The function from a row to its example; it raises RowError. Formats text and mapping need a mapping."""
    if by is not None:
        return mapping.reader(by)
    read = {
        "messages": messages.conversation,
        "sharegpt": _sharegpt,
        "prompt_completion": _prompt_completion,
        "alpaca": _alpaca,
    }[kind]
    columns = COLUMNS[kind]
    meaningful = [name for name in _MEANINGFUL if name not in columns]

    def row_of(row: dict[str, Any]) -> Example:
        if len(row) > 1:
            for name in meaningful:
                if row.get(name) not in (None, "", [], {}):
                    hint = "Remove the column, or say in a mapping what to do with it."
                    raise RowError(
                        name, "unknown_field", f'The row has "{name}", which would be ignored.', hint
                    )
        return read(row)

    return row_of


def _sharegpt(row: dict[str, Any]) -> Example:
    items = row.get("conversations")
    keys = messages.SHAREGPT
    if isinstance(items, list) and items and isinstance(items[0], dict) and "from" not in items[0]:
        keys = messages.Keys("conversations", roles=messages.SHAREGPT_ROLES)
    return _with_system(row, messages.conversation(row, keys))


def _prompt_completion(row: dict[str, Any]) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        turns = [
            Turn(role="user", content=text_of(row, "prompt")),
            Turn(role="assistant", content=text_of(row, "completion")),
        ]
        return _with_system(row, Conversation(turns, tools_of(row)))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowError(
            "completion", "not_text", "prompt and completion must both be text, or both lists of messages."
        )
    before, _, unread = messages.parse(prompt, messages.Keys("prompt"))
    after, untrained, more_unread = messages.parse(completion, messages.Keys("completion"))
    asked = frozenset(i for i, turn in enumerate(before) if turn["role"] == "assistant")
    untrained = asked | {len(before) + i for i in untrained}
    whole = Conversation(before + after, tools_of(row), untrained, unread | more_unread)
    return messages.checked(_with_system(row, whole), "completion")


def _alpaca(row: dict[str, Any]) -> Example:
    turns: list[Turn] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("history", "not_text", '"history" must be a list of [question, answer].')
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(
                f"history[{i}]", "not_text", f"history[{i}] must be [question, answer], both text."
            )
        turns += [Turn(role="user", content=pair[0]), Turn(role="assistant", content=pair[1])]
    question = text_of(row, "instruction")
    if extra := text_of(row, "input", optional=True):
        question += f"\n\n{extra}"
    turns += [Turn(role="user", content=question), Turn(role="assistant", content=text_of(row, "output"))]
    return _with_system(row, Conversation(turns))


def _with_system(row: dict[str, Any], made: Conversation) -> Conversation:
    system = text_of(row, "system", optional=True)
    if not system:
        return made
    if made.turns[0]["role"] == "system":
        raise RowError("system", "two_systems", 'The row has a "system" column and a system message.')
    return made._replace(
        turns=[Turn(role="system", content=system), *made.turns],
        untrained=frozenset(i + 1 for i in made.untrained),
    )
