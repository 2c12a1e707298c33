"""A whole file in one pass: what is counted, what is listed, and how it is read again."""

import io
import json
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.formats import detect, validate
from core.ml.formats.chat.example import Conversation
from core.ml.formats.files.rows import Limits
from core.ml.formats.validate import Reading
from tests.core.formats.given import codes, inspect, jsonl, pair

MAPPING = {
    "messages": [
        {"role": "user", "content": "{context}\n{question}"},
        {"role": "assistant", "content": "{answer}"},
    ]
}


def test_fifty_errors_are_listed_and_all_are_counted() -> None:
    report = inspect(pair("good"), *["broken"] * 120, pair("good too"))
    assert (report.error_count, len(report.errors), report.rows) == (120, 50, 122)
    assert [error["line"] for error in report.errors] == list(range(2, 52))
    refusal = validate.refuse(report)
    assert refusal.error_count == 120
    assert refusal.errors == report.errors
    assert refusal.message.startswith("Line 2: Not valid JSON")
    assert "120 rows have errors" in refusal.message


def test_an_error_names_line_row_field_and_what_to_do() -> None:
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assitant", "content": "Hello"}]
    report = inspect("", "", {"messages": conversation})
    assert report.errors == [
        {
            "line": 3,
            "row": 1,
            "field": "messages[1].role",
            "code": "unknown_role",
            "message": 'messages[1].role is "assitant"; expected system, user, assistant, tool.',
            "hint": 'Did you mean "assistant"?',
        }
    ]


def test_columns_and_format_are_those_of_the_good_rows() -> None:
    report = inspect("broken", pair("a"), pair("b"))
    assert report.detection is not None
    assert (report.detection.format, report.columns, report.file_type) == (
        "prompt_completion",
        ["prompt", "completion"],
        "jsonl",
    )


def test_a_good_row_after_many_broken_ones_is_still_read() -> None:
    report = inspect(*['{"broken'] * 150, pair("a"), {"instruction": "a", "output": "b"})
    assert report.error_count == 151
    assert report.detection is not None
    assert report.detection.format == "prompt_completion"
    assert inspect(*["{"] * 3).detection is None


def test_every_row_must_have_the_format_of_the_first() -> None:
    rows = [pair(f"question {i}") for i in range(100)]
    report = inspect(*rows, {"instruction": "a", "output": "b"}, {"prompt": "x"})
    assert [(error["line"], error["code"]) for error in report.errors] == [
        (101, "missing_field"),
        (102, "missing_field"),
    ]


def test_first_rows_of_two_formats_are_not_guessed() -> None:
    with pytest.raises(BadRequest) as caught:
        inspect(pair("a"), {"instruction": "a", "output": "b"})
    assert caught.value.code == "ambiguous_format"


def test_a_text_in_another_layout_further_down_is_an_error() -> None:
    rows = [{"text": f"[INST] {i} [/INST] the answer {i}"} for i in range(150)]
    report = inspect(*rows, {"text": "plain"})
    assert [(error["line"], error["code"]) for error in report.errors] == [(151, "layout_mismatch")]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"kind": "parquet"}, "invalid_format"),
        ({"kind": "mapping"}, "invalid_mapping"),
        ({"kind": "alpaca", "mapping": MAPPING}, "invalid_mapping"),
        ({"mapping": MAPPING}, "invalid_mapping"),
    ],
)
def test_a_request_that_does_not_fit_the_file_is_refused(options: dict[str, Any], code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        inspect(pair("a"), **options)
    assert caught.value.code == code


@pytest.mark.parametrize("data", [b"prompt,completion\n", b"[]", b"[ \n]\n"])
def test_a_file_without_any_row_is_empty(data: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        validate.inspect(io.BytesIO(data))
    assert caught.value.code == "empty_file"


def test_a_chosen_format_is_taken() -> None:
    rows = [
        {**pair("a"), "instruction": "x", "output": "y z"},
        {**pair("b"), "instruction": "w", "output": "y z"},
    ]
    report = inspect(*rows, kind="alpaca")
    assert report.error_count == 0
    assert sorted(codes(report)) == ["unread_field"]
    text = inspect({"text": "a b", "url": "x"}, {"text": "c d", "url": "x"}, kind="text")
    assert text.detection is not None
    assert text.detection.mapping == {"text": "{text}"}


def test_the_name_of_the_file_is_compared() -> None:
    assert codes(inspect(pair("a"), pair("b"), filename="rows.jsonl")) == {}
    report = inspect(pair("a"), pair("b"), filename="rows.csv")
    assert codes(report) == {"name_mismatch": 1}
    assert "JSON Lines" in report.warnings[0]["message"]


def test_the_first_rows_are_not_all_kept_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "SAMPLE_CHARS", 1000)
    report = inspect(*[{**pair(f"question {i}", "x y" * 100), f"c{i}": 1} for i in range(50)])
    assert report.rows == 50
    assert len(report.columns) == 5


@pytest.mark.parametrize(
    ("data", "file_type"),
    [
        (b'prompt,completion\n"a\nb",x\nc,y\n', "csv"),
        (b'[\n{"prompt": "a\\nb", "completion": "x"},\n\n{"prompt": "c", "completion": "y"}]', "json"),
        (b'\n{"prompt": "a\\nb", "completion": "x"}\n\n{"prompt": "c", "completion": "y"}', "jsonl"),
    ],
)
def test_what_was_inspected_is_read_again_the_same(data: bytes, file_type: Any) -> None:
    report = validate.inspect(io.BytesIO(data))
    assert (report.file_type, report.packed, report.error_count) == (file_type, False, 0)
    how = Reading(file_type, False, "prompt_completion", None)
    again = list(validate.conversations(io.BytesIO(data), how))
    contents = []
    for line, example in again:
        assert isinstance(example, Conversation)
        contents.append((line, [turn["content"] for turn in example.turns]))
    assert contents == [(2, ["a\nb", "x"]), (4, ["c", "y"])]


def test_findings_of_a_file_are_those_of_the_other() -> None:
    first, second = jsonl(pair("a"), pair("b")), jsonl(pair("c"), pair("b"))
    other = validate.findings_of(io.BytesIO(first), Reading("jsonl", False, "prompt_completion", None))
    report = validate.inspect(io.BytesIO(second), other=other)
    assert codes(report) == {"in_both_files": 1}


def test_a_file_that_has_changed_is_not_read_further() -> None:
    how = Reading("jsonl", False, "prompt_completion", None, Limits(line_bytes=100))
    with pytest.raises(BadRequest, match="Line 2 cannot be read any more"):
        list(validate.conversations(io.BytesIO(jsonl(pair("a"), "broken")), how))


def test_a_kept_file_that_cannot_be_read_any_more_names_the_line() -> None:
    how = validate.Reading("jsonl", False, "prompt_completion", None)
    with pytest.raises(BadRequest, match="Line 2: ") as caught:
        list(validate.conversations(io.BytesIO(jsonl(pair("a"), {"prompt": "a"})), how))
    assert caught.value.code == "invalid_dataset"


def test_format_text_takes_a_mapping_of_a_text_only() -> None:
    with pytest.raises(BadRequest) as caught:
        inspect(pair("a"), kind="text", mapping={"prompt": "{prompt}", "completion": "{completion}"})
    assert caught.value.code == "invalid_mapping"
    assert inspect({"body": "a b"}, kind="text", mapping={"text": "{body}"}).rows == 1


LATE = {"prompt": "{a} {c}", "completion": "{b}"}


def test_a_column_that_only_later_rows_have_is_in_the_file() -> None:
    rows = [{"a": f"row {i}", "b": "x y"} for i in range(100)]
    report = inspect(*rows, {"a": "1", "b": "x y", "c": "2"}, mapping=LATE)
    assert report.columns == ["a", "b", "c"]
    assert (report.error_count, report.errors[0]["line"], report.errors[0]["code"]) == (
        100,
        1,
        "missing_field",
    )
    assert report.errors[0]["message"] == 'The row has no "c".'
    with pytest.raises(BadRequest, match='names the column "c", which the file does not have'):
        inspect(*rows, mapping=LATE)


def test_a_name_that_only_a_later_row_shows_to_be_a_column_is_not_left_as_text() -> None:
    mapping = {"prompt": 'Say { c} and {"d": 1}', "completion": "{b}"}
    rows = [{"b": f"x y {i}"} for i in range(100)]
    assert inspect(*rows, {"b": "z"}, mapping=mapping).error_count == 0
    with pytest.raises(BadRequest, match="no place of a column"):
        inspect(*rows, {"b": "z", "c": "2"}, mapping=mapping)


def test_strange_columns_are_read_again_as_they_were_checked() -> None:
    data = b"question:en,$answer\nHi {x},Hello there\nHo,Hello again\n"
    with pytest.raises(BadRequest) as caught:
        validate.inspect(io.BytesIO(data))
    mapping = json.loads(str(caught.value.hint).partition("for example ")[2])
    report = validate.inspect(io.BytesIO(data), mapping=mapping)
    assert report.error_count == 0
    how = Reading("csv", False, "mapping", mapping)
    examples = [example for _, example in validate.conversations(io.BytesIO(data), how)]
    assert [[turn["content"] for turn in example.turns] for example in examples] == [
        ["Hi {x}", "Hello there"],
        ["Ho", "Hello again"],
    ]


def test_a_weight_beside_a_text_refuses_the_row() -> None:
    report = inspect({"text": "a b"}, {"text": "c d", "weight": 0}, kind="text")
    assert [(error["line"], error["code"]) for error in report.errors] == [(2, "unknown_field")]
