"""Any table to examples: which column, or which text around columns, plays which part.

{"messages": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]}
{"messages": "dialogue", "role": "speaker", "content": "text", "roles": {"client": "user", "agent": "assistant"}}
{"prompt": "{question}", "completion": "{answer}"}
{"text": "{body}"}                        the whole text is trained
{"text": "{body}", "layout": "alpaca"}    the text is a conversation in a known layout
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from core.errors import BadRequest, nearest
from core.ml.formats.chat import layouts, messages
from core.ml.formats.chat.example import Conversation, Example, RowError, Turn, text_of, with_system

Mapping = dict[str, Any]
# Characters of one message that a mapping makes: more than any model reads.
MAX_TURN = 4 * 1024**2
# {name} is a place, {{name}} a literal {name}, {{{name}}} a place in literal braces. What begins with a space or a quotation mark, as code and JSON do,
# or goes over lines is no name. The columns have no say in it: a row without one must not change the text around.
_NAME = r"""[^\s{}"'][^{}\r\n]*"""
_PLACE = re.compile(
    rf"\{{\{{\{{(?P<braced>{_NAME})\}}\}}\}}|\{{\{{(?P<literal>{_NAME})\}}\}}|\{{(?P<place>{_NAME})\}}"
)
_BRACES = re.compile(r"\{([^{}]+)\}")
# Places and messages that a mapping may have: each costs time in every row.
_MAX_PLACES = 256
# Characters of a name that a message shows.
_SHOWN = 60
_FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})
_OPTIONS = {"messages": {"role", "content", "roles"}, "text": {"layout"}}
_FORM = (
    'A mapping is {"messages": [{"role": …, "content": "text with {column}"}, …]}, '
    '{"messages": "column"}, {"prompt": "{column}", "completion": "{column}"} or {"text": "{column}"}.'
)


def check(mapping: Any, columns: Iterable[str]) -> None:
    """Raise BadRequest `invalid_mapping` unless `mapping` is one that fits a table with these columns."""
    check_form(mapping)
    known = dict.fromkeys(columns)
    for where, column in _named(mapping):
        if column not in known:
            raise _unknown(where, column, list(known))
    named = {column for _, column in _named(mapping)}
    for where, template in _templates(mapping):
        for place in _PLACE.finditer(template):
            if (column := place["literal"]) in known and column not in named:
                raise _wrong(
                    f"{where}: {{{{{column[:_SHOWN]}}}}} is the literal text {{{column[:_SHOWN]}}} in every row.",
                    f"Write {{{column[:_SHOWN]}}} for what the column holds.",
                )
    nameless = [column for column in known if not _is_name(column)]
    for where, template in _templates(mapping):
        if (left := next((name for name in nameless if f"{{{name}}}" in template), None)) is not None:
            raise _wrong(
                f"{where}: {{{left[:_SHOWN]}}} would stay as it stands. A mapping names no column whose name "
                "begins with a space or a quotation mark, or holds braces or line breaks.",
                "Rename the column.",
            )
        for braces in _BRACES.finditer(template):
            name = braces[1].strip()
            if name in known and braces[1] not in known:
                raise _wrong(
                    f'{where}: "{braces[0][:_SHOWN]}" is no place of a column.',
                    f"Write {{{name[:_SHOWN]}}} without spaces.",
                )


def _is_name(column: str) -> bool:
    place = _PLACE.fullmatch(f"{{{column}}}")
    return place is not None and place["place"] is not None


def check_form(mapping: Any) -> None:
    """Raise BadRequest `invalid_mapping` for what is no mapping of any table."""
    _check_shape(mapping)
    if len(_templates(mapping)) > _MAX_PLACES or sum(1 for _ in _named(mapping)) > _MAX_PLACES:
        raise _wrong(f"A mapping may have {_MAX_PLACES} messages, and name columns {_MAX_PLACES} times.")


def _check_shape(mapping: Any) -> None:
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
            _check_list(mapping)
        else:
            _check_turns(mapping["messages"])
        return
    for name in sorted(form):
        if not isinstance(mapping[name], str):
            raise _wrong(f"mapping.{name} must be text.")
    answer = "text" if "text" in form else "completion"
    _check_varies(f"mapping.{answer}", mapping[answer])
    if (layout := mapping.get("layout")) is not None and layout not in layouts.LAYOUTS:
        raise _wrong(f'mapping.layout is "{layout}"; known are {", ".join(layouts.LAYOUTS)}.')


def _check_list(mapping: Mapping) -> None:
    for name in ("role", "content"):
        if not isinstance(mapping.get(name, ""), str):
            raise _wrong(f"mapping.{name} must be the name of a key of each message.")
    roles = mapping.get("roles", {})
    if not isinstance(roles, dict) or not set(map(str, roles.values())) <= {*messages.ROLES, "developer"}:
        known = ", ".join(messages.ROLES)
        raise _wrong(f'mapping.roles must be an object such as {{"human": "user"}}; roles are {known}.')


def _check_turns(turns: Any) -> None:
    if not isinstance(turns, list) or not turns:
        raise _wrong(_FORM)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise _wrong(f"mapping.messages[{i}] must have a role and a content, both text.")
        if turn["role"] not in ("system", "user", "assistant"):
            raise _wrong(f'mapping.messages[{i}].role is "{turn["role"]}"; expected system, user, assistant.')
        if not isinstance(turn["content"], str):
            raise _wrong(f"mapping.messages[{i}].content must be text.")
    if turns[-1]["role"] != "assistant":
        raise _wrong("The last message of a mapping must be the assistant's: it is what is trained.")
    _check_varies("The last message of a mapping", turns[-1]["content"])


def _templates(mapping: Mapping) -> list[tuple[str, str]]:
    """(where, text) of every text with places."""
    turns = mapping.get("messages")
    if isinstance(turns, list):
        return [(f"mapping.messages[{i}].content", turn["content"]) for i, turn in enumerate(turns)]
    return [
        (f"mapping.{name}", mapping[name]) for name in ("prompt", "completion", "text") if name in mapping
    ]


def _named(mapping: Mapping) -> Iterator[tuple[str, str]]:
    """(where, column) of every column that is named."""
    if isinstance(mapping.get("messages"), str):
        yield "mapping.messages", _bare(mapping["messages"])
    for where, template in _templates(mapping):
        for column in _places(template):
            yield where, column


def in_braces(mapping: Mapping) -> set[str]:
    """All that `check` asks the columns about."""
    texts = [braces[1] for _, text in _templates(mapping) for braces in _BRACES.finditer(text)]
    return {*texts, *(text.strip() for text in texts), *(column for _, column in _named(mapping))}


def _unknown(where: str, name: str, columns: list[str]) -> BadRequest:
    shown = name[:_SHOWN]
    same = next((column for column in columns if column.casefold() == name.casefold()), None)
    near = same or nearest(shown, columns)
    return _wrong(
        f'{where} names the column "{shown}", which the file does not have.',
        f"Columns are: {', '.join(column[:_SHOWN] for column in columns[:50])}."
        + (f' Did you mean "{near[:_SHOWN]}"?' if near else "")
        + f" Write {{{{{shown}}}}} for literal braces.",
    )


def _places(template: str) -> list[str]:
    """The columns that a text names, in order."""
    found = (place["place"] or place["braced"] for place in _PLACE.finditer(template))
    return [column for column in found if column]


def _check_varies(where: str, template: str) -> None:
    if not _places(template):
        raise _wrong(
            f"{where} must name a column, or every row would train the same answer.",
            "Write a column's name in single braces: {column}.",
        )


def _wrong(message: str, hint: str | None = None) -> BadRequest:
    return BadRequest("invalid_mapping", message, param="mapping", hint=hint)


def reader(mapping: Mapping) -> Callable[[dict[str, Any]], Example]:
    """The function from a row to its example; it raises RowError."""
    turns = mapping.get("messages")
    if "text" in mapping:
        return _text_reader(mapping)
    if isinstance(turns, str):
        keys = messages.Keys(
            _bare(turns),
            mapping.get("role", "role"),
            mapping.get("content", "content"),
            messages.OPENAI_ROLES
            | {name: messages.OPENAI_ROLES[role] for name, role in mapping.get("roles", {}).items()},
        )
        return lambda row: with_system(row, messages.conversation(row, keys))
    if turns is None:
        turns = [
            {"role": "user", "content": mapping["prompt"]},
            {"role": "assistant", "content": mapping["completion"]},
        ]
    parts = [(part["role"], _filler(part["content"])) for part in turns]
    return lambda row: Conversation([Turn(role=role, content=fill(row)) for role, fill in parts])


def _text_reader(mapping: Mapping) -> Callable[[dict[str, Any]], Example]:
    fill, layout = _filler(mapping["text"]), mapping.get("layout")
    column = next((name for _, name in _named(mapping)), "text")

    def read(row: dict[str, Any]) -> Example:
        text = fill(row)
        if layout:
            return layouts.conversation(text, layout, column)
        if not text.strip():
            raise RowError(column, "empty_text", "The text is empty, so there is nothing to learn.")
        return text

    return read


def columns_of(mapping: Mapping) -> frozenset[str]:
    """The columns that a mapping reads."""
    beside = ("tools", "functions", "system") if isinstance(mapping.get("messages"), str) else ()
    return frozenset([*beside, *(column for _, column in _named(mapping))])


def _bare(column: str) -> str:
    """The name of a column, which people write in braces, too."""
    return column.strip("{}")


def _filler(template: str) -> Callable[[dict[str, Any]], str]:
    """The function from a row to the template's text. A value is never read as a template."""
    names = _places(template)
    distinct = dict.fromkeys(names)
    form = _PLACE.sub(_slot, template.replace("%", "%%"))

    def fill(row: dict[str, Any]) -> str:
        texts = {name: text_of(row, name) for name in distinct}
        values = [texts[name] for name in names]
        size = len(template) + sum(map(len, values))
        if size > MAX_TURN:
            message = f"The mapping makes a message of {size} characters of this row; {MAX_TURN} are read."
            raise RowError("messages", "row_too_long", message)
        return form % tuple(values)

    return fill


def _slot(place: re.Match[str]) -> str:
    if place["literal"]:
        return f"{{{place['literal']}}}"
    return "{%s}" if place["braced"] else "%s"
