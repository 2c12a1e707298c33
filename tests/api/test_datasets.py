"""Data sets over HTTP: kept whole or not at all."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.ml import prompts
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
    assert made["report"]["duplicates"] == made["report"]["warning_count"] == 1
    assert set(made["report"]) == {"warnings", "warning_count", "duplicates", "length"}
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
        (b"[{}]", {}, "unsupported_file"),
        (b"q,a\n1,2\n", {}, "unknown_format"),
        (b"prompt,completion\n1,2\n", {"format": "parquet"}, "unknown_format"),
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
    assert page(after="zzz") == (made, False)


# ---- Content

CONTENT = b"".join(json.dumps(row).encode() + b"\r\n" for row in ROWS)
SIZE = len(CONTENT)


@pytest.fixture
def content_path(api: Api) -> str:
    return f"/datasets/{api.upload(CONTENT).json()['id']}/content"


def test_content_is_the_file_as_it_came(api: Api, content_path: str) -> None:
    answer = api.client.get(content_path)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["etag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.headers["x-content-type-options"] == "nosniff"
    head = api.client.head(content_path)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == SIZE
    assert head.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=10-", 10, SIZE),
        ("bytes=-5", SIZE - 5, SIZE),
        ("bytes=5-5", 5, 6),
        (f"bytes=0-{SIZE * 9}", 0, SIZE),
        (f"bytes=-{SIZE * 9}", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    ],
)
@only_sqlite
def test_a_range_is_that_part(api: Api, content_path: str, wanted: str, start: int, end: int) -> None:
    answer = api.client.get(content_path, headers={"range": wanted})
    assert (answer.status_code, answer.content) == (206, CONTENT[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert int(answer.headers["content-length"]) == end - start


@pytest.mark.parametrize(
    "wanted", ["bytes=9-5", "bytes=a-b", "bytes=-", "lines=1-2", "bytes=0-1,4-5", "bytes=1", ""]
)
@only_sqlite
def test_a_range_that_is_none_is_ignored(api: Api, content_path: str, wanted: str) -> None:
    answer = api.client.get(content_path, headers={"range": wanted})
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize(
    "wanted", [f"bytes={SIZE}-", f"bytes={SIZE * 2}-{SIZE * 3}", "bytes=-0", "bytes=" + "9" * 5000 + "-"]
)
@only_sqlite
def test_a_range_beyond_the_file_is_refused(api: Api, content_path: str, wanted: str) -> None:
    answer = api.client.get(content_path, headers={"range": wanted})
    refused(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


@only_sqlite
def test_what_the_client_has_already_is_not_sent_again(api: Api, content_path: str) -> None:
    etag = api.client.get(content_path).headers["etag"]
    for known in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        answer = api.client.get(content_path, headers={"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b""), known
        assert answer.headers["etag"] == etag
    assert api.client.get(content_path, headers={"if-none-match": '"other"'}).status_code == 200


@only_sqlite
def test_a_range_of_a_file_that_has_changed_is_the_whole(api: Api, content_path: str) -> None:
    etag = api.client.get(content_path).headers["etag"]
    same = api.client.get(content_path, headers={"range": "bytes=0-3", "if-range": etag})
    other = api.client.get(content_path, headers={"range": "bytes=0-3", "if-range": '"other"'})
    assert (same.status_code, same.content) == (206, CONTENT[:4])
    assert (other.status_code, other.content) == (200, CONTENT)


def test_a_file_that_is_gone_from_the_storage_is_said(api: Api, content_path: str) -> None:
    api.storage.delete("datasets")
    refused(api.client.get(content_path), 404, "file_missing")
    refused(api.client.get(content_path.replace("content", "preview")), 404, "file_missing")


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


# ---- Preview


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_a_preview_is_what_would_be_trained(api: Api, tiny_model: Path, loss_on: Any) -> None:
    answer = api.client.get(f"/datasets/{api.dataset_id()}/preview", params={"n": 2, "loss_on": loss_on})
    assert answer.status_code == 200
    preview = answer.json()
    contract = prompts.load(tiny_model)
    assert len(preview["rows"]) == 2
    for row, source in zip(preview["rows"], ROWS, strict=False):
        conversation = [
            {"role": "user", "content": source["prompt"]},
            {"role": "assistant", "content": source["completion"]},
        ]
        encoded = prompts.encode(contract, conversation, loss_on=loss_on)
        assert [token["id"] for token in row["tokens"]] == encoded.ids
        assert [token["trained"] for token in row["tokens"]] == encoded.trained
        assert row["text"] == prompts.text_of(contract, encoded.ids)
        assert "".join(token["text"] for token in row["tokens"]) == row["text"]
        assert (row["n_tokens"], row["n_trained"]) == (len(encoded.ids), sum(encoded.trained))
    assert preview["totals"] == {
        "rows": 2,
        "tokens": sum(row["n_tokens"] for row in preview["rows"]),
        "trained": sum(row["n_trained"] for row in preview["rows"]),
    }
    assert preview["template_sha256"] == contract.template_sha256
    assert preview["stop_token_ids"] == list(contract.stop_token_ids)


def test_a_preview_marks_rows_that_are_too_long(api: Api) -> None:
    content = [{"prompt": "a", "completion": "b"}, {"prompt": "x" * 300, "completion": "b"}]
    dataset_id = api.upload(content).json()["id"]
    preview = api.client.get(f"/datasets/{dataset_id}/preview", params={"max_length": 64}).json()
    assert [row["too_long"] for row in preview["rows"]] == [False, True]


@only_sqlite
def test_a_preview_that_cannot_be_made_says_why(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api(models={"tests/absent": str(tmp_path / "absent")}, default_model="tests/absent")
    path = f"/datasets/{api.dataset_id()}/preview"
    answer = api.client.get(path)
    refused(answer, 503, "model_not_ready")
    assert "retry-after" in answer.headers
    error = refused(api.client.get(path, params={"model": "tests/absnt"}), 404, "model_not_found")
    assert 'did you mean "tests/absent"' in error["message"]
    for wrong in ({"n": 0}, {"n": 101}, {"loss_on": "x"}, {"max_length": 7}):
        refused(api.client.get(path, params=wrong), 422, "invalid_request")


@pytest.mark.parametrize(
    "model", ["../../etc", "/etc", "a/../../etc", "tests/tiny/..", "..", "//", "\\..", "a/b"]
)
def test_a_models_name_is_never_a_path(shared_api: Api, model: str) -> None:
    if not (found := shared_api.client.get("/datasets").json()["data"]):
        found = [{"id": shared_api.dataset_id()}]
    path = f"/datasets/{found[0]['id']}/preview"
    refused(shared_api.client.get(path, params={"model": model}), 404, "model_not_found")
    refused(shared_api.client.post("/jobs", json={"dataset_id": "x", "model": model}), 404, "model_not_found")
    refused(shared_api.client.post("/generate", json={"prompt": "x", "model": model}), 404, "model_not_found")


# ---- A full disk


@only_sqlite
def test_a_full_disk_is_said_and_nothing_is_kept(make_api: Callable[..., Api], small_disk: Path) -> None:
    api = make_api(storage_url=str(small_disk))
    answer = api.upload([{"prompt": "x" * 1_500_000, "completion": "y"}])
    refused(answer, 507, "storage_full")
    assert api.stored() == []
    assert api.upload().status_code == 201
