"""Tool calls, tools and tool results, in the one form that chat templates take."""

from collections.abc import Mapping
from typing import Any

from core.ml.formats.chat.example import RowError, Turn, parsed


def tool_calls(where: str, value: Any, before: list[Turn]) -> list[dict[str, Any]]:
    """Tool calls in transformers' form, the arguments as an object."""
    if not isinstance(value, list):
        raise RowError(where, "invalid_tool_call", f"{where} must be a list of calls.")
    number = sum(len(turn.get("tool_calls", ())) for turn in before)
    made = []
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
    open_calls = []
    for turn in reversed(before):
        if turn["role"] == "assistant":
            open_calls = [call["id"] for call in turn.get("tool_calls", ())]
            break
    if not open_calls:
        raise RowError(
            where, "tool_without_call", f"{where} is a tool's result, but nothing before it calls a tool."
        )
    if call_id is None:
        after = 0
        for turn in reversed(before):
            if turn["role"] != "tool":
                break
            after += 1
        return str(open_calls[min(after, len(open_calls) - 1)])
    if call_id not in open_calls:
        raise RowError(
            f"{where}.tool_call_id",
            "tool_without_call",
            f'{where}.tool_call_id "{str(call_id)[:40]}" is the id of no call before it.',
            f"Open calls: {', '.join(open_calls[:5])}.",
        )
    return str(call_id)


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
