"""Tool calls, tools and tool results, in the one form that chat templates take."""

import itertools
from collections.abc import Mapping
from typing import Any

from core.ml.formats.chat.example import RowError, Turn, parsed


def tool_calls(where: str, value: Any, before: list[Turn]) -> list[dict[str, Any]]:
    """Tool calls in transformers' form, the arguments as an object."""
    if not isinstance(value, list):
        raise RowError(where, "invalid_tool_call", f"{where} must be a list of calls.")
    number = sum(len(turn.get("tool_calls", ())) for turn in before)
    made: list[dict[str, Any]] = []
    for j, call in enumerate(value):
        here = f"{where}[{j}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise RowError(here, "invalid_tool_call", f"{here} must name a function.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parsed(arguments or "{}", f"{here}.function.arguments")
        if not isinstance(arguments, dict):
            message = f"{here}.function.arguments must be a JSON object."
            raise RowError(f"{here}.function.arguments", "invalid_tool_call", message)
        call_id = call.get("id")
        # Nine characters: some templates take no other length.
        call_id = call_id if isinstance(call_id, str) and call_id else f"call{number + j:05d}"
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


def answered_call(where: str, call_id: Any, before: list[Turn]) -> str:
    """The id of the call that a tool's turn answers: the one it names, or the next that is open."""
    calls: list[str] = []
    answered: list[str] = []
    for turn in reversed(before):
        if turn["role"] == "assistant":
            calls = [call["id"] for call in turn.get("tool_calls", ())]
            break
        if turn["role"] == "tool":
            answered.append(turn["tool_call_id"])
    if not calls:
        raise RowError(
            where, "tool_without_call", f"{where} is a tool's result, but nothing before it calls a tool."
        )
    if call_id is None:
        return next((name for name in calls if name not in answered), calls[-1])
    shown = f'{where}.tool_call_id "{str(call_id)[:40]}"'
    if call_id not in calls:
        raise RowError(
            f"{where}.tool_call_id",
            "tool_without_call",
            f"{shown} is the id of no call before it.",
            f"Open calls: {', '.join(calls[:5])}.",
        )
    if call_id in answered:
        raise RowError(
            f"{where}.tool_call_id", "tool_without_call", f"{shown} is answered already.", "Keep one result."
        )
    return str(call_id)


def in_order_of_calls(turns: list[Turn], column: str) -> list[Turn]:
    """The turns with the results of each answer's calls in the order of the calls.

    Most templates write results without ids, so that their order alone says what they answer.

    Raises:
        RowError: some of an answer's calls have results and others have none.
    """
    ordered = list(turns)
    ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"] + [len(turns)]
    for start, end in itertools.pairwise(ends):
        calls = [call["id"] for call in turns[start].get("tool_calls", ())]
        places = [i for i in range(start + 1, end) if turns[i]["role"] == "tool"]
        answered = [turns[i]["tool_call_id"] for i in places]
        if answered and (missing := [name for name in calls if name not in answered]):
            where = f"{column}[{start}].tool_calls[{calls.index(missing[0])}]"
            raise RowError(
                where,
                "missing_result",
                f"{where} has no result, but other calls of the message have: it would be taken for theirs.",
                "Add the result, or remove the call.",
            )
        results = sorted((turns[i] for i in places), key=lambda turn: calls.index(turn["tool_call_id"]))
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
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise RowError(
                f"{column}[{j}]", "invalid_tools", f"{column}[{j}] must be a function with a name."
            )
        made.append({"type": "function", "function": function})
    return made
