"""Tool calls that a model wrote into its answer, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as text comes.

The form that Hermes and Qwen models are taught, and that Graft writes where a chat template has none.
"""

from typing import Any

from core import strict_json
from core.strict_json import JsonError

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class WrittenCalls:
    """Feed it text; it gives what stands outside of calls. `calls`: the complete ones so far, {name, arguments}."""

    def __init__(self) -> None:
        self._held = ""
        self.calls: list[dict[str, Any]] = []

    def push(self, text: str) -> str:
        """The text that certainly belongs to no call; space before a call belongs to neither."""
        self._held += text
        said = ""
        while (start := self._held.find(_OPEN)) >= 0:
            end = self._held.find(_CLOSE, start)
            if end < 0:
                return said + self._release(start)
            call = _call(self._held[start + len(_OPEN) : end])
            if call is None:
                said += self._held[: end + len(_CLOSE)]
            else:
                said += self._held[:start].rstrip()
                self.calls.append(call)
            self._held = self._held[end + len(_CLOSE) :]
        return said + self._release(len(self._held) - _beginning(self._held))

    def end(self) -> str:
        """What was held back: a call that never ended, or space."""
        rest, self._held = self._held, ""
        return "" if self.calls and not rest.strip() else rest

    def _release(self, until: int) -> str:
        text = self._held[:until].rstrip()
        self._held = self._held[len(text) :]
        return text


def _call(text: str) -> dict[str, Any] | None:
    try:
        found = strict_json.loads(text.strip(), depth=strict_json.DEPTH)
    except JsonError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    if found.keys() - {"name", "arguments"}:
        return None  # another form, of which a part would be lost
    arguments = found.get("arguments", {})
    return {"name": found["name"], "arguments": arguments} if isinstance(arguments, dict) else None


def _beginning(text: str) -> int:
    """How many last characters may be the beginning of a call."""
    longest = min(len(text), len(_OPEN) - 1)
    return next((n for n in range(longest, 0, -1) if _OPEN.startswith(text[-n:])), 0)
