"""Rows to conversations: OpenAI messages, prompt and completion, Alpaca, and tables through a mapping."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from core.errors import BadRequest, nearest

Format = Literal["messages", "prompt_completion", "alpaca", "mapping"]
FORMATS: tuple[Format, ...] = ("messages", "prompt_completion", "alpaca", "mapping")
ROLES = ("system", "user", "assistant")
# Characters of one message that a mapping makes: more than any model reads.
MAX_TURN = 4 * 1024**2

# {{name}} is a literal {name}; braces around anything that is no name, as in JSON, stay as they are.
_PLACE = re.compile(r"\{\{(\w[\w -]*)\}\}|\{(\w[\w -]*)\}")
# What would change the training if it were not passed over.
_MEANINGFUL = ("system", "tools", "functions", "history", "weight")
_SAME_ROLE = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}


class Turn(TypedDict):
    role: str
    content: str


class RowError(Exception):
    """What is wrong with one row, and where in it."""

    def __init__(self, field: str, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.field, self.code, self.message, self.hint = field, code, message, hint


def detect(columns: Sequence[str]) -> Format:
    """The format that a table with these columns has.

    Raises:
        BadRequest: `unknown_format`, with the mapping to use.
    """
    names = set(columns)
    if "messages" in names:
        return "messages"
    if {"prompt", "completion"} <= names:
        return "prompt_completion"
    if {"instruction", "output"} <= names:
        return "alpaca"
    question, answer = (columns[0], columns[-1]) if len(columns) > 1 else ("question", "answer")
    example = [
        {"role": "user", "content": f"{{{question}}}"},
        {"role": "assistant", "content": f"{{{answer}}}"},
    ]
    raise BadRequest(
        "unknown_format",
        f"Columns {', '.join(columns) or 'none'} are no format that is read without a mapping.",
        param="mapping",
        hint=f"Say in a mapping which columns play which part, for example {json.dumps({'messages': example})}",
    )


def check_mapping(mapping: Any, columns: Sequence[str]) -> None:
    """Raise BadRequest `invalid_mapping` unless `mapping` fits a table with these columns."""

    def wrong(message: str, hint: str | None = None) -> BadRequest:
        return BadRequest("invalid_mapping", message, param="mapping", hint=hint)

    turns = mapping.get("messages") if isinstance(mapping, dict) else None
    if (
        not isinstance(mapping, dict)
        or set(mapping) != {"messages"}
        or not isinstance(turns, list)
        or not turns
    ):
        raise wrong('A mapping is {"messages": [{"role": …, "content": "text with {column}"}, …]}.')
    for i, turn in enumerate(turns):
        if (
            not isinstance(turn, dict)
            or set(turn) != {"role", "content"}
            or not isinstance(turn["content"], str)
        ):
            raise wrong(f"mapping.messages[{i}] must have a role and a content, both text.")
        if turn["role"] not in ROLES:
            raise wrong(f'mapping.messages[{i}].role is "{turn["role"]}"; expected {", ".join(ROLES)}.')
        for place in _PLACE.finditer(turn["content"]):
            if (name := place.group(2)) is not None and name not in columns:
                near = nearest(name, columns)
                raise wrong(
                    f'mapping.messages[{i}].content names the column "{name}", which the file does not have.',
                    f"Columns are: {', '.join(columns)}."
                    + (f' Did you mean "{near}"?' if near else "")
                    + " Write {{"
                    + name
                    + "}} for literal braces.",
                )
    if turns[-1]["role"] != "assistant":
        raise wrong("The last message of a mapping must be the assistant's: it is what is trained.")
    if not any(place.group(2) for place in _PLACE.finditer(turns[-1]["content"])):
        raise wrong(
            "The last message of a mapping must name a column, or every row would train the same answer.",
            "Write a column's name in single braces: {column}.",
        )


def messages(row: dict[str, Any], kind: Format, mapping: dict[str, Any] | None) -> list[Turn]:
    """The conversation of one row.

    Raises:
        RowError: the row does not have this format.
    """
    if kind != "mapping":
        for name in _MEANINGFUL:
            if row.get(name):
                hint = "Remove the column, or say in a mapping what to do with it."
                raise RowError(name, "unknown_field", f'The row has "{name}", which would be ignored.', hint)
    if kind == "messages":
        return _checked(row.get("messages"))
    if kind == "prompt_completion":
        turns = [_turn(row, "prompt", "user"), _turn(row, "completion", "assistant")]
    elif kind == "alpaca":
        user = _turn(row, "instruction", "user")
        if extra := _text(row, "input", optional=True):
            user["content"] += f"\n\n{extra}"
        turns = [user, _turn(row, "output", "assistant")]
    else:
        assert mapping is not None  # noqa: S101 - a data set of this format always has one
        turns = [Turn(role=part["role"], content=_fill(part["content"], row)) for part in mapping["messages"]]
    if not turns[-1]["content"].strip():
        field = {"prompt_completion": "completion", "alpaca": "output"}.get(kind, "messages")
        raise RowError(field, "empty_answer", "The answer is empty, so there is nothing to learn.")
    return turns


def _fill(template: str, row: dict[str, Any]) -> str:
    size = len(template) + sum(
        len(_text(row, place.group(2))) for place in _PLACE.finditer(template) if place.group(2)
    )
    if size > MAX_TURN:
        raise RowError(
            "messages",
            "row_too_long",
            f"The mapping makes a message of {size} characters of this row; {MAX_TURN} are read.",
        )

    def value(place: re.Match[str]) -> str:
        if place.group(1) is not None:
            return "{" + place.group(1) + "}"
        return _text(row, place.group(2))

    return _PLACE.sub(value, template)


def _turn(row: dict[str, Any], field: str, role: str) -> Turn:
    return Turn(role=role, content=_text(row, field))


def _text(row: dict[str, Any], field: str, *, optional: bool = False) -> str:
    value = row.get(field)
    if value is None:
        if optional:
            return ""
        raise RowError(field, "missing_field", f'The row has no "{field}".')
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise RowError(field, "not_text", f'"{field}" is a {type(value).__name__}, not text.')
    return value


def _checked(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise RowError("messages", "missing_field", "messages must be a list of at least two messages.")
    turns = [_checked_turn(i, item) for i, item in enumerate(value)]
    if len(turns) < 2:
        raise RowError("messages", "missing_field", "messages must be a list of at least two messages.")
    if turns[-1]["role"] != "assistant":
        last = len(turns) - 1
        raise RowError(
            f"messages[{last}].role",
            "no_answer",
            f"The conversation ends with a {turns[last]['role']} message; the last one must be the assistant's.",
            "Remove the message after the last answer.",
        )
    return turns


def _checked_turn(i: int, item: Any) -> Turn:
    where = f"messages[{i}]"
    if not isinstance(item, dict):
        raise RowError(where, "not_an_object", f"{where} is not an object with role and content.")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        near = _SAME_ROLE.get(str(role)) or nearest(str(role), ROLES)
        raise RowError(
            f"{where}.role",
            "unknown_role",
            f'{where}.role is "{str(role)[:40]}"; expected {", ".join(ROLES)}.',
            f'Write "{near}".' if near else None,
        )
    if not isinstance(content, str):
        raise RowError(f"{where}.content", "not_text", f"{where}.content is not text.")
    if role == "assistant" and not content.strip():
        raise RowError(
            f"{where}.content",
            "empty_answer",
            f"{where}.content is empty, so there is nothing to learn.",
        )
    if unknown := set(item) - {"role", "content"}:
        name = min(unknown)
        raise RowError(
            f"{where}.{name}",
            "unknown_field",
            f'{where} has the field "{name}", which would be ignored.',
            "Remove it: a message has role and content.",
        )
    return Turn(role=role, content=content)
