"""Tool calls found in an answer, however its text is cut."""

import pytest

from core.ml.formats.chat.written import WrittenCalls

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
WEATHER = {"name": "weather", "arguments": {"city": "Rome"}}


def read(text: str, size: int) -> tuple[str, list[dict]]:
    found = WrittenCalls()
    said = "".join(found.push(text[i : i + size]) for i in range(0, len(text), size))
    return said + found.end(), found.calls


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (CALL, "", [WEATHER]),
        (f"Let me see.\n{CALL}\n{CALL}\n", "Let me see.", [WEATHER, WEATHER]),
        (f"{CALL} and more", " and more", [WEATHER]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [{"name": "now", "arguments": {}}]),
        ("no call  at all \n", "no call  at all \n", []),
        ("a <tool_ca", "a <tool_ca", []),
        ("a <tool_call>{unfinished", "a <tool_call>{unfinished", []),
        ("x <tool_call>no json</tool_call> y", "x <tool_call>no json</tool_call> y", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        (
            '<tool_call>{"name": "f", "arguments": []}</tool_call>',
            '<tool_call>{"name": "f", "arguments": []}</tool_call>',
            [],
        ),
        (
            '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>',
            '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>',
            [],
        ),
        ("", "", []),
    ],
)
def test_text_and_calls_are_told_apart(size: int, text: str, said: str, calls: list) -> None:
    assert read(text, size) == (said, calls)


def test_text_is_not_held_back_longer_than_needed() -> None:
    found = WrittenCalls()
    assert found.push("a < b") == "a < b"
    assert found.push(" <tool") == ""
    assert found.push("s> c") == " <tools> c"
