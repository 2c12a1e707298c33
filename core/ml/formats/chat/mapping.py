"""Any table to examples: which column, or which text around columns, plays which part.

{"messages": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]}
{"messages": "dialogue", "role": "speaker", "content": "text", "roles": {"client": "user", "agent": "assistant"}}
{"prompt": "{question}", "completion": "{answer}"}
{"text": "{body}"}                        the whole text is trained
{"text": "{body}", "layout": "alpaca"}    the text is a conversation in a known layout
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from core.errors import BadRequest, nearest
from core.ml.formats.chat import layouts, messages
from core.ml.formats.chat.example import Conversation, Example, RowError, Turn
from core.strict_json import Number

Mapping = dict[str, Any]
# Characters of one message that a mapping makes: more than any model reads.
MAX_TURN = 4 * 1024**2
# {{name}} is a literal {name}; braces around anything that is no name, as in JSON, stay as they are.
_PLACE = re.compile(r"\{\{(\w[\w .()/?#&%+-]*)\}\}|\{(\w[\w .()/?#&%+-]*)\}")
_SPACED = re.compile(r"\{(?:\s+([^{}]*?)\s*|([^{}]*?)\s+)\}")
_FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})
_OPTIONS = {"messages": {"role", "content", "roles"}, "text": {"layout"}}
_FORM = (
    'A mapping is {"messages": [{"role": …, "content": "text with {column}"}, …]}, '
    '{"messages": "column"}, {"prompt": "{column}", "completion": "{column}"} or {"text": "{column}"}.'
)


def check(mapping: Any, columns: Sequence[str]) -> None:
    """Raise BadRequest `invalid_mapping` unless `mapping` fits a table with these columns."""
    form = next((f for f in _FORMS if isinstance(mapping, dict) and f <= mapping.keys()), None)
    if form is None:
        raise _wrong(_FORM)
    allowed = form | _OPTIONS.get(min(form), set())
    if not isinstance(mapping.get("messages", ""), str):
        allowed = form
    if unknown := mapping.keys() - allowed:
        near = nearest(min(unknown), allowed)
        raise _wrong(
            f'A mapping of this form has no "{min(unknown)}".', f'Did you mean "{near}"?' if near else None
        )
    if "messages" in form:
        if isinstance(mapping["messages"], str):
            _check_list(mapping, columns)
        else:
            _check_turns(mapping["messages"], columns)
        return
    for name in sorted(form):
        _check_template(f"mapping.{name}", mapping[name], columns)
    answer = "text" if "text" in form else "completion"
    _check_varies(f"mapping.{answer}", mapping[answer])
    if (layout := mapping.get("layout")) is not None and layout not in layouts.LAYOUTS:
        raise _wrong(f'mapping.layout is "{layout}"; known are {", ".join(layouts.LAYOUTS)}.')


def _check_list(mapping: Mapping, columns: Sequence[str]) -> None:
    _check_column("mapping.messages", _bare(mapping["messages"]), columns)
    for name in ("role", "content"):
        if not isinstance(mapping.get(name, ""), str):
            raise _wrong(f"mapping.{name} must be the name of a key of each message.")
    roles = mapping.get("roles", {})
    if not isinstance(roles, dict) or not set(map(str, roles.values())) <= {*messages.ROLES, "developer"}:
        known = ", ".join(messages.ROLES)
        raise _wrong(f'mapping.roles must be an object such as {{"human": "user"}}; roles are {known}.')


def _check_turns(turns: Any, columns: Sequence[str]) -> None:
    if not isinstance(turns, list) or not turns:
        raise _wrong(_FORM)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise _wrong(f"mapping.messages[{i}] must have a role and a content, both text.")
        if turn["role"] not in ("system", "user", "assistant"):
            raise _wrong(f'mapping.messages[{i}].role is "{turn["role"]}"; expected system, user, assistant.')
        _check_template(f"mapping.messages[{i}].content", turn["content"], columns)
    if turns[-1]["role"] != "assistant":
        raise _wrong("The last message of a mapping must be the assistant's: it is what is trained.")
    _check_varies("The last message of a mapping", turns[-1]["content"])


def _check_template(where: str, template: Any, columns: Sequence[str]) -> None:
    if not isinstance(template, str):
        raise _wrong(f"{where} must be text.")
    for place in _PLACE.finditer(template):
        if (name := place.group(2)) is not None:
            _check_column(where, name, columns)
    for spaced in _SPACED.finditer(template):
        if spaced[1] in columns:
            raise _wrong(
                f'{where}: "{spaced[0]}" is no place of a column.', f"Write {{{spaced[1]}}} without spaces."
            )


def _check_column(where: str, name: str, columns: Sequence[str]) -> None:
    if name not in columns:
        near = nearest(name, columns)
        raise _wrong(
            f'{where} names the column "{name}", which the file does not have.',
            f"Columns are: {', '.join(name[:60] for name in columns[:50])}."
            + (f' Did you mean "{near}"?' if near else "")
            + " Write {{"
            + name
            + "}} for literal braces.",
        )


def _check_varies(where: str, template: str) -> None:
    if not any(place.group(2) for place in _PLACE.finditer(template)):
        raise _wrong(
            f"{where} must name a column, or every row would train the same answer.",
            "Write a column's name in single braces: {column}.",
        )


def _wrong(message: str, hint: str | None = None) -> BadRequest:
    return BadRequest("invalid_mapping", message, param="mapping", hint=hint)


def reader(mapping: Mapping) -> Callable[[dict[str, Any]], Example]:
    """The function from a row to its example; it raises RowError."""
    if "text" in mapping:
        template, layout = mapping["text"], mapping.get("layout")
        place = _PLACE.fullmatch(template)
        column = place.group(2) if place and place.group(2) else "text"

        def text_row(row: dict[str, Any]) -> Example:
            text = _fill(template, row)
            return layouts.conversation(text, layout, column) if layout else plain(text, column)

        return text_row
    turns = mapping.get("messages")
    if isinstance(turns, str):
        keys = messages.Keys(
            _bare(turns),
            mapping.get("role", "role"),
            mapping.get("content", "content"),
            messages.OPENAI_ROLES
            | {name: messages.OPENAI_ROLES[role] for name, role in mapping.get("roles", {}).items()},
        )
        return lambda row: messages.conversation(row, keys)
    if turns is None:
        turns = [
            {"role": "user", "content": mapping["prompt"]},
            {"role": "assistant", "content": mapping["completion"]},
        ]
    parts = [(part["role"], part["content"]) for part in turns]
    return lambda row: Conversation([Turn(role=role, content=_fill(text, row)) for role, text in parts])


def columns_of(mapping: Mapping) -> set[str]:
    """The columns that a mapping reads."""
    parts = mapping.get("messages")
    if isinstance(parts, str):
        return {_bare(parts), "tools", "functions"}
    templates = mapping.values() if parts is None else [part["content"] for part in parts]
    return {place.group(2) for text in templates for place in _PLACE.finditer(text) if place.group(2)}


def _bare(column: str) -> str:
    """The name of a column, which people write in braces, too."""
    return column.strip("{}")


def plain(text: str, column: str) -> str:
    if not text.strip():
        raise RowError(column, "empty_text", "The text is empty, so there is nothing to learn.")
    return text


def text_of(row: dict[str, Any], column: str, *, optional: bool = False) -> str:
    """A column's text; numbers as they are written. Raises RowError."""
    value = row.get(column)
    if type(value) is str:
        return value
    if value is None:
        if optional:
            return ""
        raise RowError(column, "missing_field", f'The row has no "{column}".')
    if isinstance(value, Number):
        return value.written
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, bytes):
        raise RowError(column, "not_utf8", f'"{column}" holds bytes that are not UTF-8.')
    raise RowError(column, "not_text", f'"{column}" is a {type(value).__name__}, not text.')


def _fill(template: str, row: dict[str, Any]) -> str:
    places = [place.group(2) for place in _PLACE.finditer(template) if place.group(2)]
    size = len(template) + sum(len(text_of(row, name)) for name in places)
    if size > MAX_TURN:
        message = f"The mapping makes a message of {size} characters of this row; {MAX_TURN} are read."
        raise RowError("messages", "row_too_long", message)

    def value(place: re.Match[str]) -> str:
        return "{" + place.group(1) + "}" if place.group(1) is not None else text_of(row, place.group(2))

    return _PLACE.sub(value, template)
