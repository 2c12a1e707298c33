"""Tool calls, tools and tool results, in the one form that chat templates take."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from core.ml.formats.chat.example import RowError, Turn, parsed

# The fields of a call, and of its function. What streams of answers add says nothing.
_CALL = {"id", "type", "function", "index"}
_FUNCTION = {"name", "arguments"}
# Calls of one message: more than any model is taught to make.
MAX_CALLS = 128
_ONE_MESSAGE = "Keep one result for each call, and write calls that are made together into one message."
INDEX = re.compile(r"\[\d+\]")


def tool_calls(where: str, value: Any, before: list[Turn], unread: set[str]) -> list[dict[str, Any]]:
    """Tool calls in transformers' form, the arguments as an object; names of other fields go into `unread`."""
    if not isinstance(value, list):
        raise RowError(where, "invalid_tool_call", f"{where} must be a list of calls.")
    if len(value) > MAX_CALLS:
        raise RowError(where, "too_many_calls", f"{where} has {len(value)} calls; {MAX_CALLS} are read.")
    number = sum(len(turn.get("tool_calls", ())) for turn in before)
    given = {_id(call.get("id")) for call in value if isinstance(call, dict)}
    made: list[dict[str, Any]] = []
    for j, call in enumerate(value):
        here = f"{where}[{j}]"
        function = _function(call)
        if function is None:
            raise RowError(here, "invalid_tool_call", f"{here} must name a function.")
        _note_unread(here, call, function, unread)
        arguments = function.get("arguments")
        if arguments is None:
            arguments = {}
        if isinstance(arguments, str):
            arguments = parsed(arguments or "{}", f"{here}.function.arguments")
        if not isinstance(arguments, dict):
            message = f"{here}.function.arguments must be a JSON object."
            raise RowError(f"{here}.function.arguments", "invalid_tool_call", message)
        call_id = _id(call.get("id"))
        # Nine characters: some templates take no other length.
        if call_id is None:
            call_id = next(name for k in itertools.count(number + j) if (name := f"call{k:05d}") not in given)
            given.add(call_id)
        if any(call_id == other["id"] for other in made):
            message = f'{here}.id "{call_id[:40]}" is the id of another call of the message.'
            raise RowError(f"{here}.id", "invalid_tool_call", message)
        made.append(
            {
                "id": call_id,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return made


def _function(value: Any) -> dict[str, Any] | None:
    """The function of a call or a tool, bare or in OpenAI's wrapping; None where it has no name."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return None
    return function


def _id(value: Any) -> str | None:
    """An id as text; None where there is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def _note_unread(here: str, call: dict[str, Any], function: dict[str, Any], unread: set[str]) -> None:
    """Fields of a call that are passed over. Without `arguments`, one of them is what they are called there."""
    known = _CALL | _FUNCTION if function is call else _CALL
    others = [name for name, value in call.items() if name not in known and value is not None]
    if function is not call:
        others += [name for name, value in function.items() if name not in _FUNCTION and value is not None]
    if others and function.get("arguments") is None:
        message = f'{here} has "{others[0][:60]}", but its function has no "arguments".'
        hint = 'Write what the function is called with as "arguments", an object or JSON in a text; {} for nothing.'
        raise RowError(here, "invalid_tool_call", message, hint)
    unread.update(f"{INDEX.sub('[]', here)}.{name[:60]}" for name in others)


def answered_call(where: str, result: Mapping[str, Any], before: list[Turn]) -> str:
    """The id of the call that a tool's result answers: the one it names by its id or its function, or the next."""
    calls: dict[str, str] = {}
    answered: set[str] = set()
    for turn in reversed(before):
        if turn["role"] == "assistant":
            calls = {call["id"]: call["function"]["name"] for call in turn.get("tool_calls", ())}
            break
        if turn["role"] == "tool":
            answered.add(turn["tool_call_id"])
    if not calls:
        raise RowError(
            where,
            "tool_without_call",
            f"{where} is a tool's result, but nothing before it calls a tool.",
            'Write the call as tool_calls. One that is written in a text needs a mapping that says "roles": {"tool": "user"}.',
        )
    # Results of legacy functions and of other programs have no ids, but often the function's name.
    call_id = _id(result.get("tool_call_id"))
    if call_id is None and result.get("tool_call_id") not in (None, ""):
        raise RowError(f"{where}.tool_call_id", "tool_without_call", f"{where}.tool_call_id is not text.")
    key, given = ("name", result.get("name")) if call_id is None else ("tool_call_id", call_id)
    if key == "tool_call_id":
        meant = [name for name in calls if name == given]
    else:
        meant = [name for name in calls if not given or calls[name] == given]
    open_calls = [name for name in meant if name not in answered]
    if open_calls:
        return open_calls[0]
    field, shown = (f"{where}.{key}", f'{where}.{key} "{str(given)[:40]}"') if given else (where, where)
    if meant:
        message = (
            f"{shown} is answered already." if given else f"{shown} answers no call: all have their results."
        )
        raise RowError(field, "tool_without_call", message, _ONE_MESSAGE)
    known = [calls[name] if key == "name" else name for name in calls]
    raise RowError(
        field,
        "tool_without_call",
        f"{shown} is the {'name' if key == 'name' else 'id'} of no call before it.",
        f"Open calls: {', '.join(known[:5])}. {_ONE_MESSAGE}",
    )


def in_order_of_calls(turns: list[Turn], named: Callable[[int], str]) -> list[Turn]:
    """The turns with the results of each answer's calls in the order of the calls. `named` says what a turn is called.

    Most templates write results without ids, so that their order alone says what they answer.

    Raises:
        RowError: some of an answer's calls have results and others have none, or their order cannot be mended.
    """
    ordered = list(turns)
    ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"] + [len(turns)]
    for start, end in itertools.pairwise(ends):
        calls = [call["id"] for call in turns[start].get("tool_calls", ())]
        places = [i for i in range(start + 1, end) if turns[i]["role"] == "tool"]
        answered = [turns[i]["tool_call_id"] for i in places]
        if answered and (missing := [name for name in calls if name not in answered]):
            where = f"{named(start)}.tool_calls[{calls.index(missing[0])}]"
            raise RowError(
                where,
                "missing_result",
                f"{where} has no result, but other calls of the message have: it would be taken for theirs.",
                "Add the result, or remove the call.",
            )
        results = sorted((turns[i] for i in places), key=lambda turn: calls.index(turn["tool_call_id"]))
        if places and places[-1] - places[0] >= len(places) and results != [turns[i] for i in places]:
            raise RowError(
                named(places[0]),
                "misplaced_result",
                f"{named(places[0])} answers a later call than a result further on, and other messages are between.",
                "Put the results into the order of their calls.",
            )
        for i, turn in zip(places, results, strict=True):
            ordered[i] = turn
    return ordered


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a row in OpenAI's form; None where it has none."""
    tools, functions = row.get("tools"), row.get("functions")
    if tools and functions:
        raise RowError(
            "functions", "unknown_field", 'The row has "tools" and "functions".', "Keep one of them."
        )
    column, value = ("tools", tools) if tools else ("functions", functions)
    if isinstance(value, str):
        value = parsed(value, column)
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(column, "invalid_tools", f'"{column}" must be a list of functions.')
    made = []
    for j, tool in enumerate(value):
        function = _function(tool)
        if function is None:
            raise RowError(
                f"{column}[{j}]", "invalid_tools", f"{column}[{j}] must be a function with a name."
            )
        made.append({"type": "function", "function": function})
    return made
