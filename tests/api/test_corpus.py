"""Malformed, hostile and unusual files, each with the answer it must get (`tests/corpus`)."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Api, building, refused
from tests.conftest import fresh_database
from tests.corpus import chats, files, lines, tables
from tests.corpus.case import COLUMNS, DEPTH, LINE_BYTES, ROWS, UNPACKED_BYTES, Bad, Case, Good

CASES = files.CASES + lines.CASES + chats.CASES + tables.CASES
# No answer about a file is a copy of the file.
ANSWER_BYTES = 100_000


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One API for all files, with the limits that the corpus is made for."""
    folder = tmp_path_factory.mktemp("corpus")
    url = fresh_database(request, "sqlite", folder)
    with building(url, folder, request.getfixturevalue("tiny_model"), 9) as build:
        yield build(
            line_max_bytes=LINE_BYTES,
            unpacked_max_bytes=UNPACKED_BYTES,
            rows_max=ROWS,
            columns_max=COLUMNS,
            nesting_max=DEPTH,
        )


@pytest.fixture
def api(shared: Api) -> Api:
    """The same with nothing in it, whatever the file before left behind."""
    for row in shared.client.get("/datasets").json()["data"]:
        shared.client.delete(f"/datasets/{row['id']}")
    return shared


def test_no_two_files_of_the_corpus_have_one_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 70


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_gets_the_answer_it_must(api: Api, case: Case) -> None:
    content = case.content()
    answer = api.upload(content, case.filename, **case.form)
    if isinstance(case.expected, Good):
        assert answer.status_code == 201, answer.text[:1000]
        _check_kept(api, answer.json(), content, case.expected)
    else:
        _check_refused(refused(answer, case.expected.status), case.expected)
        assert len(answer.content) < ANSWER_BYTES
    assert api.stored() == []
    assert api.client.get("/datasets").json()["data"] == []
    _check_validation(api, content, case)
    assert api.stored() == []
    assert list(Path(api.services.settings.uploads).iterdir()) == []


def _check_kept(api: Api, made: dict[str, Any], content: bytes, expected: Good) -> None:
    assert (made["rows"], made["format"]) == (expected.rows, expected.format)
    assert {warning["code"] for warning in made["report"]["warnings"]} == expected.warnings
    assert len(json.dumps(made)) < ANSWER_BYTES
    path = f"/datasets/{made['id']}"
    assert api.client.get(f"{path}/content").content == content
    preview = api.client.get(f"{path}/preview", params={"n": 100})
    assert preview.status_code == 200, preview.text[:1000]
    rows = preview.json()["rows"]
    assert rows
    assert all(row["n_trained"] and row["ends_trained"] for row in rows)
    assert [row["line"] for row in rows] == sorted(row["line"] for row in rows)
    conversations = api.client.get(f"{path}/conversations")
    assert (conversations.status_code, conversations.content.count(b"\n")) == (200, expected.rows)
    assert api.client.delete(path).status_code == 200


def _check_refused(error: dict[str, Any], expected: Bad) -> None:
    if expected.line is None:
        assert error["code"] == expected.code, error["message"]
        _check_word(error, expected)
        return
    assert error["code"] == "invalid_dataset", error
    assert error["message"].startswith(f"Line {expected.line}: ")
    assert error["error_count"] == expected.count, error["errors"]
    _check_first(error["errors"], expected)


def _check_first(errors: list[dict[str, Any]], expected: Bad) -> None:
    assert len(errors) == min(expected.count, 50)
    assert (errors[0]["code"], errors[0]["line"]) == (expected.code, expected.line), errors[0]
    assert set(errors[0]) == {"line", "row", "field", "code", "message", "hint"}
    _check_word(errors[0], expected)


def _check_word(error: dict[str, Any], expected: Bad) -> None:
    said = f"{error['message']} {error['hint']}"
    words = expected.word.split("|")
    assert any(word in said for word in words), said[:1000]
    assert not re.search(r"Traceback|<class|object at 0x|NoneType", said), said[:1000]


def _check_validation(api: Api, content: bytes, case: Case) -> None:
    found = _validated(api, content, case.filename, case.form)
    assert found["valid"] == isinstance(case.expected, Good)
    assert found["bytes"] == len(content)
    assert len(json.dumps(found)) < ANSWER_BYTES
    if isinstance(case.expected, Good):
        assert (found["rows"], found["format"]) == (case.expected.rows, case.expected.format)
        assert {warning["code"] for warning in found["report"]["warnings"]} == case.expected.warnings
        assert (found["errors"], found["error_count"], found["repair"]) == ([], 0, None)
    else:
        assert found["error_count"] == case.expected.count
        _check_first(found["errors"], case.expected)
    _check_repair(api, content, case, found)


def _check_repair(api: Api, content: bytes, case: Case, found: dict[str, Any]) -> None:
    """What is offered as the repaired file is a file that is taken; a suggested mapping takes the file."""
    form = case.form | {"repaired": "true"}
    answer = api.client.post("/datasets/validate", files={"file": (case.filename, content)}, data=form)
    if found["repair"] is None:
        refused(answer, 422, "not_repairable")
        if found["mapping"] is not None and not found["valid"] and found["report"] == {}:
            again = _validated(api, content, case.filename, {"mapping": json.dumps(found["mapping"])})
            assert again["error_count"] < max(again["rows"], 1), again["errors"]
        return
    assert answer.status_code == 200, answer.text[:1000]
    form = dict(case.form) if "mapping" in case.form or found["mapping"] is None else {}
    if "mapping" not in form and found["mapping"] is not None and found["format"] in (None, "mapping"):
        form["mapping"] = json.dumps(found["mapping"])
    again = _validated(api, answer.content, "repaired.jsonl", form)
    assert again["valid"], (again["errors"], answer.content[:1000])
    assert again["rows"] == found["repair"]["rows"]


def _validated(api: Api, content: bytes, filename: str, form: dict[str, str]) -> dict[str, Any]:
    answer = api.client.post("/datasets/validate", files={"file": (filename, content)}, data=form)
    assert answer.status_code == 200, answer.text[:1000]
    body: dict[str, Any] = answer.json()
    return body
