"""Rows to conversations: the formats, and the mapping of a table."""

import json
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.formats import chat
from core.ml.formats.chat import Format, RowError, Turn

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CONVERSATION = [Turn(role="user", content="Hi"), Turn(role="assistant", content="Hello")]


def mapping(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]}


@pytest.mark.parametrize(
    ("columns", "format_"),
    [
        (["id", "messages"], "messages"),
        (["completion", "prompt"], "prompt_completion"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output"], "alpaca"),
    ],
)
def test_the_columns_say_the_format(columns: list[str], format_: str) -> None:
    assert chat.detect(columns) == format_


def test_other_columns_need_a_mapping_and_the_hint_is_one_that_works() -> None:
    with pytest.raises(BadRequest) as caught:
        chat.detect(["question", "answer"])
    assert caught.value.code == "unknown_format"
    assert caught.value.hint is not None
    suggested = json.loads(caught.value.hint.partition("for example ")[2])
    chat.check_mapping(suggested, ["question", "answer"])
    assert chat.messages({"question": "Hi", "answer": "Hello"}, "mapping", suggested) == CONVERSATION


@pytest.mark.parametrize(
    ("format_", "row"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("messages", {"messages": [USER, ASSISTANT], "tools": [], "id": 7}),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}),
        ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello"}),
    ],
)
def test_every_format_becomes_the_same_conversation(format_: Format, row: dict[str, Any]) -> None:
    assert chat.messages(row, format_, None) == CONVERSATION


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Translate", "input": "chat", "output": "cat"}
    assert chat.messages(row, "alpaca", None)[0] == Turn(role="user", content="Translate\n\nchat")


@pytest.mark.parametrize(
    ("messages", "field", "code"),
    [
        (None, "messages", "missing_field"),
        ([], "messages", "missing_field"),
        ("Hi", "messages", "missing_field"),
        ([ASSISTANT], "messages", "missing_field"),
        (["Hi", ASSISTANT], "messages[0]", "not_an_object"),
        ([USER, {"role": "gpt", "content": "Hello"}], "messages[1].role", "unknown_role"),
        ([USER, {"content": "Hello"}], "messages[1].role", "unknown_role"),
        ([USER, {"role": ["assistant"], "content": "Hello"}], "messages[1].role", "unknown_role"),
        ([USER, {"role": "assistant"}], "messages[1].content", "not_text"),
        ([USER, {"role": "assistant", "content": ["Hello"]}], "messages[1].content", "not_text"),
        ([USER, {"role": "assistant", "content": " \n"}], "messages[1].content", "empty_answer"),
        ([USER, ASSISTANT, USER], "messages[2].role", "no_answer"),
        ([USER, {**ASSISTANT, "weight": 0}], "messages[1].weight", "unknown_field"),
    ],
)
def test_a_broken_conversation_says_where(messages: Any, field: str, code: str) -> None:
    with pytest.raises(RowError) as caught:
        chat.messages({"messages": messages}, "messages", None)
    assert (caught.value.field, caught.value.code) == (field, code)


@pytest.mark.parametrize(
    ("wrong", "right"), [("gpt", "assistant"), ("human", "user"), ("assitant", "assistant")]
)
def test_a_wrong_role_is_told_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(RowError) as caught:
        chat.messages({"messages": [{"role": wrong, "content": "Hi"}]}, "messages", None)
    assert caught.value.hint == f'Write "{right}".'


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_refused_as_long_as_they_would_be_ignored(name: str) -> None:
    with pytest.raises(RowError) as caught:
        chat.messages({"messages": [USER, ASSISTANT], name: [{}]}, "messages", None)
    assert (caught.value.field, caught.value.code) == (name, "unknown_field")


@pytest.mark.parametrize(
    ("format_", "row", "field", "code"),
    [
        ("prompt_completion", {"prompt": "Hi"}, "completion", "missing_field"),
        ("prompt_completion", {"prompt": "Hi", "completion": " "}, "completion", "empty_answer"),
        ("prompt_completion", {"prompt": ["Hi"], "completion": "Hello"}, "prompt", "not_text"),
        ("alpaca", {"instruction": "Hi", "output": ""}, "output", "empty_answer"),
        ("alpaca", {"output": "Hello"}, "instruction", "missing_field"),
        ("alpaca", {"instruction": "Hi", "input": {}, "output": "Hello"}, "input", "not_text"),
    ],
)
def test_a_broken_row_says_which_field(format_: Format, row: dict[str, Any], field: str, code: str) -> None:
    with pytest.raises(RowError) as caught:
        chat.messages(row, format_, None)
    assert (caught.value.field, caught.value.code) == (field, code)


# ---- Mapping


def filled(template: str, row: dict[str, Any]) -> str:
    how = mapping(template, "{answer}")
    chat.check_mapping(how, [*row, "answer"])
    return chat.messages({**row, "answer": "x"}, "mapping", how)[0]["content"]


@pytest.mark.parametrize(
    ("template", "result"),
    [
        ("{a} and {b c}", "1 and {2}"),
        ("{{a}} stays", "{a} stays"),
        ('Reply as {"key": {a}, "list": [{}]}', 'Reply as {"key": 1, "list": [{}]}'),
        ("function() { return 1; }", "function() { return 1; }"),
        ("{a}{a}", "11"),
        ("no place", "no place"),
    ],
)
def test_places_are_filled_and_other_braces_stay(template: str, result: str) -> None:
    assert filled(template, {"a": 1, "b c": "{2}"}) == result


def test_a_value_is_never_read_as_a_template() -> None:
    assert filled("{a}", {"a": "{b} {{a}} \\1", "b": "secret"}) == "{b} {{a}} \\1"


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        {"messages": []},
        {"messages": "user"},
        {"messages": ["user"]},
        {"messages": [USER, ASSISTANT], "more": 1},
        {"messages": [{"role": "user"}, ASSISTANT]},
        {"messages": [{"role": "user", "content": 1}, ASSISTANT]},
        {"messages": [{"role": "gpt", "content": "x"}, ASSISTANT]},
        {"messages": [{"role": [], "content": "x"}, ASSISTANT]},
    ],
)
def test_what_is_no_mapping_is_refused(wrong: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        chat.check_mapping(wrong, ["a"])
    assert (caught.value.code, caught.value.param) == ("invalid_mapping", "mapping")


def test_an_unknown_column_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadRequest) as caught:
        chat.check_mapping(mapping("{qestion}", "{answer}"), ["question", "answer"])
    assert caught.value.code == "invalid_mapping"
    assert '"qestion"' in caught.value.message
    assert caught.value.hint is not None
    assert 'Did you mean "question"?' in caught.value.hint
    assert "{{qestion}}" in caught.value.hint


def test_the_last_message_of_a_mapping_is_the_assistants() -> None:
    with pytest.raises(BadRequest, match="last message of a mapping must be the assistant's"):
        chat.check_mapping({"messages": [ASSISTANT, USER]}, [])


def test_a_mapped_row_without_an_answer_is_refused() -> None:
    with pytest.raises(RowError) as caught:
        chat.messages({"q": "Hi", "a": "  "}, "mapping", mapping("{q}", "{a}"))
    assert caught.value.code == "empty_answer"


def test_a_mapped_row_that_lacks_the_column_is_refused() -> None:
    with pytest.raises(RowError) as caught:
        chat.messages({"q": "Hi"}, "mapping", mapping("{q}", "{a}"))
    assert (caught.value.field, caught.value.code) == ("a", "missing_field")
