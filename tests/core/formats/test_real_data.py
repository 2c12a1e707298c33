"""Public data sets, as they are published."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.formats import validate
from core.ml.formats.chat.example import Conversation, Example
from core.ml.formats.validate import Reading, Report

PAIR = {"messages": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]}


def inspect(path: Path, mapping: dict[str, Any] | None = None) -> Report:
    with path.open("rb") as file:
        return validate.inspect(file, mapping=mapping, filename=path.name)


def examples(path: Path, report: Report) -> list[Example]:
    assert report.detection is not None
    how = Reading(report.file_type, report.packed, report.detection.format, report.detection.mapping)
    with path.open("rb") as file:
        return [example for _, example in validate.conversations(file, how)]


@pytest.mark.parametrize(
    ("name", "rows", "format_", "layout"),
    [
        ("guanaco_chat/train.jsonl", 639, "text", "llama2"),
        ("guanaco_chat/valid.jsonl", 41, "text", "llama2"),
        ("medquad/train.jsonl", 1000, "text", "alpaca"),
        ("medquad/valid.jsonl", 100, "text", "alpaca"),
        ("multiturn_chat/train.jsonl", 219, "messages", None),
        ("multiturn_chat/train.parquet", 219, "messages", None),
        ("multiturn_chat/valid.jsonl", 25, "messages", None),
        ("multiturn_chat/valid.parquet", 25, "messages", None),
        ("wikisql_text/train.jsonl", 1000, "text", None),
        ("wikisql_text/valid.jsonl", 100, "text", None),
        ("self_instruct_alpaca/train.json", 302, "alpaca", None),
        ("self_instruct_alpaca/valid.json", 40, "alpaca", None),
        ("glaive_toolcall/train.jsonl", 145, "sharegpt", None),
        ("glaive_toolcall/valid.jsonl", 20, "sharegpt", None),
        ("restaurant_slots/train.jsonl", 2000, "messages", None),
        ("restaurant_slots/valid.jsonl", 200, "messages", None),
        ("openai_chat_toy/train.jsonl", 5, "messages", None),
        ("e2e_nlg/train.jsonl", 1461, "prompt_completion", None),
        ("e2e_nlg/valid.jsonl", 60, "prompt_completion", None),
    ],
)
def test_real_data_sets_are_read_without_an_error(
    shared_data: Path, name: str, rows: int, format_: str, layout: str | None
) -> None:
    report = inspect(shared_data / name)
    assert report.detection is not None
    assert (report.rows, report.error_count) == (rows, 0)
    assert (report.detection.format, report.detection.as_dict()["layout"]) == (format_, layout)
    looks_like_turns = name.startswith("wikisql_text")  # "Q: …" and "A: …", which is no known layout
    assert report.detection.confidence == ("likely" if looks_like_turns else "certain")
    made = examples(shared_data / name, report)
    assert len(made) == rows
    for example in made:
        if format_ == "text" and layout is None:
            assert isinstance(example, str)
            continue
        assert isinstance(example, Conversation)
        assert any(turn["role"] == "assistant" for turn in example.turns)
        if layout:
            marks = ("[INST]", "[/INST]", "</s>", "### Instruction:", "### Response:")
            assert not any(mark in turn["content"] for turn in example.turns for mark in marks)


@pytest.mark.parametrize(
    ("name", "rows", "question", "answer"),
    [
        ("gsm8k/train.jsonl", 1500, "{question}", "{answer}"),
        ("gsm8k/valid.jsonl", 150, "{question}", "{answer}"),
        ("sql_create_context/train.jsonl", 2500, "{context}\n\n{question}", "{answer}"),
        ("sql_create_context/valid.jsonl", 250, "{context}\n\n{question}", "{answer}"),
        ("banking77/train.csv", 5284, "{text}", "{category}"),
        ("banking77/valid.csv", 385, "{text}", "{category}"),
    ],
)
def test_a_real_table_is_read_with_the_mapping_that_is_suggested(
    shared_data: Path, name: str, rows: int, question: str, answer: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        inspect(shared_data / name)
    assert (caught.value.code, caught.value.param) == ("unknown_format", "mapping")
    assert caught.value.hint is not None
    mapping = json.loads(caught.value.hint.partition("for example ")[2])
    assert [turn["content"] for turn in mapping["messages"]] == [question, answer]
    report = inspect(shared_data / name, mapping)
    assert (report.rows, report.error_count) == (rows, 0)
    assert len(examples(shared_data / name, report)) == rows


def test_the_mapping_of_a_real_table_fills_in_its_columns(shared_data: Path) -> None:
    path = shared_data / "gsm8k" / "train.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    made = examples(path, inspect(path, PAIR))[0]
    assert isinstance(made, Conversation)
    assert [turn["content"] for turn in made.turns] == [first["question"], first["answer"]]


@pytest.mark.parametrize("part", ["train", "valid"])
def test_parquet_gives_exactly_the_rows_of_json_lines(shared_data: Path, part: str) -> None:
    one, two = (shared_data / "multiturn_chat" / f"{part}.{kind}" for kind in ("jsonl", "parquet"))
    reports = inspect(one), inspect(two)
    assert examples(one, reports[0]) == examples(two, reports[1])
    assert reports[0].columns == reports[1].columns
    assert [(found["code"], found["count"]) for found in reports[0].warnings] == [
        (found["code"], found["count"]) for found in reports[1].warnings
    ]


def test_calls_and_results_of_a_real_tool_set_are_read(shared_data: Path) -> None:
    path = shared_data / "glaive_toolcall" / "train.jsonl"
    made = [example for example in examples(path, inspect(path)) if isinstance(example, Conversation)]
    written = path.read_text()
    turns = [turn for example in made for turn in example.turns]
    assert sum("tool_calls" in turn for turn in turns) == written.count('"function_call"')
    assert sum(turn["role"] == "tool" for turn in turns) == written.count('"observation"')
    assert all(example.tools for example in made if any(turn["role"] == "tool" for turn in example.turns))


def test_training_rows_that_are_in_the_validation_file_are_found(shared_data: Path) -> None:
    folder = shared_data / "openai_chat_toy"
    data = (folder / "train.jsonl").read_bytes()
    how = Reading("jsonl", False, "messages", None)
    other = validate.findings_of(io.BytesIO(data), how)
    report = validate.inspect(io.BytesIO(data), other=other)
    assert {found["code"]: found["count"] for found in report.warnings}["in_both_files"] == 5
