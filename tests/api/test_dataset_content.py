"""The file of a data set as it was uploaded, whole or in part."""

import hashlib
import json

import pytest

from tests.api.conftest import ROWS, Api, only_sqlite, refused

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
