"""What an upload would say, and the repair: POST /datasets/validate keeps nothing."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import ROWS, Api, only_sqlite, refused

pytestmark = only_sqlite

FROM_VALUE = [
    {"messages": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": f"the answer {n}"}]}
    for n in range(3)
]


def validated(
    api: Api, content: bytes | list[dict[str, Any]], filename: str = "rows.jsonl", **form: str
) -> Any:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    return api.client.post("/datasets/validate", files={"file": (filename, content)}, data=form)


def test_a_right_file_is_valid_and_not_kept(api: Api) -> None:
    content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    answer = validated(api, content)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["object"], found["valid"]) == ("dataset_validation", True)
    assert (found["filename"], found["format"], found["rows"]) == ("rows.jsonl", "prompt_completion", 5)
    assert (found["bytes"], found["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert found["columns"] == ["prompt", "completion"]
    assert (found["errors"], found["error_count"], found["repair"], found["mapping"]) == ([], 0, None, None)
    assert found["report"] == api.upload(content).json()["report"]
    assert len(api.client.get("/datasets").json()["data"]) == len(api.stored()) == 1


def test_every_error_is_listed_with_its_line_and_the_answer_is_still_200(api: Api) -> None:
    content = b'{"prompt": "a", "completion": "b c"}\n\n{"prompt": "a"}\n{"prompt": \n'
    answer = validated(api, content)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["valid"], found["error_count"], found["rows"]) == (False, 2, 3)
    assert [(e["line"], e["row"], e["field"], e["code"]) for e in found["errors"]] == [
        (3, 2, "completion", "missing_field"),
        (4, 3, "", "invalid_json"),
    ]
    assert api.stored() == []


def test_a_file_that_is_none_is_answered_with_200_too(api: Api) -> None:
    found = validated(api, b"%PDF-1.7").json()
    assert (found["valid"], found["rows"], found["format"], found["report"]) == (False, 0, None, {})
    (error,) = found["errors"]
    assert (error["line"], error["row"], error["field"], error["code"]) == (
        None,
        None,
        "file",
        "unsupported_file",
    )


def test_the_mapping_that_is_suggested_is_taken(api: Api) -> None:
    rows = [{"question": f"which {n}?", "answer": f"number {n} it is"} for n in range(3)]
    found = validated(api, rows).json()
    assert (found["valid"], found["errors"][0]["code"]) == (False, "unknown_format")
    assert found["columns"] == ["question", "answer"]
    mapping = json.dumps(found["mapping"])
    assert validated(api, rows, mapping=mapping).json()["valid"]
    assert api.upload(rows, mapping=mapping).json()["format"] == "mapping"


def test_broken_rows_are_repaired_as_they_were_meant(api: Api) -> None:
    content = (
        b"{'prompt': 'a', 'completion': 'it\\'s b'}\n"
        b'{"prompt": "c", "completion": "and d",}\n'
        b'{\n "prompt": "e",\n "completion": "and f"\n}\n'
        b'{"prompt": "g", "completion": "and h"}\n'
        b'{"prompt": nothing of this can be read}\n'
    )
    repair = validated(api, content).json()["repair"]
    assert (repair["rows"], repair["changed"], repair["left_out"]) == (4, 3, 1)
    assert '+{"prompt": "a", "completion": "it\'s b"}' in repair["diff"]
    answer = validated(api, content, "my rows.jsonl", repaired="true")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''my%20rows.repaired.jsonl"
    assert [json.loads(line) for line in answer.text.splitlines()] == [
        {"prompt": "a", "completion": "it's b"},
        {"prompt": "c", "completion": "and d"},
        {"prompt": "e", "completion": "and f"},
        {"prompt": "g", "completion": "and h"},
    ]
    assert api.upload(answer.content).json()["rows"] == 4


def test_an_object_over_several_lines_is_joined(api: Api) -> None:
    answer = validated(api, json.dumps(ROWS[0], indent=2).encode(), repaired="true")
    assert (answer.status_code, answer.text) == (200, json.dumps(ROWS[0]) + "\n")


def test_messages_written_as_sharegpt_are_repaired(api: Api) -> None:
    found = validated(api, FROM_VALUE).json()
    assert (found["valid"], found["errors"][0]["code"]) == (False, "unknown_role")
    assert "mapping=" in found["errors"][0]["hint"]
    repaired = validated(api, FROM_VALUE, repaired="true")
    assert json.loads(repaired.text.splitlines()[0]) == {
        "messages": [
            {"role": "user", "content": "question 0"},
            {"role": "assistant", "content": "the answer 0"},
        ]
    }
    assert api.upload(repaired.content).json()["format"] == "messages"


def test_what_needs_no_repair_or_has_none_is_said(api: Api) -> None:
    error = refused(validated(api, ROWS, repaired="true"), 422, "not_repairable")
    assert error["message"] == "The file is right as it is."
    error = refused(validated(api, b"GIF89a", repaired="true"), 422, "not_repairable")
    assert error["message"] == "No row of the file can be repaired."


def test_rows_that_another_set_has_too_are_a_warning(api: Api) -> None:
    training = api.upload(ROWS).json()["id"]
    rows = [{"prompt": "another", "completion": "row it is"}, ROWS[1], ROWS[3]]
    for answer in (validated(api, rows, compare_with=training), api.upload(rows, compare_with=training)):
        (warning,) = answer.json()["report"]["warnings"]
        assert (warning["code"], warning["count"], warning["lines"]) == ("in_both_files", 2, [2, 3])


def test_a_set_of_another_project_is_not_compared_with(api: Api) -> None:
    training = api.upload(ROWS).json()["id"]
    for path in ("/datasets", "/datasets/validate"):
        files, data = {"file": ("rows.jsonl", b'{"text": "a b"}')}, {"compare_with": training}
        error = refused(api.stranger.post(path, files=files, data=data), 404, "dataset_not_found")
        assert error["param"] == "compare_with"
    assert api.stored() == [f"datasets/{training}/data"]


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        ({"mapping": "{"}, "invalid_mapping", "mapping"),
        ({"mapping": "[1]"}, "invalid_mapping", "mapping"),
        ({"mapping": "[" * 5000}, "invalid_mapping", "mapping"),
        ({"format": "parquet"}, "invalid_format", "format"),
        ({"repaird": "true"}, "invalid_request", "repaird"),
        ({"repaired": "perhaps"}, "invalid_request", "repaired"),
    ],
)
def test_a_wrong_request_is_no_wrong_file(api: Api, form: dict[str, str], code: str, param: str) -> None:
    error = refused(validated(api, ROWS, **form), 422, code)
    assert error["param"] == param
    assert "request body" not in error["message"]


def test_nobody_validates_without_a_key(api: Api) -> None:
    answer = api.nobody.post("/datasets/validate", files={"file": ("rows.jsonl", b"{}")})
    refused(answer, 401)


def test_a_large_file_is_repaired_in_the_memory_of_a_small_one(make_api: Callable[..., Api]) -> None:
    api = make_api()
    row = b"{'prompt': 'a', 'completion': '" + b"x" * 100_000 + b"'}\n"
    with api.client.stream(
        "POST",
        "/datasets/validate",
        files={"file": ("rows.jsonl", row * 50)},
        data={"repaired": "true"},
    ) as answer:
        assert answer.status_code == 200
        assert "content-length" not in answer.headers
        assert sum(map(len, answer.iter_bytes())) == len(row) * 50


def test_a_disk_that_fills_up_during_a_repair_is_said(make_api: Callable[..., Api], small_disk: Path) -> None:
    api = make_api()
    uploads = api.services.settings.uploads
    shutil.rmtree(uploads, ignore_errors=True)
    uploads.symlink_to(small_disk, target_is_directory=True)
    content = b"{'prompt': 'a', 'completion': '" + b"x" * 100_000 + b"'}\n"
    assert validated(api, content).json()["repair"]["rows"] == 1
    refused(validated(api, content * 7), 507, "storage_full")
    assert list(small_disk.iterdir()) == []
