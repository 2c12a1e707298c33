"""What is proposed for a file with errors: a mapping, or its rows as they should have been written."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import data as commands
from core.errors import BadRequest
from core.ml.formats import repair, validate
from core.ml.formats.files.rows import Limits
from core.ml.formats.repair import Examination
from tests.core.formats.given import ASSISTANT, GOOD, USER, jsonl


def examine(data: bytes, **options: Any) -> tuple[Examination, list[Any]]:
    """What is said of a file, and the rows of the repaired one."""
    target = io.BytesIO()
    given = {"kind": "auto", "mapping": None, "filename": "", "limits": Limits()}
    found = repair.examine(io.BytesIO(data), target, **given | options)
    rows = [json.loads(line) for line in target.getvalue().splitlines()]
    if found.repair is not None:
        assert found.repair.rows == len(rows)
        file = io.BytesIO(target.getvalue())
        assert (
            validate.inspect(file, kind=options.get("kind", "auto"), mapping=found.mapping).error_count == 0
        )
    return found, rows


def test_a_good_file_needs_no_repair() -> None:
    found, rows = examine(GOOD)
    assert (found.valid, found.repair, found.error_count, rows) == (True, None, 0, [])
    assert found.report is not None


def test_a_table_gets_a_mapping() -> None:
    found, _ = examine(b"question,answer\nHi,Hello\nWho?,Me\n")
    assert not found.valid
    assert found.errors[0]["code"] == "unknown_format"
    assert found.mapping == {
        "messages": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    }
    assert found.columns == ["question", "answer"]
    assert found.repair is None


def test_a_table_with_a_broken_row_gets_a_mapping_and_keeps_its_columns() -> None:
    data = jsonl({"question": "a", "context": "c", "answer": "d"}, '{"question": "a", "answer": }')
    found, rows = examine(data)
    assert found.mapping is not None
    assert rows == [{"question": "a", "context": "c", "answer": "d"}]
    assert found.repair is not None
    assert (found.repair.changed, found.repair.left_out) == (0, 1)


@pytest.mark.parametrize(
    ("messages", "mended"),
    [
        ([USER, {"role": "assitant", "content": "Hello there"}], [USER, ASSISTANT]),
        ([USER, {"role": "GPT", "content": "Hello there"}], [USER, ASSISTANT]),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}], [USER, ASSISTANT]),
        ([USER, {"role": "assistant", "contnt": "Hello there"}], [USER, ASSISTANT]),
        ([USER, {"role": "assistant", "content": 5}], [USER, {"role": "assistant", "content": "5"}]),
    ],
)
def test_messages_are_mended(messages: list[Any], mended: list[Any]) -> None:
    found, rows = examine(jsonl({"messages": messages}))
    assert [list(map(sorted_items, row["messages"])) for row in rows] == [list(map(sorted_items, mended))]
    assert found.repair is not None


@pytest.mark.parametrize(
    "role", ["moderator", "operator", "observer", "summary", "student", "functions", "customer"]
)
def test_a_role_that_is_no_misspelt_one_is_not_guessed(role: str) -> None:
    good = {"messages": [USER, ASSISTANT]}
    found, rows = examine(jsonl(good, {"messages": [USER, ASSISTANT, {"role": role, "content": "x"}]}))
    assert rows == [good]
    assert found.repair is not None
    assert found.repair.left_out == 1


MISSPELT = {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello there"}]}


@pytest.mark.parametrize(
    ("good", "broken", "mended"),
    [
        (
            {"messages": [USER, ASSISTANT], "conversation_id": "c", "tool": "x"},
            MISSPELT | {"conversation_id": "c"},
            {"messages": [USER, ASSISTANT], "conversation_id": "c"},
        ),
        (
            {"messages": [USER, ASSISTANT], "prompt_id": "1", "completion_id": "2"},
            MISSPELT | {"prompt_id": "1", "completion_id": "2"},
            {"messages": [USER, ASSISTANT], "prompt_id": "1", "completion_id": "2"},
        ),
        (
            {"prompt": "a", "completion": "b", "systems": "linux"},
            {"promt": "a", "completion": "b", "systems": "linux"},
            {"prompt": "a", "completion": "b", "systems": "linux"},
        ),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            {"Instruction": "a", "Input": "b", "Output": "c"},
            {"instruction": "a", "input": "b", "output": "c"},
        ),
    ],
)
def test_columns_are_renamed_to_what_a_row_lacks_and_no_good_row_is_touched(
    good: dict[str, Any], broken: dict[str, Any], mended: dict[str, Any]
) -> None:
    found, rows = examine(jsonl(good, broken, good))
    assert rows == [good, mended, good]
    assert found.repair is not None
    assert (found.repair.changed, found.repair.left_out) == (1, 0)


def test_an_id_is_no_misspelt_text() -> None:
    good = {"prompt": "a", "completion": "b"}
    _, rows = examine(jsonl(good, {"prompt_id": "1", "completion": "c"}))
    assert rows == [good]


def test_the_repair_is_of_the_format_that_the_report_names() -> None:
    odd = [{"question": "x"}, {"txt": "odd"}]
    good = [{"messages": [USER, {"role": "assistant", "content": f"number {n}"}]} for n in range(5)]
    found, rows = examine(jsonl(*odd, *good, MISSPELT))
    assert found.report is not None
    assert found.report.detection is not None
    assert found.report.detection.format == "messages"
    assert rows == [*good, {"messages": [USER, ASSISTANT]}]
    assert found.repair is not None
    assert found.repair.left_out == 2


def test_rows_that_all_have_misspelt_columns_are_repaired() -> None:
    row = b'{"Instructions": "a", "Output": "b",}\n'
    _, rows = examine(row * 3)
    assert rows == [{"instruction": "a", "output": "b"}] * 3


def test_a_row_that_is_left_out_of_a_table_is_shown_by_its_fault() -> None:
    found, _ = examine(b"prompt,completion\na,b\nc\n")
    assert found.repair is not None
    assert found.repair.diff == "@@ line 3 @@\n-(The row has 1 fields, the header 2.)\n"


@pytest.mark.parametrize("good", [[], [json.dumps([USER, ASSISTANT])]])
def test_a_list_that_pandas_wrote_into_a_table_as_python_prints_it_is_read(good: list[str]) -> None:
    odd = [
        {"role": "user", "content": 'it\'s\n "Hi", True'},
        {"role": "gpt", "content": "Hello", "name": None},
    ]
    file = io.StringIO()
    csv.writer(file).writerows([["messages"], [odd], [str([USER, ASSISTANT])], *([cell] for cell in good)])
    found, rows = examine(file.getvalue().encode())
    first = [odd[0], {"role": "assistant", "content": "Hello", "name": None}]
    assert [sorted_items(item) for item in rows[0]["messages"]] == [sorted_items(item) for item in first]
    assert rows[1:] == [{"messages": [USER, ASSISTANT]}, *({"messages": cell} for cell in good)]
    assert found.repair is not None
    assert (found.repair.changed, found.repair.left_out) == (2, 0)


def test_what_is_wrong_with_a_mapping_is_not_hidden_by_another_one() -> None:
    table = b"question,answer\nHi,Hello\n"
    for options in (
        {"kind": "alpaca", "mapping": {"text": "{question}"}},
        {"mapping": {"prompt": "{question}", "completion": "{anwser}"}},
    ):
        found, _ = examine(table, **options)
        assert [error["code"] for error in found.errors] == ["invalid_mapping"]
        assert found.mapping is None
    proposed, _ = examine(table, kind="mapping")
    assert proposed.mapping is not None


def test_the_command_does_not_overwrite_a_file_with_the_repaired_one(tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(GOOD)
    out.write_text("something dear")
    done = CliRunner().invoke(commands.app, ["check", str(file), "--repair", str(out), "--key", "none"])
    assert done.exit_code != 0
    assert "is there already" in done.output
    assert out.read_text() == "something dear"


def sorted_items(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(message.items())


def test_a_file_of_nothing_but_nonsense_has_no_repair() -> None:
    found, rows = examine(b"{nonsense}\n" * 3)
    assert (found.repair, found.error_count, rows) == (None, 3, [])
    zipped, _ = examine(b"PK\x03\x04" + b"\0" * 50)
    assert (zipped.report, zipped.repair, zipped.errors[0]["code"]) == (None, None, "unsupported_file")
    table, _ = examine(b"[1, 2]", kind="mapping")
    assert table.repair is None


def test_packed_files_arrays_and_tables_are_repaired_too() -> None:
    for data in (
        gzip.compress(GOOD + b"\n{}\n"),
        b"[" + GOOD + b", {}]",
        b"prompt,completion\na,b\nc\n",
    ):
        found, rows = examine(data)
        assert rows == [json.loads(GOOD)]
        assert found.repair is not None
        assert found.repair.left_out == 1


@pytest.mark.parametrize(
    "data",
    [
        b"[" + GOOD + b", {]",
        b"[" + GOOD + b" " + GOOD + b", " + GOOD + b"]",
        b"prompt,completion\na,b\nc,\0\nd,e\n",
        b'prompt,completion\na,b\nc,"d" e\nf,g\n',
        b"prompt,completion\na,b\nc,\xff\nd,e\n",
    ],
)
def test_where_the_rest_of_a_file_has_no_borders_no_repair_leaves_it_out(data: bytes) -> None:
    found, _ = examine(data)
    assert not found.valid
    assert found.repair is None


def test_what_must_be_chosen_is_not_suggested() -> None:
    layouts = jsonl({"text": "<s>[INST] a [/INST] b </s>"}, {"text": "no layout"})
    formats = jsonl({"prompt": "a", "completion": "b", "messages": [USER, ASSISTANT]})
    for data in (layouts, formats):
        found, _ = examine(data)
        assert [error["code"] for error in found.errors] == ["ambiguous_format"]
        assert (found.mapping, found.repair) == (None, None)


def test_a_file_that_breaks_off_after_its_first_rows_has_no_repair() -> None:
    rows = b"".join(b'{"question": "%d", "answer": "b"}\n' % (i * 7919**3) for i in range(60_000))
    found, _ = examine(gzip.compress(rows)[:-100])
    assert found.repair is None
    assert found.errors[0]["code"] in ("unknown_format", "damaged_file")


def test_an_unknown_format_is_no_finding() -> None:
    with pytest.raises(BadRequest) as caught:
        examine(GOOD, kind="zzz")
    assert caught.value.code == "invalid_format"
