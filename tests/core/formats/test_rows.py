"""Rows of the known formats to conversations, and what is wrong with those that become none."""

import json
from typing import Any

import pytest

from core.ml.formats.chat.example import Conversation, RowError, Turn
from core.ml.formats.chat.rows import Format, reader
from tests.core.formats.given import ASSISTANT, USER

CONVERSATION = [Turn(role="user", content="Hi"), Turn(role="assistant", content="Hello there")]
SYSTEM = Turn(role="system", content="Be kind.")
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]


def read(kind: Format, row: dict[str, Any]) -> Conversation:
    example = reader(kind, None)(row)
    assert isinstance(example, Conversation)
    return example


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("messages", {"messages": [USER, ASSISTANT], "tools": [], "id": 7}),
        (
            "messages",
            {
                "messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]'
            },
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello there"}),
        ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("prompt_completion", {"prompt": json.dumps([USER]), "completion": f" {json.dumps([ASSISTANT])}"}),
        ("alpaca", {"instruction": "Hi", "output": "Hello there"}),
        ("alpaca", {"instruction": "Hi", "input": " \n", "output": "Hello there"}),
        ("alpaca", {"instruction": "Hi", "input": "<noinput>", "output": "Hello there"}),
        ("alpaca", {"instruction": "", "input": "Hi", "output": "Hello there"}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello there"}),
        ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello there", "history": []}),
        ("sharegpt", {"conversations": SHAREGPT}),
        ("sharegpt", {"conversations": [USER, ASSISTANT]}),
    ],
)
def test_every_format_becomes_the_same_conversation(kind: Format, row: dict[str, Any]) -> None:
    assert read(kind, row).turns == CONVERSATION


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello there"}),
        ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("alpaca", {"instruction": "Hi", "output": "Hello there"}),
        ("sharegpt", {"conversations": SHAREGPT}),
    ],
)
def test_a_system_column_is_the_first_turn(kind: Format, row: dict[str, Any]) -> None:
    assert read(kind, {**row, "system": "Be kind."}).turns == [SYSTEM, *CONVERSATION]
    assert read(kind, {**row, "system": ""}).turns == CONVERSATION


def test_two_systems_are_refused() -> None:
    row = {"conversations": [{"from": "system", "value": "x"}, *SHAREGPT], "system": "y"}
    with pytest.raises(RowError) as caught:
        read("sharegpt", row)
    assert caught.value.code == "two_systems"


def test_alpaca_input_follows_the_instruction_and_history_comes_before() -> None:
    row = {
        "instruction": "Translate",
        "input": "chat",
        "output": "cat",
        "history": [["a", "b"]],
        "system": "s",
    }
    assert [turn["content"] for turn in read("alpaca", row).turns] == [
        "s",
        "a",
        "b",
        "Translate\n\nchat",
        "cat",
    ]


def test_answers_in_a_conversational_prompt_are_not_trained() -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [{**ASSISTANT, "weight": 1}], "system": "s"}
    made = read("prompt_completion", row)
    assert [turn["role"] for turn in made.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert made.untrained == {2}


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (True, "true"), (12345678901234567890123, "12345678901234567890123"), ("", "")],
)
def test_numbers_are_text_as_they_are_written(value: Any, text: str) -> None:
    assert read("alpaca", {"instruction": "Hi", "output": value}).turns[1]["content"] == text


@pytest.mark.parametrize(
    ("kind", "row", "field", "code"),
    [
        ("prompt_completion", {"prompt": "Hi"}, "completion", "missing_field"),
        ("prompt_completion", {"prompt": "Hi", "completion": None}, "completion", "missing_field"),
        ("prompt_completion", {"prompt": ["Hi"], "completion": "Hello"}, "completion", "not_text"),
        ("prompt_completion", {"prompt": "Hi", "completion": b"\xff"}, "completion", "not_utf8"),
        ("prompt_completion", {"prompt": {}, "completion": "Hello"}, "prompt", "not_text"),
        ("prompt_completion", {"prompt": [USER], "completion": [USER]}, "completion", "no_answer"),
        (
            "prompt_completion",
            {"prompt": "Hi", "completion": "x", "history": "y"},
            "history",
            "unknown_field",
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": float("inf")}, "completion", "not_text"),
        ("alpaca", {"output": "Hello"}, "instruction", "missing_field"),
        ("alpaca", {"instruction": "Hi", "input": {}, "output": "Hello"}, "input", "not_text"),
        ("alpaca", {"instruction": "Hi", "output": "x", "history": "y"}, "history", "not_text"),
        ("alpaca", {"instruction": "Hi", "output": "x", "history": [["a"]]}, "history[0]", "not_text"),
        ("alpaca", {"instruction": "Hi", "output": "x", "tools": [1]}, "tools", "unknown_field"),
        ("messages", {"messages": [USER, ASSISTANT], "system": "x"}, "system", "unknown_field"),
        ("messages", {"messages": [USER, ASSISTANT], "weight": 0.5}, "weight", "unknown_field"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": [{}]}, "tools[0]", "invalid_tools"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "tools", "invalid_tools"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": "[{]"}, "tools", "invalid_json"),
        (
            "messages",
            {"messages": [USER, ASSISTANT], "functions": [{"name": ""}]},
            "functions[0]",
            "invalid_tools",
        ),
        ("sharegpt", {"conversations": []}, "conversations", "missing_field"),
        ("sharegpt", {"conversations": ["Hi"]}, "conversations[0]", "not_an_object"),
        (
            "sharegpt",
            {"conversations": [{"from": "alien", "value": "x"}]},
            "conversations[0].from",
            "unknown_role",
        ),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": 1}]}, "conversations[0].value", "not_text"),
    ],
)
def test_a_broken_row_says_which_field(kind: Format, row: dict[str, Any], field: str, code: str) -> None:
    with pytest.raises(RowError) as caught:
        read(kind, row)
    assert (caught.value.field, caught.value.code) == (field, code)


def test_tools_are_read_in_every_form() -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    expected = [{"type": "function", "function": function}]
    for tools in ([function], expected, '[{"name": "f", "parameters": {"type": "object"}}]'):
        assert read("messages", {"messages": [USER, ASSISTANT], "tools": tools}).tools == expected
        assert read("sharegpt", {"conversations": SHAREGPT, "tools": tools}).tools == expected
    assert read("messages", {"messages": [USER, ASSISTANT], "functions": [function]}).tools == expected
    assert read("messages", {"messages": [USER, ASSISTANT], "tools": "[]"}).tools is None


@pytest.mark.parametrize("field", ["train", "loss", "mask"])
def test_another_programs_word_for_not_trained_is_refused(field: str) -> None:
    said = {"role": "assistant", "content": "b", field: False}
    with pytest.raises(RowError) as caught:
        reader("messages", None)({"messages": [{"role": "user", "content": "a"}, said]})
    assert (caught.value.code, caught.value.field) == ("unknown_field", f"messages[1].{field}")


def test_a_weight_of_a_row_is_refused_even_if_it_is_zero() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RowError, match="weight"):
        reader("messages", None)({"messages": turns, "weight": 0})


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("[1, 2]", "[3]"),
        ("[not JSON", "[at all"),
        ("[1, 2]", "three"),
        ('[{"a": 1}]', '[{"b": 1}]'),
    ],
)
def test_texts_that_are_not_both_lists_of_messages_stay_texts(prompt: str, completion: str) -> None:
    made = read("prompt_completion", {"prompt": prompt, "completion": completion})
    assert [turn["content"] for turn in made.turns] == [prompt, completion]


@pytest.mark.parametrize(
    ("prompt", "completion", "field"),
    [
        ("Write it as messages", json.dumps([ASSISTANT]), "completion"),
        (json.dumps([USER]), "Hello", "prompt"),
        (json.dumps([USER]), "[]", "prompt"),
        (str([USER]), str([ASSISTANT]), "prompt"),
        (json.dumps([USER]), json.dumps([ASSISTANT])[:-1] + ",]", "prompt"),
    ],
)
def test_messages_written_into_a_text_are_not_trained_as_they_stand(
    prompt: str, completion: str, field: str
) -> None:
    row = {"prompt": prompt, "completion": completion}
    with pytest.raises(RowError) as caught:
        read("prompt_completion", row)
    assert (caught.value.field, caught.value.code) == (field, "invalid_json")
    how = {"prompt": "{prompt}", "completion": "{completion}"}  # what the hint says
    made = reader("mapping", how)(row)
    assert isinstance(made, Conversation)
    assert [turn["content"] for turn in made.turns] == [prompt, completion]


def call(name: str) -> dict[str, Any]:
    return {"id": name, "function": {"name": name, "arguments": "{}"}}


def test_a_completion_may_begin_with_the_results_of_the_prompts_calls() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [call("a"), call("b")]}
    of_a, of_b = ({"role": "tool", "content": f"of {name}", "tool_call_id": name} for name in "ab")
    made = read("prompt_completion", {"prompt": [USER, calls], "completion": [of_b, of_a, ASSISTANT]})
    assert [turn["content"] for turn in made.turns] == ["Hi", "", "of a", "of b", "Hello there"]
    assert made.untrained == {1}
    with pytest.raises(RowError) as caught:
        read("prompt_completion", {"prompt": [USER, calls, of_a], "completion": [ASSISTANT]})
    assert (caught.value.field, caught.value.code) == ("prompt[1].tool_calls[1]", "missing_result")
    with pytest.raises(RowError) as caught:
        read("prompt_completion", {"prompt": [USER], "completion": [calls, of_b, ASSISTANT]})
    assert caught.value.field == "completion[0].tool_calls[0]"


TURNS = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]


@pytest.mark.parametrize(
    ("how", "row", "way_out"),
    [
        ({"prompt": "{q}", "completion": "{a}"}, {"q": "x", "a": "y", "system": "s"}, "Put {system} into"),
        ({"messages": TURNS}, {"q": "x", "a": "y", "history": "s"}, "Put {history} into"),
        ({"messages": TURNS}, {"q": "x", "a": "y", "weight": 0}, "Leave out the rows"),
        ({"messages": "m"}, {"m": [USER, ASSISTANT], "history": [["a", "b"]]}, "Remove the column"),
        (
            {"messages": "m", "roles": {"bot": "assistant"}},
            {"m": [USER, ASSISTANT], "weight": 0},
            "Leave out",
        ),
        ({"text": "{text}"}, {"text": "x", "weight": 0}, "Leave out the rows"),
        ({"text": "{text}"}, {"text": "x", "tools": "y"}, "Put {tools} into"),
    ],
)
def test_what_would_change_the_training_is_refused_where_a_mapping_passes_it_over(
    how: dict[str, Any], row: dict[str, Any], way_out: str
) -> None:
    with pytest.raises(RowError, match="which would be ignored") as caught:
        reader("mapping", how)(row)
    assert caught.value.code == "unknown_field"
    assert way_out in str(caught.value.hint)


def test_the_way_out_for_a_system_beside_messages_works() -> None:
    row = {"messages": [USER, ASSISTANT], "system": "Be kind."}
    with pytest.raises(RowError) as caught:
        read("messages", row)
    hint = str(caught.value.hint)
    mapping = json.loads(hint[hint.index("{") : hint.index("}") + 1])
    made = reader("mapping", mapping)(row)
    assert isinstance(made, Conversation)
    assert made.turns == [SYSTEM, *CONVERSATION]


def test_a_mapping_that_names_such_a_column_reads_it() -> None:
    how = {"prompt": "{q} {history}", "completion": "{a}"}
    made = reader("mapping", how)({"q": "x", "a": "y", "history": "past"})
    assert isinstance(made, Conversation)
    assert made.turns[0]["content"] == "x past"
