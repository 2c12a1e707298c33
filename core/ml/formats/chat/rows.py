"""A row of a known format to the example that is trained."""

import re
from collections.abc import Callable
from typing import Any, Literal

from core import strict_json
from core.ml.formats.chat import mapping, messages
from core.ml.formats.chat.calls import in_order_of_calls, tools_of
from core.ml.formats.chat.example import Conversation, Example, RowError, Turn, text_of, with_system
from core.ml.formats.chat.mapping import Mapping
from core.strict_json import JsonError

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
# How self-instruct writes that an instruction has no input.
_NO_INPUT = "<noinput>"

# How JSON and Python begin a list of messages.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']""")

Reader = Callable[[dict[str, Any]], Example]


def reader(kind: Format, by: Mapping | None) -> Reader:
    """The function from a row to its example; it raises RowError. Formats text and mapping need a mapping."""
    if by is not None:
        read, columns = mapping.reader(by), mapping.columns_of(by)
    else:
        read, columns = _READERS[kind], COLUMNS[kind]
    meaningful = [name for name in _MEANINGFUL if name not in columns]

    def row_of(row: dict[str, Any]) -> Example:
        if len(row) > 1:
            for name in meaningful:
                if row.get(name) not in (None, "", [], {}):
                    message = f'The row has "{name}", which would be ignored.'
                    raise RowError(name, "unknown_field", message, _way_out(name, kind, by))
        return read(row)

    return row_of


def _way_out(name: str, kind: Format, by: Mapping | None) -> str:
    if name == "weight":
        return "Leave out the rows that must not be trained, and the column."
    if name == "system" and kind == "messages":
        return 'Pass mapping={"messages": "messages"}, which reads it too, or remove the column.'
    if by is not None and not isinstance(by.get("messages"), str):
        return f"Put {{{name}}} into a text of the mapping, or remove the column."
    return "Remove the column, or say in a mapping what to do with it."


def _sharegpt(row: dict[str, Any]) -> Example:
    items = row.get("conversations")
    keys = messages.SHAREGPT
    if isinstance(items, list) and items and isinstance(items[0], dict) and "from" not in items[0]:
        keys = messages.Keys("conversations", roles=messages.SHAREGPT_ROLES)
    return with_system(row, messages.conversation(row, keys))


def _prompt_completion(row: dict[str, Any]) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if type(prompt) is type(completion) is str and "[" in (prompt.lstrip()[:1], completion.lstrip()[:1]):
        prompt, completion = _both_lists(prompt, completion)
    if not isinstance(prompt, list) and not isinstance(completion, list):
        turns = [
            Turn(role="user", content=text_of(row, "prompt")),
            Turn(role="assistant", content=text_of(row, "completion")),
        ]
        return with_system(row, Conversation(turns, tools_of(row)))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowError(
            "completion", "not_text", "prompt and completion must both be text, or both lists of messages."
        )
    before, _, unread = messages.parse_after([], prompt, messages.Keys("prompt"))
    after, untrained, more_unread = messages.parse_after(before, completion, messages.Keys("completion"))
    count = len(before)
    turns = in_order_of_calls(
        before + after, lambda i: f"prompt[{i}]" if i < count else f"completion[{i - count}]"
    )
    asked = frozenset(i for i, turn in enumerate(before) if turn["role"] == "assistant")
    untrained = asked | {count + i for i in untrained}
    whole = Conversation(turns, tools_of(row), untrained, unread | more_unread)
    return messages.checked(with_system(row, whole), "completion")


def _both_lists(prompt: str, completion: str) -> tuple[Any, Any]:
    """Both parts as the lists of messages that their texts hold; as they are where neither looks like one.

    Raises:
        RowError: `invalid_json`, one looks like messages that a program wrote into a text, and cannot be read so.
    """
    parts = {"prompt": prompt, "completion": completion}
    lists = [_messages(text) for text in parts.values()]
    if all(lists):
        return lists[0], lists[1]
    for name, text in parts.items():
        if _MESSAGES.match(text):
            raise RowError(
                name,
                "invalid_json",
                f'"{name}" looks like a list of messages, but prompt and completion are not both such lists in JSON.',
                'Write both as lists; or pass mapping={"prompt": "{prompt}", "completion": "{completion}"} to train '
                "the texts as they stand.",
            )
    return prompt, completion


def _messages(text: str) -> Any:
    try:
        items = strict_json.loads(text, depth=strict_json.DEPTH)
    except JsonError:
        return None
    chats = isinstance(items, list) and all(isinstance(item, dict) and "role" in item for item in items)
    return items if chats else None


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
    question, extra = text_of(row, "instruction"), text_of(row, "input", optional=True)
    if extra.strip().lower() not in ("", _NO_INPUT):
        question = f"{question}\n\n{extra}" if question.strip() else extra
    turns += [Turn(role="user", content=question), Turn(role="assistant", content=text_of(row, "output"))]
    return with_system(row, Conversation(turns))


_READERS: dict[Format, Reader] = {
    "messages": messages.conversation,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}
