"""Which format a table has, how sure that is, and what is asked where it is not."""

import json
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.formats import detect
from core.ml.formats.chat import mapping as mappings
from core.ml.formats.chat.example import Conversation
from tests.core.formats.given import ASSISTANT, USER

CHAT = [USER, ASSISTANT]
LLAMA2, GUANACO = "[INST] Hi [/INST] Hello", "### Human: Hi### Assistant: Hello"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"id": 1, "messages": CHAT}, "messages"),
        ({"conversations": CHAT, "tools": ""}, "sharegpt"),
        ({"completion": "b", "prompt": "a"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"text": "a"}, "text"),
        ({"text": "a", "id": 5}, "text"),
    ],
)
def test_the_columns_say_the_format(row: dict[str, Any], kind: str) -> None:
    found = detect.detect([row])
    assert (found.format, found.confidence) == (kind, "certain")
    assert found.as_dict()["alternatives"] == []
    assert found.why


def test_a_text_column_beside_a_format_is_named_as_the_alternative() -> None:
    found = detect.detect([{"messages": CHAT, "text": "Hi\nHello"}])
    assert (found.format, found.confidence, found.others) == ("messages", "likely", ["text"])


def test_columns_that_fit_two_formats_are_not_guessed() -> None:
    with pytest.raises(BadRequest) as caught:
        detect.detect([{"messages": CHAT, "instruction": "a", "output": "b"}])
    assert (caught.value.code, caught.value.param) == ("ambiguous_format", "format")
    assert caught.value.hint == 'Say which: format="messages" or format="alpaca".'


@pytest.mark.parametrize(
    ("rows", "example"),
    [
        ([{"question": "Hi", "answer": "Hello"}], [("user", "Hi"), ("assistant", "Hello")]),
        ([{"Question": "Hi", "Answer": "Hello"}], [("user", "Hi"), ("assistant", "Hello")]),
        (
            [{"answer": "d", "question": "q", "context": "c"}],
            [("user", "c\n\nq"), ("assistant", "d")],
        ),
        ([{"text": "Hi", "category": "greeting"}], [("user", "Hi"), ("assistant", "greeting")]),
        ([{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}], [("user", "Hi"), ("assistant", "Hello")]),
        ([{"premise": "a", "hypothesis": "b", "label": "c"}], [("user", "a\n\nb"), ("assistant", "c")]),
        ([{"three": "x", "Answer (en)": "Hello"}], [("user", "x"), ("assistant", "Hello")]),
        ([{"text": "A long text.", "url": "http://x"}], "A long text."),
        ([{"body": "A long text."}], "A long text."),
        ([{"body": "A", "output": "B"}, {"body": "C"}], [("user", "A"), ("assistant", "B")]),
        (
            [{"talk": [{"speaker": "customer", "text": "Hi"}, {"speaker": "agent", "text": "Hello"}]}],
            [("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            [{"chat": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
            [("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            [{"talk": [{"speaker": "A", "text": "Hi"}, {"speaker": "B", "text": "Hello"}]}],
            [("user", "Hi"), ("assistant", "Hello")],
        ),
        ([{"question:en": "Hi", "answer": "Hello"}], [("user", "Hi"), ("assistant", "Hello")]),
        ([{"i[0]": "Hi", "$price": "Hello"}], [("user", "Hi"), ("assistant", "Hello")]),
        (
            [{"question": "Hi", "answer": "Hello", "system": "Be kind."}],
            [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            [{"question": "Hi", "sources": [{"url": "x"}], "answer": "Hello"}],
            [("user", "Hi"), ("assistant", "Hello")],
        ),
    ],
)
def test_other_columns_get_a_suggestion_that_works(rows: list[dict[str, Any]], example: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        detect.detect(rows)
    assert (caught.value.code, caught.value.param) == ("unknown_format", "mapping")
    assert caught.value.hint is not None
    suggested = json.loads(caught.value.hint.partition("for example ")[2])
    mappings.check(suggested, list(rows[0]))
    made = mappings.reader(suggested)(rows[0])
    if isinstance(made, Conversation):
        assert [(turn["role"], turn["content"]) for turn in made.turns] == example
    else:
        assert made == example


@pytest.mark.parametrize("row", [{}, {"a": {"b": 1}}, {"a": []}, {"a": [1], "b": [[]]}, {"x" * 5000: 1}])
def test_strange_columns_are_unknown_too(row: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        detect.detect([row])
    assert caught.value.code == "unknown_format"
    assert len(caught.value.message) < 500


def test_many_columns_make_a_short_message() -> None:
    with pytest.raises(BadRequest) as caught:
        detect.detect([{f"column{i}": "x" for i in range(256)}])
    assert caught.value.message.count("column") < 30
    assert "236 more" in caught.value.message


@pytest.mark.parametrize(
    ("texts", "layout"),
    [
        ([LLAMA2, LLAMA2], "llama2"),
        ([GUANACO], "guanaco"),
        (["### Instruction:\nHi\n### Response:\nHello"], "alpaca"),
        (["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"], "chatml"),
        (["plain", "text"], None),
    ],
)
def test_a_text_layout_is_found_and_said(texts: list[str], layout: str | None) -> None:
    found = detect.detect([{"text": text} for text in texts])
    assert found.as_dict()["layout"] == layout
    assert found.as_dict()["alternatives"] == (["text without layout"] if layout else [])
    assert found.mapping == ({"text": "{text}", "layout": layout} if layout else {"text": "{text}"})


@pytest.mark.parametrize(
    ("texts", "names"),
    [([LLAMA2, GUANACO], "guanaco and llama2"), ([LLAMA2, "plain"], "llama2 and no layout")],
)
def test_texts_in_several_layouts_are_not_guessed(texts: list[str], names: str) -> None:
    with pytest.raises(BadRequest) as caught:
        detect.detect([{"text": text} for text in texts])
    assert caught.value.code == "ambiguous_format"
    assert names in caught.value.message
    assert '{"text": "{text}", "layout": "llama2"}' in (caught.value.hint or "")


@pytest.mark.parametrize(
    "row",
    [
        {"one": "a", "two": "b", "three": "c"},
        {"question": "a", "best_answer": "b", "incorrect_answers": "c"},
        {"id": "a", "q": "b", "a": "c"},
        {"chosen_by": "a", "rejected": "b", "id": "c"},
    ],
)
def test_where_no_column_says_that_it_is_the_answer_none_is_proposed(row: dict[str, Any]) -> None:
    assert detect.suggest(list(row), [row]) is None
    with pytest.raises(BadRequest, match="no format") as caught:
        detect.detect([row])
    assert "COLUMN OF THE ANSWER" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"rows": [{"prompt": "a", "completion": "b"}]}, "rows"),
        ({"version": 1, "data": [{"question": "a", "answer": "b"}]}, "data"),
        ({"talk": [{"speaker": name, "text": "Hi"} for name in "ABC"]}, "talk"),
    ],
)
def test_a_list_that_is_no_conversation_gets_no_mapping_but_words(row: dict[str, Any], name: str) -> None:
    assert detect.suggest(list(row), [row]) is None
    with pytest.raises(BadRequest, match="no format") as caught:
        detect.detect([row])
    assert f'If "{name}" holds the rows of the file, upload that list alone.' in str(caught.value.hint)
    assert "NAME OF WHO ANSWERS" in str(caught.value.hint)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", '"answer"': "b"},
        {"two\nlines": "a", "answer": "b"},
        {"question": "a", "answer": "b", "weight": 0},
        {"question": "a", "answer": ["b"]},
    ],
)
def test_a_mapping_that_would_be_refused_is_not_proposed(row: dict[str, Any]) -> None:
    assert detect.suggest(list(row), [row]) is None


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": CHAT, "prompt": None, "completion": None}, "messages"),
        ({"messages": CHAT, "prompt": "", "completion": ""}, "messages"),
        ({"messages": None, "conversations": CHAT}, "sharegpt"),
        ({"prompt": "a", "completion": None}, "prompt_completion"),
    ],
)
def test_a_column_without_values_is_no_sign_of_a_format(row: dict[str, Any], kind: str) -> None:
    assert detect.detect([row, row]).format == kind
    with pytest.raises(BadRequest, match="more than one format"):
        detect.detect([{"messages": CHAT, "prompt": None, "completion": "b"}, {"prompt": "a"}])


def test_a_text_that_looks_like_turns_in_no_known_layout_is_not_certain() -> None:
    found = detect.detect([{"text": "once"}, {"text": "### Question:\nHi\n### Answer:\nHello"}])
    assert (found.format, found.confidence, found.mapping) == ("text", "likely", {"text": "{text}"})
    assert "all of it is trained" in found.why
