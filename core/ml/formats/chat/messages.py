"""A list of messages to a checked conversation: OpenAI's form, ShareGPT's, and others by their key names."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from core.errors import nearest
from core.ml.formats.chat.calls import INDEX, answered_call, in_order_of_calls, tool_calls, tools_of
from core.ml.formats.chat.example import Conversation, RowError, Turn, kind_of, parsed
from core.strict_json import Number

ROLES = ("system", "user", "assistant", "tool")
# What the turns of others are called, and what they are here. A "call" is an assistant's turn.
OPENAI_ROLES = {name: name for name in ROLES} | {"developer": "system", "function": "tool"}
SHAREGPT_ROLES = {name: name for name in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
# Roles whose messages often have nothing but a text.
_PLAIN = ("user", "assistant", "system")
# A template is rendered once for every answer: more would take minutes a row.
MAX_MESSAGES = 1000
# What other programs take as "train this turn or not".
_MEANINGFUL = ("train", "loss", "mask")
_READ = {"name", "weight", "tool_calls", "tool_call_id", "function_call"}
_PART = {"type", "text"}


class Keys(NamedTuple):
    """How a list of messages is written: the column, the keys of each message, the names of the roles."""

    column: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = OPENAI_ROLES


OPENAI = Keys()
SHAREGPT = Keys("conversations", "from", "value", SHAREGPT_ROLES)


def conversation(row: Mapping[str, Any], keys: Keys = OPENAI) -> Conversation:
    """The conversation of a row whose column `keys.column` holds its messages.

    Raises:
        RowError: anything that would train something else than what is written.
    """
    turns, untrained, unread = parse(row.get(keys.column), keys)
    return checked(Conversation(turns, tools_of(row), untrained, unread), keys.column)


def parse(value: Any, keys: Keys) -> tuple[list[Turn], frozenset[int], frozenset[str]]:
    """The turns, the indexes of those with weight 0, and the names of fields that are not read."""
    turns, untrained, unread = parse_after([], value, keys)
    if max(map(len, turns)) > 2:  # for speed: nearly all have no calls
        turns = in_order_of_calls(turns, lambda i: f"{keys.column}[{i}]")
    return turns, untrained, unread


def parse_after(
    before: list[Turn], value: Any, keys: Keys
) -> tuple[list[Turn], frozenset[int], frozenset[str]]:
    """As `parse`, but results may answer calls of the turns before, and stand in the order of the file."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, keys.column)
    if not isinstance(value, list) or not value:
        what = "is missing" if value is None else "is empty" if value == [] else "is no list"
        message = f'"{keys.column}" {what}; it must be a list of messages.'
        raise RowError(keys.column, "missing_field", message)
    if len(value) > MAX_MESSAGES:
        message = f'"{keys.column}" has {len(value)} messages; {MAX_MESSAGES} are read.'
        raise RowError(keys.column, "too_many_messages", message, "Divide the conversation.")
    column, role_key, content_key, roles = keys
    turns = before.copy()
    untrained = []
    unread: set[str] = set()
    for i, item in enumerate(value):
        if type(item) is dict and len(item) == 2:  # nearly every message there is: for speed
            named, content = item.get(role_key), item.get(content_key)
            if type(named) is str and type(content) is str and (role := roles.get(named)) in _PLAIN:
                turns.append({"role": role, "content": content})
                continue
        turn = _turn(i, item, keys, turns, unread)
        unread.update(_unread(i, item, keys))
        if "weight" in item and _weight(i, item, turn, column) == 0:
            untrained.append(i)
        turns.append(turn)
    return turns[len(before) :], frozenset(untrained), frozenset(unread)


def _unread(i: int, item: dict[str, Any], keys: Keys) -> list[str]:
    """The names of fields that are passed over; RowError for those that mean something elsewhere."""
    for name in _MEANINGFUL:
        if item.get(name) is not None:
            where = f"{keys.column}[{i}].{name}"
            hint = "Write weight 0 at an answer that must not be trained."
            raise RowError(where, "unknown_field", f"{where} would be ignored.", hint)
    known = _READ | {keys.role, keys.content}
    return [
        f"{keys.column}[].{name[:60]}"
        for name, field in item.items()
        if name not in known and field is not None
    ]


def checked(made: Conversation, column: str) -> Conversation:
    """The conversation, if there is an answer in it to learn from."""
    answers = [i for i, turn in enumerate(made.turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowError(
            column,
            "no_answer",
            "The conversation has no assistant message, so there is nothing to learn.",
            "Add the answer, or leave the row out.",
        )
    if made.untrained.issuperset(answers):
        raise RowError(
            column, "nothing_trained", "Every assistant message has weight 0, so there is nothing to learn."
        )
    return made


def _turn(i: int, item: Any, keys: Keys, before: list[Turn], unread: set[str]) -> Turn:
    if not isinstance(item, dict):
        where = f"{keys.column}[{i}]"
        raise RowError(
            where, "not_an_object", f"{where} is not an object with {keys.role} and {keys.content}."
        )
    named = item.get(keys.role)
    role = keys.roles.get(named) if isinstance(named, str) else None
    if role is None:
        raise _unknown_role(i, item, keys)
    content = item.get(keys.content)
    if role == "call":
        return _call_turn(f"{keys.column}[{i}].{keys.content}", content, before, unread)
    calls = item.get("tool_calls") or None
    if legacy := item.get("function_call"):
        if calls:
            where = f"{keys.column}[{i}].function_call"
            raise RowError(
                where, "misplaced_field", f"{where} stands beside tool_calls.", "Keep one of them."
            )
        calls = [legacy]
    if type(content) is str:
        turn = Turn(role=role, content=content)
    else:
        where = f"{keys.column}[{i}].{keys.content}"
        turn = Turn(role=role, content=_text(where, content, bool(calls), unread))
    if len(item) > 2 or role == "tool" or calls:
        _extras(turn, f"{keys.column}[{i}]", item, calls, before, unread)
    return turn


def _extras(
    turn: Turn, where: str, item: dict[str, Any], calls: Any, before: list[Turn], unread: set[str]
) -> None:
    if (name := item.get("name")) is not None:
        if not isinstance(name, str):
            raise RowError(f"{where}.name", "not_text", f"{where}.name is not text.")
        turn["name"] = name
    if calls is not None:
        if turn["role"] != "assistant":
            raise RowError(
                f"{where}.tool_calls", "misplaced_field", f"{where} has tool_calls but is no assistant's."
            )
        turn["tool_calls"] = tool_calls(f"{where}.tool_calls", calls, before, unread)
    if turn["role"] == "tool":
        turn["tool_call_id"] = answered_call(where, item, before)
    elif item.get("tool_call_id") not in (None, ""):
        raise RowError(
            f"{where}.tool_call_id", "misplaced_field", f"{where} has a tool_call_id but is no tool's."
        )


def _text(where: str, content: Any, may_be_none: bool, unread: set[str]) -> str:
    if content is None and may_be_none:
        return ""
    if isinstance(content, list):
        parts = []
        for j, part in enumerate(content):
            if isinstance(part, str):
                parts.append(part)
            elif (
                isinstance(part, dict)
                and isinstance(part.get("text"), str)
                and part.get("type", "text") == "text"
            ):
                parts.append(part["text"])
                rest = [name for name, value in part.items() if name not in _PART and value is not None]
                unread.update(f"{INDEX.sub('[]', where)}[].{name[:60]}" for name in rest)
            else:
                kind = part.get("type") if isinstance(part, dict) else None
                shown = f'"{kind[:40]}"' if isinstance(kind, str) else kind_of(part)
                raise RowError(f"{where}[{j}]", "not_text", f"{where}[{j}] is {shown}; only text is trained.")
        return "".join(parts)
    what = "missing" if content is None else f"{kind_of(content)}, not text"
    raise RowError(where, "not_text", f"{where} is {what}.", "Write it as text.")


def _weight(i: int, item: dict[str, Any], turn: Turn, column: str) -> int:
    weight = item["weight"]
    if weight is None:
        return 1
    where = f"{column}[{i}].weight"
    if turn["role"] != "assistant":
        raise RowError(where, "misplaced_field", f"{where}: only assistant messages have a weight.")
    if type(weight) not in (int, float, Number) or weight not in (0, 1):
        raise RowError(where, "invalid_weight", f"{where} must be 0 (not trained) or 1 (trained).")
    return int(weight)


def _unknown_role(i: int, item: dict[str, Any], keys: Keys) -> RowError:
    where = f"{keys.column}[{i}].{keys.role}"
    if keys.role not in item:
        other = {"role": ("from", "value"), "from": ("role", "content")}.get(keys.role)
        hint = None
        if other and other[0] in item and keys.column not in ("prompt", "completion"):
            given: dict[str, Any] = {"messages": keys.column, "role": other[0], "content": other[1]}
            if other[0] == "from":
                given["roles"] = {"human": "user", "gpt": "assistant"}
            hint = f"Pass mapping={json.dumps(given, ensure_ascii=False)}."
        return RowError(where, "unknown_role", f"{where} is missing.", hint)
    named = item[keys.role]
    shown = (named if isinstance(named, str) else json.dumps(named))[:40]
    message = f'{where} is "{shown}"; expected {", ".join(dict.fromkeys(keys.roles.values()))}.'
    meant = SHAREGPT_ROLES.get(named, "call") if isinstance(named, str) else "call"
    if keys.roles is OPENAI_ROLES and meant != "call":
        roles = {"human": "user", "gpt": "assistant"} | {named: meant}
        mapping = json.dumps({"messages": keys.column, "roles": roles}, ensure_ascii=False)
        return RowError(where, "unknown_role", message, f'Write "{meant}", or pass mapping={mapping}.')
    near = nearest(shown.lower(), keys.roles)
    return RowError(where, "unknown_role", message, f'Did you mean "{near}"?' if near else None)


def _call_turn(where: str, value: Any, before: list[Turn], unread: set[str]) -> Turn:
    if isinstance(value, str):
        value = parsed(value, where)
    calls = value if isinstance(value, list) else [value]
    return Turn(role="assistant", content="", tool_calls=tool_calls(where, calls, before, unread))
