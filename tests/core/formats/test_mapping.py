"""The mapping of a table: what is one, and the rows that it makes."""

import contextlib
import time
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.formats.chat import mapping as mappings
from core.ml.formats.chat.example import Conversation, RowError
from core.strict_json import loads_line
from tests.core.formats.given import ASSISTANT, USER


def turns(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]}


def read(how: dict[str, Any], row: dict[str, Any]) -> list[tuple[str, str]] | str:
    mappings.check(how, list(row))
    example = mappings.reader(how)(row)
    if isinstance(example, Conversation):
        return [(turn["role"], turn["content"]) for turn in example.turns]
    return example


def filled(template: str, row: dict[str, Any]) -> str:
    return read(turns(template, "{answer}"), {**row, "answer": "x"})[0][1]


@pytest.mark.parametrize(
    ("template", "result"),
    [
        ("{a} and {b c}", "1 and {2}"),
        ("{{a}} stays for {a}", "{a} stays for 1"),
        ('Reply as {"key": {a}, "list": [{}]}', 'Reply as {"key": 1, "list": [{}]}'),
        ("function() { return 1; }", "function() { return 1; }"),
        ("{a}{a}", "11"),
        ("\\boxed{{{a}}} {a}%", "\\boxed{1} 1%"),
        ("no place", "no place"),
        ("{Question (en)?}", "q"),
    ],
)
def test_places_are_filled_and_other_braces_stay(template: str, result: str) -> None:
    assert filled(template, {"a": 1, "b c": "{2}", "Question (en)?": "q"}) == result


def test_a_value_is_never_read_as_a_template() -> None:
    assert filled("{a}", {"a": "{b} {{a}} \\1", "b": "secret"}) == "{b} {{a}} \\1"


def test_numbers_are_filled_in_as_they_are_written() -> None:
    row = loads_line(b'{"a": 1.10, "b": 12345678901234567890123, "c": 1E2, "d": false}', depth=4)
    assert filled("{a} {b} {c} {d}", row) == "1.10 12345678901234567890123 1E2 false"


def test_every_form_of_mapping_is_read() -> None:
    row = {
        "q": "Hi",
        "a": "Hello",
        "talk": [{"who": "dev", "says": "Be kind."}, {"who": "client", "says": "Hi"}],
    }
    row["talk"].append({"who": "agent", "says": "Hello"})
    expected = [("user", "Hi"), ("assistant", "Hello")]
    assert read(turns("{q}", "{a}"), row) == expected
    assert read({"prompt": "{q}", "completion": "{a}"}, row) == expected
    roles = {"client": "user", "agent": "assistant", "dev": "developer"}
    how = {"messages": "talk", "role": "who", "content": "says", "roles": roles}
    assert read(how, row) == [("system", "Be kind."), *expected]
    assert read({"messages": "{m}"}, {"m": [USER, ASSISTANT]}) == [
        ("user", "Hi"),
        ("assistant", "Hello there"),
    ]
    assert read({"text": "{q}\n{a}"}, row) == "Hi\nHello"
    assert read({"text": "{q}", "layout": "llama2"}, {"q": "[INST] Hi [/INST] Hello"}) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        {"messages": []},
        {"messages": "b"},
        {"messages": ["user"]},
        {"messages": 5},
        {"messages": [USER, ASSISTANT], "more": 1},
        {"messages": [USER, {"role": "assistant", "content": "{a}"}], "role": "x"},
        {"messages": [{"role": "user"}, ASSISTANT]},
        {"messages": [{"role": "user", "content": 1}, ASSISTANT]},
        {"messages": [{"role": "gpt", "content": "x"}, ASSISTANT]},
        {"messages": [{"role": [], "content": "x"}, ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "assistant", "content": "{a}"}, USER]},
        {"messages": "a", "role": 1},
        {"messages": "a", "roles": []},
        {"messages": "a", "roles": {"x": "call"}},
        {"messages": "a", "roles": {"x": ["user"]}},
        {"prompt": "{a}"},
        {"prompt": "{a}", "completion": "always the same"},
        {"prompt": "{a}", "completion": None},
        {"text": "constant"},
        {"text": "{{a}}"},
        {"text": "{a}", "layout": "unknown"},
        {"text": "{a}", "layout": ["alpaca"]},
        {"text": "{a}", "messages": "a"},
    ],
)
def test_what_is_no_mapping_is_refused(wrong: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        mappings.check(wrong, ["a"])
    assert (caught.value.code, caught.value.param) == ("invalid_mapping", "mapping")


def test_an_unknown_column_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadRequest) as caught:
        mappings.check(turns("{qestion}", "{answer}"), ["question", "answer"])
    assert caught.value.code == "invalid_mapping"
    assert '"qestion"' in caught.value.message
    assert caught.value.hint is not None
    assert 'Did you mean "question"?' in caught.value.hint
    assert "{{qestion}}" in caught.value.hint


@pytest.mark.parametrize(
    ("how", "row", "field", "code"),
    [
        (turns("{q}", "{a}"), {"q": "Hi"}, "a", "missing_field"),
        (turns("{q}", "{a}"), {"q": "Hi", "a": None}, "a", "missing_field"),
        (turns("{q}", "{a}"), {"q": ["Hi"], "a": "x"}, "q", "not_text"),
        (turns("{q}{q}", "{a}"), {"q": "x" * 3_000_000, "a": "x"}, "messages", "row_too_long"),
        ({"text": "{q}"}, {"q": " \n"}, "q", "empty_text"),
        ({"text": "{q}", "layout": "llama2"}, {"q": "plain"}, "q", "layout_mismatch"),
        ({"messages": "q"}, {"q": "x"}, "q", "missing_field"),
    ],
)
def test_a_mapped_row_that_does_not_fit_is_refused(
    how: dict[str, Any], row: dict[str, Any], field: str, code: str
) -> None:
    with pytest.raises(RowError) as caught:
        mappings.reader(how)(row)
    assert (caught.value.field, caught.value.code) == (field, code)


@pytest.mark.parametrize(
    ("how", "columns"),
    [
        (turns("{q} {{no}}", "{a}"), {"q", "a"}),
        ({"prompt": "{q}", "completion": "{é}"}, {"q", "é"}),
        ({"text": "{t}", "layout": "alpaca"}, {"t"}),
        ({"messages": "{talk}"}, {"talk", "tools", "functions", "system"}),
    ],
)
def test_the_columns_of_a_mapping_are_known(how: dict[str, Any], columns: set[str]) -> None:
    assert mappings.columns_of(how) == columns


def test_a_place_with_spaces_is_refused_not_taken_as_text() -> None:
    for place in ("{ q }", "{q }", "{ q}"):
        with pytest.raises(BadRequest, match=r"no place of a column|does not have"):
            mappings.check({"prompt": place, "completion": "{a}"}, ["q", "a"])
    mappings.check({"prompt": "{ x } {q}", "completion": "{a}"}, ["q", "a"])


@pytest.mark.parametrize(
    "column",
    [
        "question:en",
        "$price",
        "i[0]",
        "cost ($)",
        "a:b",
        "What's it?",
        "100 %",
        "a|b",
        "q\u00a0x",
        "a,b=c;d",
    ],
)
def test_any_column_is_read_by_its_name(column: str) -> None:
    how = {"prompt": f"Say {{{column}}} 5 %", "completion": f"{{{column}}}"}
    assert read(how, {column: "x"}) == [("user", "Say x 5 %"), ("assistant", "x")]
    assert read({**how, "prompt": f"{{{{{column}}}}}"}, {column: "x"})[0] == ("user", f"{{{column}}}")


@pytest.mark.parametrize("column", [' "q"', '"q"', "'q'", "two\nlines", " q", "q{ x}", "{ q"])
def test_a_column_that_no_place_can_name_is_refused_not_left_as_text(column: str) -> None:
    with pytest.raises(BadRequest, match="would stay as it stands") as caught:
        mappings.check({"prompt": f"{{{column}}}", "completion": "{a}"}, [column, "a"])
    assert caught.value.hint == "Rename the column."


def test_a_place_of_no_column_is_refused_whatever_its_name() -> None:
    with pytest.raises(BadRequest, match='"question:en"') as caught:
        mappings.check(turns("{question:en}", "{a}"), ["question_en", "a"])
    assert 'Did you mean "question_en"? Write {{question:en}} for literal braces.' in str(caught.value.hint)


def test_a_column_that_is_only_there_as_literal_text_is_refused() -> None:
    with pytest.raises(BadRequest, match="literal text"):
        mappings.check({"prompt": "{{q}}", "completion": "{a}"}, ["q", "a"])
    mappings.check({"prompt": "{q} and {{q}}", "completion": "{a}"}, ["q", "a"])


def test_places_and_messages_are_bounded() -> None:
    for how in (
        {"prompt": "{q}" * 300, "completion": "{a}"},
        {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}] * 150},
    ):
        with pytest.raises(BadRequest, match="256"):
            mappings.check(how, ["q", "a"])


def test_a_column_in_other_letters_is_meant() -> None:
    with pytest.raises(BadRequest) as caught:
        mappings.check(turns("{q}", "{A}"), ["q", "a"])
    assert 'Did you mean "a"?' in str(caught.value.hint)


@pytest.mark.parametrize(
    "text",
    [
        "{" + " " * 100_000,
        "{ " * 50_000,
        "{" * 100_000,
        "{ a" * 33_000,
        "{{a" * 33_000,
        "{" + "a" * 99_998 + "}",
    ],
)
def test_no_mapping_takes_more_than_linear_time(text: str) -> None:
    how = {"prompt": text, "completion": "{b}"}
    began = time.process_time()
    with contextlib.suppress(BadRequest):
        mappings.check(how, ["b", "x" * 100_000])
        mappings.reader(how)({"b": "x"})
    assert time.process_time() - began < 2


def test_a_list_mapping_reads_the_system_column() -> None:
    row = {"m": [USER, ASSISTANT], "system": "Be kind."}
    assert read({"messages": "m"}, row)[0] == ("system", "Be kind.")
    assert read({"messages": "m"}, {**row, "system": ""})[0] == ("user", "Hi")


@pytest.mark.parametrize(
    ("value", "word"), [({}, "an object"), ([], "an array"), (float("inf"), "a number"), ([1], "an array")]
)
def test_what_is_no_text_is_called_as_json_calls_it(value: Any, word: str) -> None:
    with pytest.raises(RowError, match=f'"q" is {word}, not text'):
        mappings.reader(turns("{q}", "{a}"))({"q": value, "a": "x"})
