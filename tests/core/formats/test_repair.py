"""What is proposed for a file with errors: a mapping, or its rows as they should have been written."""

import gzip
import io
import json
import time
from typing import Any

import pytest

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
    ("line", "row"),
    [
        (b'{"prompt": "a", "completion": "b",}', {"prompt": "a", "completion": "b"}),
        (b'{"prompt": "a,}", "completion": "b, ]",},', {"prompt": "a,}", "completion": "b, ]"}),
        (b'{"prompt": "a\\u0000\\\\u0000", "completion": "b"}', {"prompt": "a\\u0000", "completion": "b"}),
        (b"{'prompt': 'a', 'completion': \"it's\"}", {"prompt": "a", "completion": "it's"}),
        (b"{'prompt': 'a', 'completion': True, 5: None}", {"prompt": "a", "completion": True, "5": None}),
        (b'{"Prompt": "a", "completon": "b"}', {"prompt": "a", "completion": "b"}),
        (b'{"prompt": "caf\xe9", "completion": "b"}', {"prompt": "café", "completion": "b"}),
        (b'{"prompt": "a",\n  "completion": "b"\n}', {"prompt": "a", "completion": "b"}),
        (b'{"prompt": "a", "Completion": 1.10}', {"prompt": "a", "completion": 1.1}),
    ],
)
def test_a_broken_row_is_mended(line: bytes, row: dict[str, Any]) -> None:
    found, rows = examine(GOOD + b"\n" + line + b"\n" + GOOD)
    assert rows == [json.loads(GOOD), row, json.loads(GOOD)]
    assert found.repair is not None
    assert (found.repair.changed, found.repair.left_out) == (1, 0)
    assert found.repair.diff.startswith("@@ line 2 @@\n-")
    assert f"+{json.dumps(row, ensure_ascii=False)}".replace("1.1}", "1.10}") in found.repair.diff


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


def sorted_items(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(message.items())


def test_a_pretty_printed_object_is_one_row() -> None:
    pretty = json.dumps({"messages": [USER, ASSISTANT]}, indent=2)
    inner = (
        '{"messages": [\n  {"role": "user", "content": "Hi"},\n  {"role": "assistant", "content": "{"}\n]}'
    )
    found, rows = examine(f"{pretty}\n\n{inner}\n".encode())
    assert rows == [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": "{"}]},
    ]
    assert found.repair is not None
    assert "@@ line 1 @@" in found.repair.diff
    assert "@@ line 14 @@" in found.repair.diff


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a", "completion":',
        b'{"prompt": "a"}',
        b"nonsense",
        b'{"prompt": "\\ud83d", "completion": "b"}',
        b"{'prompt': '\\ud83d', 'completion': 'b'}",
        b"{'prompt': {1, 2}, 'completion': 'b'}",
        b"{'prompt': 1e999, 'completion': 'b'}",
        b"\x81\x8d\x8f",
        b'{"prompt": "' + b"x" * 3000 + b'", "completion": "b"}',
        b'{"prompt": "a", "prompt": "b", "completion": "c"}',
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_cannot_be_mended_is_left_out_and_shown(line: bytes) -> None:
    found, rows = examine(GOOD + b"\n" + line + b"\n" + GOOD, limits=Limits(line_bytes=2000))
    assert rows == [json.loads(GOOD)] * 2
    assert found.repair is not None
    assert found.repair.left_out == 1
    assert "@@ line 2 @@" in found.repair.diff
    assert len(found.repair.diff) < 3000


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


@pytest.mark.parametrize("data", [b"{\n" + b"1\n" * 200_000, b'{"a":\n' * 50_000, b"{" * 500_000 + b"\n"])
def test_lines_that_never_end_an_object_take_linear_time(data: bytes) -> None:
    began = time.process_time()
    found, _ = examine(data)
    assert found.repair is None
    assert time.process_time() - began < 20
