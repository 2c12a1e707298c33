"""A whole file in one pass: what is counted, what is listed, and real data sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.formats import validate
from core.ml.formats.validate import Reading, Report

SQL_MAPPING = {
    "messages": [
        {"role": "system", "content": "Answer with SQL.\n{context}"},
        {"role": "user", "content": "{question}"},
        {"role": "assistant", "content": "{answer}"},
    ]
}


def inspect(tmp_path: Path, rows: list[dict[str, Any] | str], **options: Any) -> Report:
    file = tmp_path / "data"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return validate.inspect(file, line_max_bytes=10_000, **options)


def pair(prompt: str, completion: str = "x") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def test_fifty_errors_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    report = inspect(tmp_path, [pair("good"), *["broken"] * 120, pair("good too")])
    assert (report.error_count, len(report.errors), report.rows) == (120, 50, 122)
    assert [error["line"] for error in report.errors] == list(range(2, 52))
    refusal = validate.refuse(report)
    assert refusal.error_count == 120
    assert refusal.errors == report.errors
    assert refusal.message.startswith("Line 2: Not valid JSON")
    assert "120 rows have errors" in refusal.message


def test_an_error_names_line_row_field_and_what_to_do(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]
    report = inspect(tmp_path, ["", "", {"messages": conversation}])
    assert report.errors == [
        {
            "line": 3,
            "row": 1,
            "field": "messages[1].role",
            "code": "unknown_role",
            "message": 'messages[1].role is "gpt"; expected system, user, assistant.',
            "hint": 'Write "assistant".',
        }
    ]


def test_duplicates_are_counted_and_their_first_lines_named(tmp_path: Path) -> None:
    report = inspect(tmp_path, [pair("a"), pair("b"), *[pair("a")] * 12, {**pair("b"), "id": 1}])
    assert report.duplicates == 13
    assert report.warnings == [
        {
            "code": "duplicates",
            "message": "13 rows repeat an earlier row.",
            "count": 13,
            "lines": list(range(3, 13)),
        }
    ]
    assert report.summary()["warning_count"] == 13


def test_rows_that_only_look_alike_are_no_duplicates(tmp_path: Path) -> None:
    report = inspect(tmp_path, [pair("ab", "c"), pair("a", "bc"), pair("a ", "bc")])
    assert (report.duplicates, report.warnings) == (0, [])


def test_length_quantiles_count_characters(tmp_path: Path) -> None:
    rows = [pair("é" * n, "x") for n in range(1, 101)]
    report = inspect(tmp_path, rows[::-1])
    assert report.length == {"p50": 52, "p95": 96, "max": 101}


def test_columns_and_format_are_those_of_the_first_good_row(tmp_path: Path) -> None:
    report = inspect(tmp_path, ["broken", pair("a"), pair("b")])
    assert (report.format, report.columns, report.file_type) == (
        "prompt_completion",
        ["prompt", "completion"],
        "jsonl",
    )


def test_every_row_must_have_the_format_of_the_first(tmp_path: Path) -> None:
    report = inspect(tmp_path, [pair("a"), {"instruction": "a", "output": "b"}])
    assert [(error["line"], error["code"]) for error in report.errors] == [(2, "missing_field")]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"kind": "parquet"}, "unknown_format"),
        ({"kind": "mapping"}, "invalid_mapping"),
        ({"kind": "alpaca", "mapping": SQL_MAPPING}, "invalid_mapping"),
        ({"mapping": SQL_MAPPING}, "invalid_mapping"),
    ],
)
def test_a_request_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        inspect(tmp_path, [pair("a")], **options)
    assert caught.value.code == code


def test_a_header_alone_is_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        inspect(tmp_path, ["prompt,completion"])
    assert caught.value.code == "empty_file"


def test_what_was_inspected_is_read_again_the_same(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('prompt,completion\n"a\nb",x\nc,y\n')
    report = validate.inspect(file, line_max_bytes=1000)
    assert (report.file_type, report.format, report.error_count) == ("csv", "prompt_completion", 0)
    with file.open("rb") as stream:
        again = list(validate.conversations(stream, Reading("csv", "prompt_completion", None, 1000)))
    assert [(line, [turn["content"] for turn in turns]) for line, turns in again] == [
        (2, ["a\nb", "x"]),
        (4, ["c", "y"]),
    ]


# ---- Real data sets


@pytest.mark.parametrize(
    ("name", "file", "rows", "format_", "mapping"),
    [
        ("restaurant_slots", "train.jsonl", 2000, "messages", None),
        ("restaurant_slots", "valid.jsonl", 200, "messages", None),
        ("sql_create_context", "train.jsonl", 2500, "mapping", SQL_MAPPING),
        ("e2e_nlg", "train.jsonl", 1461, "prompt_completion", None),
    ],
)
def test_real_data_sets_are_read_without_an_error(
    shared_data: Path, name: str, file: str, rows: int, format_: str, mapping: dict[str, Any] | None
) -> None:
    path = shared_data / name / file
    report = validate.inspect(path, mapping=mapping, line_max_bytes=4 * 1024**2)
    assert (report.rows, report.error_count, report.format) == (rows, 0, format_)
    reading = Reading(report.file_type, format_, mapping, 4 * 1024**2)  # type: ignore[arg-type]
    with path.open("rb") as stream:
        conversations = list(validate.conversations(stream, reading))
    assert len(conversations) == rows
    assert all(turns[-1]["role"] == "assistant" for _, turns in conversations)


def test_the_mapping_of_a_real_table_fills_in_its_columns(shared_data: Path) -> None:
    path = shared_data / "sql_create_context" / "train.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("rb") as stream:
        _, turns = next(validate.conversations(stream, Reading("jsonl", "mapping", SQL_MAPPING, 10_000)))
    assert [turn["content"] for turn in turns] == [
        f"Answer with SQL.\n{first['context']}",
        first["question"],
        first["answer"],
    ]


def test_a_real_table_without_a_mapping_is_told_to_give_one(shared_data: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        validate.inspect(shared_data / "sql_create_context" / "train.jsonl", line_max_bytes=10_000)
    assert (caught.value.code, caught.value.param) == ("unknown_format", "mapping")


def test_a_real_json_array_is_refused_as_one(shared_data: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        validate.inspect(shared_data / "self_instruct_alpaca" / "train.json", line_max_bytes=10_000)
    assert caught.value.code == "unsupported_file"
    assert "JSON array" in caught.value.message
    assert "one JSON object a line" in caught.value.message
