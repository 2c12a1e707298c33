"""Lists of messages: roles, contents, weights, and tool calls with their results."""

import json
from typing import Any

import pytest

from core.ml.formats.chat import messages
from core.ml.formats.chat.example import Conversation, RowError, Turn
from tests.core.formats.given import ASSISTANT, USER

FUNCTION = {"name": "look", "arguments": '{"where": "here"}'}
CALL = {"id": "a", "type": "function", "function": FUNCTION}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
BOTH = {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "b"}]}
RESULT = {"role": "tool", "content": "found", "tool_call_id": "a"}
UNNAMED = {"role": "tool", "content": "found"}


def read(items: Any, keys: messages.Keys = messages.OPENAI) -> Conversation:
    return messages.conversation({keys.column: items}, keys)


@pytest.mark.parametrize(
    ("items", "field", "code"),
    [
        (None, "messages", "missing_field"),
        ([], "messages", "missing_field"),
        ("Hi", "messages", "missing_field"),
        ("[1", "messages", "invalid_json"),
        ([USER], "messages", "no_answer"),
        (["Hi", ASSISTANT], "messages[0]", "not_an_object"),
        ([USER, {"role": "gpt", "content": "Hello"}], "messages[1].role", "unknown_role"),
        ([USER, {"content": "Hello"}], "messages[1].role", "unknown_role"),
        ([USER, {"role": ["assistant"], "content": "Hello"}], "messages[1].role", "unknown_role"),
        ([USER, {"role": "assistant"}], "messages[1].content", "not_text"),
        ([USER, {"role": "assistant", "content": 5}], "messages[1].content", "not_text"),
        ([USER, {"role": "user", "content": [{"type": "image_url"}]}], "messages[1].content[0]", "not_text"),
        ([USER, {"role": "assistant", "content": [1]}], "messages[1].content[0]", "not_text"),
        ([USER, {**ASSISTANT, "weight": 0}], "messages", "nothing_trained"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "messages[1].weight", "invalid_weight"),
        ([USER, {**ASSISTANT, "weight": True}], "messages[1].weight", "invalid_weight"),
        ([{**USER, "weight": 1}, ASSISTANT], "messages[0].weight", "misplaced_field"),
        ([USER, {**ASSISTANT, "name": 1}], "messages[1].name", "not_text"),
        ([{**USER, "tool_calls": [CALL]}, ASSISTANT], "messages[0].tool_calls", "misplaced_field"),
        ([USER, {**CALLS, "tool_calls": "x"}], "messages[1].tool_calls", "invalid_tool_call"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0]", "invalid_tool_call"),
        ([USER, {**CALLS, "function_call": FUNCTION}], "messages[1].function_call", "misplaced_field"),
        ([USER, {**ASSISTANT, "tool_call_id": "a"}], "messages[1].tool_call_id", "misplaced_field"),
        ([USER, ASSISTANT, RESULT], "messages[2]", "tool_without_call"),
        ([USER, CALLS, {**RESULT, "tool_call_id": "b"}], "messages[2].tool_call_id", "tool_without_call"),
        ([USER, CALLS, RESULT, RESULT], "messages[3].tool_call_id", "tool_without_call"),
        ([USER, CALLS, UNNAMED, UNNAMED], "messages[3]", "tool_without_call"),
        ([USER, CALLS, {**UNNAMED, "name": "find"}], "messages[2].name", "tool_without_call"),
        ([USER, BOTH, *[{**UNNAMED, "name": "look"}] * 3], "messages[4].name", "tool_without_call"),
        ([USER, BOTH, {**RESULT, "tool_call_id": "b"}], "messages[1].tool_calls[0]", "missing_result"),
        ([USER, BOTH, RESULT, USER], "messages[1].tool_calls[1]", "missing_result"),
        ([USER, BOTH, {**RESULT, "tool_call_id": "b"}, USER, RESULT], "messages[2]", "misplaced_result"),
        ([USER, {**CALLS, "tool_calls": [FUNCTION] * 129}], "messages[1].tool_calls", "too_many_calls"),
        ([USER, {**CALLS, "tool_calls": [CALL, CALL]}], "messages[1].tool_calls[1].id", "invalid_tool_call"),
    ],
)
def test_a_broken_conversation_says_where(items: Any, field: str, code: str) -> None:
    with pytest.raises(RowError) as caught:
        read(items)
    assert (caught.value.field, caught.value.code) == (field, code)


@pytest.mark.parametrize("arguments", ["{", "[]", 5])
def test_arguments_of_a_call_are_an_object(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RowError) as caught:
        read([USER, {"role": "assistant", "tool_calls": [call]}])
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(("wrong", "right"), [("gpt", "assistant"), ("human", "user")])
def test_a_sharegpt_role_is_told_the_right_one_and_a_mapping(wrong: str, right: str) -> None:
    with pytest.raises(RowError) as caught:
        read([{"role": wrong, "content": "Hi"}])
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f'Write "{right}", or pass mapping=')
    mapping = json.loads(caught.value.hint.partition("mapping=")[2].rstrip("."))
    assert mapping["roles"][wrong] == right


def test_a_role_with_a_typo_is_told_the_nearest() -> None:
    with pytest.raises(RowError) as caught:
        read([{"role": "assitant", "content": "Hi"}])
    assert caught.value.hint == 'Did you mean "assistant"?'
    assert "system, user, assistant, tool" in caught.value.message


def test_an_endless_role_makes_a_short_message() -> None:
    with pytest.raises(RowError) as caught:
        read([{"role": "assistant" * 100_000, "content": "Hi"}])
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        (messages.OPENAI, {"from": "human", "value": "x"}, '"role": "from", "content": "value"'),
        (messages.SHAREGPT, {"role": "user", "content": "x"}, '"role": "role", "content": "content"'),
        (messages.OPENAI, {"content": "x"}, None),
    ],
)
def test_keys_of_another_form_are_offered_as_a_mapping(
    keys: messages.Keys, message: dict[str, Any], hint: str | None
) -> None:
    with pytest.raises(RowError) as caught:
        read([message], keys)
    assert (caught.value.hint is None) if hint is None else (hint in (caught.value.hint or ""))


def test_developer_is_read_as_system_and_text_parts_as_text() -> None:
    parts = [{"type": "text", "text": "Be "}, {"text": "kind"}, "."]
    made = read([{"role": "developer", "content": parts}, USER, ASSISTANT])
    assert made.turns[0] == Turn(role="system", content="Be kind.")


def test_names_are_kept_and_unknown_fields_are_told() -> None:
    made = read([{**USER, "name": "Ann", "mood": "glad"}, {**ASSISTANT, "refusal": None, "audio": {}}])
    assert made.turns[0] == Turn(role="user", content="Hi", name="Ann")
    assert made.unread == {"messages[].mood", "messages[].audio"}


def test_an_answer_with_weight_0_is_not_trained() -> None:
    made = read(
        [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1.0}, {**ASSISTANT, "weight": None}]
    )
    assert made.untrained == {1}


def test_an_empty_answer_and_a_last_user_turn_are_no_errors() -> None:
    assert len(read([USER, {"role": "assistant", "content": ""}, USER]).turns) == 3


def test_calls_and_their_results_come_in_one_form() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {"where": "here"}}}
    expected = Turn(role="assistant", content="", tool_calls=[call])
    for item in (CALLS, {"role": "assistant", "tool_calls": [CALL]}):
        made = read([USER, item, RESULT])
        assert made.turns[1] == expected
        assert made.turns[2] == Turn(role="tool", content="found", tool_call_id="a")


def test_legacy_function_calls_are_calls() -> None:
    made = read(
        [
            USER,
            {"role": "assistant", "function_call": FUNCTION},
            {"role": "function", "name": "look", "content": "x"},
        ]
    )
    call_id = made.turns[1]["tool_calls"][0]["id"]
    assert len(call_id) == 9
    assert made.turns[2] == Turn(role="tool", content="x", name="look", tool_call_id=call_id)


def test_results_without_an_id_answer_the_calls_in_order() -> None:
    result = {"role": "tool", "content": "x"}
    made = read([USER, BOTH, result, result])
    assert [turn["tool_call_id"] for turn in made.turns[2:]] == ["a", "b"]
    made = read([USER, BOTH, {**result, "tool_call_id": "b"}, result])
    assert [turn["tool_call_id"] for turn in made.turns[2:]] == ["a", "b"]


def test_results_come_in_the_order_of_their_calls() -> None:
    of_b, of_a = ({"role": "tool", "content": f"of {name}", "tool_call_id": name} for name in "ba")
    made = read([USER, BOTH, of_b, of_a, ASSISTANT, USER, BOTH, of_a, of_b, ASSISTANT])
    assert [turn["content"] for turn in made.turns if turn["role"] == "tool"] == [
        "of a", "of b", "of a", "of b"
    ]  # fmt: skip


def test_sharegpt_calls_are_calls() -> None:
    items = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps({"name": "look", "arguments": {"n": 1.5}})},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "Here."},
    ]
    made = read(items, messages.SHAREGPT)
    assert [turn["role"] for turn in made.turns] == ["user", "assistant", "tool", "assistant"]
    assert made.turns[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"n": 1.5}}
    items[1]["value"] = "no JSON"
    with pytest.raises(RowError) as caught:
        read(items, messages.SHAREGPT)
    assert (caught.value.field, caught.value.code) == ("conversations[1].value", "invalid_json")


def test_results_without_an_id_answer_the_call_of_their_name() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("weather", "clock", "weather")]
    results = [
        {"role": "tool", "name": name, "content": text}
        for name, text in (("clock", "noon"), ("weather", "sun"), ("weather", "rain"))
    ]
    made = read([USER, {"role": "assistant", "tool_calls": calls}, *results, ASSISTANT])
    assert [turn["content"] for turn in made.turns[2:5]] == ["sun", "noon", "rain"]


@pytest.mark.parametrize(
    "call",
    [
        {"id": "a", "name": "f", "args": {"x": 1}},
        {"function": {"name": "f", "parameters": {"x": 1}}},
        {"function": {"name": "f"}, "arguments": {"x": 1}},
        {"function": {"name": "f"}, "input": "x"},
    ],
)
def test_arguments_under_another_name_are_refused(call: dict[str, Any]) -> None:
    other = next(
        name for name in ("args", "parameters", "arguments", "input") if f'"{name}"' in json.dumps(call)
    )
    for item in ({"tool_calls": [call]}, {"function_call": call}):
        with pytest.raises(RowError, match=f'has "{other}", but its function has no "arguments"') as caught:
            read([USER, {"role": "assistant"} | item])
        assert (caught.value.field, caught.value.code) == ("messages[1].tool_calls[0]", "invalid_tool_call")
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(call)}]
    with pytest.raises(RowError, match=f'"{other}"'):
        read(sharegpt, messages.SHAREGPT)


def test_other_fields_of_a_call_and_of_a_text_part_are_told() -> None:
    call = {**CALL, "index": 0, "note": "x", "function": {**FUNCTION, "parameters": {"y": 1}, "none": None}}
    part = {"type": "text", "text": "a", "image_url": "x"}
    made = read([{"role": "user", "content": [part]}, {"role": "assistant", "tool_calls": [call]}])
    assert made.unread == {
        "messages[].tool_calls[].note",
        "messages[].tool_calls[].parameters",
        "messages[].content[].image_url",
    }
    value = {"name": "f", "arguments": {}, "thought": "x"}
    told = read(
        [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value}], messages.SHAREGPT
    )
    assert told.unread == {"conversations[].value[].thought"}


@pytest.mark.parametrize(
    ("content", "word"),
    [({"a": 1}, "an object"), ([[1]], "an array"), (True, "a boolean"), (1.5, "a number")],
)
def test_a_content_that_is_no_text_is_called_as_json_calls_it(content: Any, word: str) -> None:
    with pytest.raises(RowError, match=f"is {word}"):
        read([{"role": "user", "content": content}, ASSISTANT])


def test_ids_that_are_missing_do_not_meet_those_that_are_written() -> None:
    calls = [{**CALL, "id": "call00001"}, {"function": FUNCTION}]
    made = read([USER, {"role": "assistant", "tool_calls": calls}])
    assert [call["id"] for call in made.turns[1]["tool_calls"]] == ["call00001", "call00002"]


def test_ids_may_be_numbers_or_empty_and_arguments_null() -> None:
    for given in (7, "", None):
        calls = [{"id": given, "function": {"name": "look", "arguments": None}}]
        items = [USER, {"role": "assistant", "tool_calls": calls}, {**RESULT, "tool_call_id": given}]
        made = read(items)
        assert made.turns[2]["tool_call_id"] == made.turns[1]["tool_calls"][0]["id"]
        assert made.turns[1]["tool_calls"][0]["function"]["arguments"] == {}
