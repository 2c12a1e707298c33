"""Rows in one plain form for other tools: OpenAI's messages, or a text."""

from typing import Any

from core import strict_json
from core.ml.formats.chat.example import Conversation, Example, Turn


def row_of(example: Example) -> dict[str, Any]:
    """{"messages", "tools"} with weight 0 at answers that are not trained, or {"text"}.

    Format `messages`, or the mapping {"text": "{text}"}, reads the same example back.
    """
    if not isinstance(example, Conversation):
        return {"text": example}
    untrained = example.untrained
    messages = [
        _message(turn) | ({"weight": 0} if i in untrained else {}) for i, turn in enumerate(example.turns)
    ]
    return {"messages": messages} | ({"tools": example.tools} if example.tools else {})


def _message(turn: Turn) -> dict[str, Any]:
    """What calls are made with is JSON in a text, as OpenAI writes it: a column of it has one type in every row."""
    message: dict[str, Any] = dict(turn)
    if "tool_calls" in turn:
        message["tool_calls"] = [
            call
            | {
                "function": {
                    "name": call["function"]["name"],
                    "arguments": strict_json.dumps(call["function"]["arguments"]),
                }
            }
            for call in turn["tool_calls"]
        ]
    return message
