"""Data sets over HTTP: kept whole or not at all."""

import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.api.conftest import ROWS, Api, only_sqlite, refused
from tests.control import rows

BROKEN = b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": \n{"prompt": "c", "completion": "d"}\n'


def test_an_uploaded_data_set_says_what_is_in_it(api: Api) -> None:
    content = b"\xef\xbb\xbf" + b'{"prompt": "a", "completion": "b"}\r\n\r\n' * 2
    answer = api.upload(content, name="my rows")
    assert answer.status_code == 201
    made = answer.json()
    assert made["id"].startswith("ds_")
    assert (made["object"], made["name"], made["filename"]) == ("dataset", "my rows", "rows.jsonl")
    assert made["bytes"] == len(content)
    assert made["sha256"] == hashlib.sha256(content).hexdigest()
    assert made["report"]["duplicates"] == 1
    assert {w["code"]: w["lines"] for w in made["report"]["warnings"]} == {
        "one_word_answers": [1, 3],
        "duplicates": [3],
    }
    assert set(made["report"]) == {"detection", "warnings", "warning_count", "duplicates", "length"}
    assert api.client.get(f"/datasets/{made['id']}").json() == made
    assert api.stored() == [f"datasets/{made['id']}/data"]


@pytest.mark.parametrize(
    ("content", "form", "format_", "columns"),
    [
        (b"prompt,completion\n1,2\n", {}, "prompt_completion", ["prompt", "completion"]),
        (b"instruction,input,output\na,,b\n", {}, "alpaca", ["instruction", "input", "output"]),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            {"format": "messages"},
            "messages",
            ["messages"],
        ),
        (
            b"q,a\n1,2\n",
            {
                "mapping": json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": "{q}"},
                            {"role": "assistant", "content": "{a}"},
                        ]
                    }
                )
            },
            "mapping",
            ["q", "a"],
        ),
        (b"prompt;completion\n1, 2;3\n", {}, "prompt_completion", ["prompt", "completion"]),
        (b"prompt\tcompletion\n1, 2\t3\n", {}, "prompt_completion", ["prompt", "completion"]),
        (b'[{"prompt": "a",\n"completion": "b"}]', {}, "prompt_completion", ["prompt", "completion"]),
        (
            b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
            {},
            "sharegpt",
            ["conversations"],
        ),
    ],
)
@only_sqlite
def test_every_format_can_be_uploaded(
    api: Api, content: bytes, form: dict[str, str], format_: str, columns: list[str]
) -> None:
    made = api.upload(content, **form).json()
    assert (made["format"], made["columns"], made["rows"]) == (format_, columns, 1)
    assert made["mapping"] == (json.loads(form["mapping"]) if "mapping" in form else None)


def test_a_broken_line_is_named_and_nothing_is_kept(api: Api) -> None:
    error = refused(api.upload(BROKEN), 422, "invalid_dataset")
    assert error["message"].startswith("Line 3: Not valid JSON")
    assert error["param"] == "file"
    assert error["error_count"] == 1
    assert [(problem["line"], problem["row"], problem["code"]) for problem in error["errors"]] == [
        (3, 2, "invalid_json")
    ]
    assert api.stored() == []
    assert api.client.get("/datasets").json()["data"] == []


def test_fifty_broken_lines_are_listed_and_all_are_counted(api: Api) -> None:
    error = refused(api.upload(b"{broken}\n" * 80), 422, "invalid_dataset")
    assert (len(error["errors"]), error["error_count"]) == (50, 80)


@pytest.mark.parametrize(
    ("content", "form", "code"),
    [
        (b"", {}, "empty_file"),
        (b"\n\n", {}, "empty_file"),
        (b"PK\x03\x04zip", {}, "unsupported_file"),
        (b"[]", {}, "empty_file"),
        (b"[{}]", {}, "unknown_format"),
        (b"%PDF-1.7", {}, "unsupported_file"),
        (b"q,a\n1,2\n", {}, "unknown_format"),
        (b"prompt,completion\n1,2\n", {"format": "parquet"}, "invalid_format"),
        (b"q,a\n1,2\n", {"mapping": "{"}, "invalid_mapping"),
        (b"q,a\n1,2\n", {"mapping": "[]"}, "invalid_mapping"),
        (b"q,a\n1,2\n", {"mapping": '{"messages": []}'}, "invalid_mapping"),
        (b"q,a\n1,2\n", {"mapping": '{"messages": NaN}'}, "invalid_mapping"),
        (b"q,a\n1,2\n", {"mapping": "[" * 50_000}, "invalid_mapping"),
    ],
)
@only_sqlite
def test_a_file_that_cannot_be_read_is_refused(
    api: Api, content: bytes, form: dict[str, str], code: str
) -> None:
    error = refused(api.upload(content, **form), 422, code)
    assert error["param"] in ("file", "format", "mapping")
    assert api.stored() == []


@pytest.mark.parametrize(
    ("packed", "name", "media_type"),
    [
        (False, "rows.parquet", "application/vnd.apache.parquet"),
        (True, "rows.parquet.gz", "application/gzip"),
    ],
)
@only_sqlite
def test_parquet_plain_and_packed_is_kept_as_it_came(
    api: Api, packed: bool, name: str, media_type: str
) -> None:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), buffer)
    content = gzip.compress(buffer.getvalue()) if packed else buffer.getvalue()
    made = api.upload(content, name).json()
    assert (made["format"], made["rows"], made["report"]["warnings"]) == ("prompt_completion", 5, [])
    kept = api.client.get(f"/datasets/{made['id']}/content")
    assert (kept.content, kept.headers["content-type"]) == (content, media_type)


@only_sqlite
def test_what_is_only_doubtful_is_a_warning(api: Api) -> None:
    user, answer = {"role": "user", "content": "a?"}, {"role": "assistant", "content": ""}
    made = api.upload([{"messages": [user, answer | {"content": "b c"}]}, {"messages": [user, answer, user]}])
    assert made.status_code == 201
    report = made.json()["report"]
    assert {(w["code"], w["count"], *w["lines"]) for w in report["warnings"]} >= {
        ("empty_answers", 1, 2),
        ("ends_with_user", 1, 2),
    }
    assert report["warning_count"] == sum(w["count"] for w in report["warnings"])


@only_sqlite
def test_an_upload_without_a_file_is_refused(api: Api) -> None:
    assert refused(api.client.post("/datasets", data={"name": "x"}), 422)["param"] == "file"
    assert refused(api.client.post("/datasets", json={"file": "x"}), 422)["param"] == "file"
    assert refused(api.client.post("/datasets", data={"file": "a,b"}), 422)["param"] == "file"


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("C:\\Windows\\system32\\rows.csv", "rows.csv"),
        ("..", ".."),
        ("a\u202egpj.exe", "agpj.exe"),
        ("été 東京.jsonl", "été 東京.jsonl"),
        ("x" * 500, "x" * 128),
        ("semi; filename=other", "semi; filename=other"),
        ("dir/", "data"),
    ],
)
@only_sqlite
def test_a_file_name_is_shown_and_never_a_path(api: Api, filename: str, shown: str) -> None:
    made = api.upload(ROWS, filename).json()
    assert (made["filename"], made["name"]) == (shown, shown)
    assert api.stored() == [f"datasets/{made['id']}/data"]
    header = api.client.get(f"/datasets/{made['id']}/content").headers["content-disposition"]
    assert header.startswith("attachment; filename*=UTF-8''")
    assert not set(header.partition("''")[2]) & set('/\\";\r\n ')


def test_lists_are_paged_newest_first(api: Api) -> None:
    made = [rows.dataset(api.sessions, api.project_id).id for _ in range(5)][::-1]

    def page(**query: Any) -> tuple[list[str], bool]:
        body = api.client.get("/datasets", params=query).json()
        assert body["object"] == "list"
        return [row["id"] for row in body["data"]], body["has_more"]

    assert page() == (made, False)
    assert page(limit=2) == (made[:2], True)
    assert page(limit=2, after=made[1]) == (made[2:4], True)
    assert page(limit=2, after=made[3]) == (made[4:], False)
    assert page(limit=5) == (made, False)


def test_delete_takes_row_and_file(api: Api) -> None:
    dataset_id = api.dataset_id()
    assert api.client.delete(f"/datasets/{dataset_id}").json() == {"id": dataset_id, "deleted": True}
    assert api.stored() == []
    refused(api.client.get(f"/datasets/{dataset_id}"), 404, "dataset_not_found")
    refused(api.client.delete(f"/datasets/{dataset_id}"), 404, "dataset_not_found")


def test_a_data_set_in_use_stays(api: Api) -> None:
    dataset_id = api.dataset_id()
    job_id = api.client.post("/jobs", json={"dataset_id": dataset_id}).json()["id"]
    answer = api.client.delete(f"/datasets/{dataset_id}")
    assert job_id in refused(answer, 409, "dataset_in_use")["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert api.client.get(f"/datasets/{dataset_id}/content").status_code == 200
    api.client.post(f"/jobs/{job_id}/cancel")
    assert api.client.delete(f"/datasets/{dataset_id}").status_code == 200


# ---- A full disk


@only_sqlite
def test_a_full_disk_is_said_and_nothing_is_kept(make_api: Callable[..., Api], small_disk: Path) -> None:
    api = make_api(storage_url=str(small_disk))
    answer = api.upload([{"prompt": "x" * 1_500_000, "completion": "y"}])
    refused(answer, 507, "storage_full")
    assert api.stored() == []
    assert api.upload().status_code == 201
