"""One error body everywhere; nothing a client sends makes the service fail or comes back to it."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.api.conftest import Api, only_sqlite, refused
from tests.control import rows

JSON = {"content-type": "application/json"}
SECRET = "do-not-repeat-me"


@only_sqlite
def test_unknown_paths_and_methods_have_the_same_body(api: Api) -> None:
    refused(api.client.get("/nothing/here"), 404, "not_found")
    refused(api.nobody.get("/nothing/here"), 404, "not_found")
    answer = api.client.put("/jobs")
    refused(answer, 405, "method_not_allowed")
    assert {method.strip() for method in answer.headers["allow"].split(",")} <= {"GET", "POST"}
    assert answer.headers["allow"]
    refused(api.client.get("/datasets/ds_none"), 404, "dataset_not_found")


@only_sqlite
def test_a_request_id_is_kept_if_it_is_one(api: Api) -> None:
    assert api.client.get("/jobs", headers={"x-request-id": "mine-1.a"}).headers["x-request-id"] == "mine-1.a"
    for wrong in ("a b", "x" * 65, "<script>", ""):
        given = api.client.get("/jobs", headers={"x-request-id": wrong}).headers["x-request-id"]
        assert given.startswith("req_")


@only_sqlite
def test_an_unexpected_error_has_the_same_body_and_no_details(
    make_api: Callable[..., Api], tmp_path: Any
) -> None:
    place = tmp_path / "a file where the storage should be"
    place.write_text("")
    api = make_api(storage_url=str(place))
    answer = api.upload()
    error = refused(answer, 500, "internal_error")
    assert str(place) not in answer.text
    assert error["request_id"] is not None


def test_every_route_has_a_name_of_its_own_in_the_description(shared_api: Api) -> None:
    paths = shared_api.client.get("/openapi.json").json()["paths"]
    names = [route["operationId"] for methods in paths.values() for route in methods.values()]
    assert sorted(names) == sorted(set(names))


# ---- Bodies

POSTS = ["/jobs", "/generate", "/keys", "/projects"]
HOSTILE = {
    "nan": b'{"name": "do-not-repeat-me", "x": NaN}',
    "infinity": b'{"name": "do-not-repeat-me", "x": -Infinity}',
    "too large": b'{"name": "do-not-repeat-me", "x": 1e999}',
    "long number": b'{"name": "do-not-repeat-me", "x": ' + b"7" * 5000 + b"}",
    "lone surrogate": b'{"name": "do-not-repeat-me \\ud83d"}',
    "lone surrogate as a name": b'{"do-not-repeat-me": 1, "\\udead": 1}',
    "surrogate in bytes": b'{"name": "do-not-repeat-me \xed\xa0\x80"}',
    "surrogate in bytes as a name": b'{"do-not-repeat-me": 1, "\xed\xa0\x80": 1}',
    "nul": b'{"name": "do-not-repeat-me \\u0000"}',
    "raw nul": b'{"name": "do-not-repeat-me \x00"}',
    "nested lists": b'{"name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "open lists": b"[" * 100_000,
    "duplicate names": b'{"name": "do-not-repeat-me", "name": "other"}',
    "not json": b"do-not-repeat-me",
    "half": b'{"name": "do-not-repeat-me"',
    "two": b'{"name": "do-not-repeat-me"}{}',
    "not utf-8": b'{"name": "do-not-repeat-me \xff"}',
    "a list": b'["do-not-repeat-me"]',
    "a string": b'"do-not-repeat-me"',
    "null": b"null",
    "nothing": b"",
    "wrong types": b'{"name": {"do-not-repeat-me": 1}, "dataset_id": ["do-not-repeat-me"], "prompt": 1}',
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bodies_are_refused_and_never_repeated(shared_api: Api, path: str, kind: str) -> None:
    answer = shared_api.client.post(path, content=HOSTILE[kind], headers=JSON)
    assert answer.status_code in (400, 422), answer.text[:300]
    refused(answer, answer.status_code)
    if "name" not in kind:
        assert SECRET not in answer.text
    assert len(answer.content) < 10_000


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("nan", "NaN is not a JSON number"),
        ("long number", "a number of 5000 digits"),
        ("infinity", "-Infinity is not a JSON number"),
        ("too large", "too large a number"),
        ("lone surrogate", "surrogate"),
        ("surrogate in bytes", "UTF-8"),
        ("nul", "NUL"),
        ("nested lists", "nested"),
        ("duplicate names", '"name" stands twice in one object'),
        ("not json", "Expecting value at column 1"),
    ],
)
def test_a_body_that_is_no_json_says_why(shared_api: Api, kind: str, what: str) -> None:
    error = refused(shared_api.client.post("/jobs", content=HOSTILE[kind], headers=JSON), 400, "invalid_json")
    assert what in error["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "", None])
def test_json_needs_its_content_type(shared_api: Api, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = shared_api.client.post("/projects", content=b'{"name": "x"}', headers=headers)
    error = refused(answer, 415, "unsupported_media_type")
    assert "application/json" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "near"),
    [
        ("/jobs", {"dataset_id": "x", "validaton": {}}, "validaton", "validation"),
        (
            "/jobs",
            {"dataset_id": "x", "training": {"learning_rat": 1}},
            "training.learning_rat",
            "training.learning_rate",
        ),
        ("/jobs", {"dataset_id": "x", "lora": {"rank": 8, "aplha": 1}}, "lora.rank", "lora.r"),
        ("/jobs", {"dataset_id": "x", "training": {"lr": 1}}, "training.lr", "training.learning_rate"),
        ("/jobs", {"dataset_id": "x", "training": {"eval_steps": 1}}, "training.eval_steps", None),
        (
            "/jobs",
            {"dataset_id": "x", "validation": {"fracton": 0.1}},
            "validation.fracton",
            "validation.fraction",
        ),
        ("/generate", {"prompt": "Hi", "max_tokens": 5}, "max_tokens", "max_new_tokens"),
        (
            "/generate",
            {"messages": [{"role": "user", "contents": "Hi"}]},
            "messages.0.contents",
            "messages.0.content",
        ),
        ("/keys", {"name": "k", "projectid": "p"}, "projectid", "project_id"),
        ("/projects", {"name": "k", "nam": "p"}, "nam", "name"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(
    shared_api: Api, path: str, body: dict[str, Any], param: str, near: str | None
) -> None:
    error = refused(shared_api.client.post(path, json=body), 422, "invalid_request")
    (problem,) = [problem for problem in error["errors"] if problem["field"] == param]
    assert problem["message"] == f'There is no field "{param}".'
    if near is not None:
        assert problem["hint"] == f'Did you mean "{near}"?'


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a\x1f", "a\x7f"])
def test_a_name_that_cannot_be_is_refused_in_words(shared_api: Api, name: str) -> None:
    for path, body in (("/jobs", {"dataset_id": "x"}), ("/projects", {}), ("/keys", {})):
        error = refused(shared_api.client.post(path, json=body | {"name": name}), 422, "invalid_request")
        assert error["param"] == "name"
        assert error["message"].endswith(
            "1 to 128 characters without line breaks or other control characters."
        )


@only_sqlite
def test_an_unknown_form_field_is_answered_with_the_nearest(api: Api) -> None:
    error = refused(api.upload(maping="{}"), 422)
    assert '"maping"' in error["message"]
    assert "mapping" in error["hint"]
    assert api.stored() == []


@only_sqlite
def test_what_is_given_twice_is_refused(api: Api) -> None:
    file = {"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}')}
    twice = {"format": ["auto", "text"]}
    for path in ("/datasets", "/datasets/validate"):
        error = refused(api.client.post(path, files=file, data=twice), 422, "invalid_request")
        assert error["param"] == "format"
    two_files = [("file", ("a", b"{}")), ("file", ("b", b"{}"))]
    assert refused(api.client.post("/datasets", files=two_files), 422)["param"] == "file"
    assert refused(api.client.get("/jobs?limit=1&limit=2"), 422)["param"] == "limit"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "dataset_id"),
        ({"dataset_id": 5}, "dataset_id"),
        ({"dataset_id": "x", "seed": -1}, "seed"),
        ({"dataset_id": "x", "training": {"epochs": 0}}, "training.epochs"),
        ({"dataset_id": "x", "training": {"batch_size": 0}}, "training.batch_size"),
        ({"dataset_id": "x", "training": {"max_length": "long"}}, "training.max_length"),
        ({"dataset_id": "x", "lora": {"target_modules": ".*"}}, "lora.target_modules"),
        ({"dataset_id": "x", "lora": {"target_modules": [".*"]}}, "lora.target_modules"),
        ({"dataset_id": "x", "training": {"epochs": 1, "max_steps": 1}}, "training"),
        ({"dataset_id": "x", "validation": {}}, "validation"),
        ({"dataset_id": "x", "validation": {"fraction": 0.6}}, "validation.fraction"),
        ({"dataset_id": "x", "metadata": {"a": 1}}, "metadata.a"),
        ({"dataset_id": "x", "metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"dataset_id": "x", "name": ""}, "name"),
    ],
)
def test_a_wrong_value_is_named_by_its_field(shared_api: Api, body: dict[str, Any], param: str) -> None:
    error = refused(shared_api.client.post("/jobs", json=body), 422, "invalid_request")
    assert error["param"] == param
    assert {problem["field"] for problem in error["errors"]} == {param}
    assert error["error_count"] == len(error["errors"])


def test_thousands_of_wrong_fields_get_a_short_answer(shared_api: Api) -> None:
    body = {"dataset_id": "x"} | {f"{SECRET}{i}" + "x" * 100: 1 for i in range(3000)}
    answer = shared_api.client.post("/jobs", json=body)
    error = refused(answer, 422, "invalid_request")
    assert error["error_count"] == 3000
    assert len(answer.content) < 64 * 1024


@pytest.mark.parametrize(
    "path",
    ["/jobs?limit=0", "/jobs?limit=101", "/datasets?limit=x", "/adapters?limit=", "/jobs?status=done"],
)
def test_wrong_queries_are_refused(shared_api: Api, path: str) -> None:
    refused(shared_api.client.get(path), 422, "invalid_request")


# ---- Characters and numbers that a database cannot hold


def test_ids_that_no_database_can_hold_are_not_found(api: Api) -> None:
    for path in (
        "/datasets/%00",
        "/datasets/%ff%fe",
        "/datasets/%ed%a0%80",
        "/datasets/ds_%00/content",
        "/datasets/%00/preview",
        "/jobs/%00",
        "/jobs/%00/events",
        "/adapters/%00",
        "/adapters/%00/download",
        "/adapters/a%00/files/x",
    ):
        refused(api.client.get(path), 404)


def test_queries_that_no_database_can_hold_are_no_failure(api: Api) -> None:
    for query in ("after=%00", "metadata[a]=%00", "metadata[%00]=a"):
        assert api.client.get(f"/jobs?{query}").status_code in (200, 422), query
    for path in ("/datasets", "/adapters"):
        assert api.client.get(f"{path}?after=%00").status_code in (200, 422), path


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", ""])
def test_metadata_has_names_that_can_be_asked_for(api: Api, name: str) -> None:
    refused(api.client.post("/jobs", json={"dataset_id": "ds_x", "metadata": {name: "yes"}}), 422)


@pytest.mark.parametrize("name", ["a.b", "été"])
def test_jobs_are_found_by_metadata_of_any_name(api: Api, name: str) -> None:
    job = rows.job(api.sessions, api.project_id, labels={name: "yes"})
    answer = api.client.get("/jobs", params={f"metadata[{name}]": "yes"})
    assert [found["id"] for found in answer.json()["data"]] == [job.id]


@only_sqlite
def test_nothing_but_the_list_of_jobs_is_selected_by_metadata(api: Api) -> None:
    for query in ("metadata[team=a", "metadata[]=a", "metadata[a]b=a"):
        refused(api.client.get(f"/jobs?{query}"), 422, "invalid_request")
    for method, path in (("GET", "/datasets"), ("GET", "/adapters"), ("POST", "/jobs"), ("GET", "/models")):
        error = refused(
            api.client.request(method, f"{path}?metadata[team]=a", json={} if method == "POST" else None),
            422,
            "invalid_request",
        )
        assert error["param"] == "metadata[team]"


def test_form_text_that_no_database_can_hold_is_refused(api: Api) -> None:
    refused(api.upload(name="a\x00b"), 422)
    assert api.stored() == []
    assert api.client.get("/datasets").json()["data"] == []


# ---- Sizes


@only_sqlite
def test_an_upload_over_the_limit_is_refused_by_its_length(make_api: Callable[..., Api]) -> None:
    api = make_api(upload_max_bytes=5000)
    error = refused(api.upload([{"prompt": "x" * 6000, "completion": "y"}]), 413, "body_too_large")
    assert "5000" in error["message"]
    assert api.stored() == []
    assert api.upload().status_code == 201


@only_sqlite
def test_an_upload_over_the_limit_without_a_length_is_refused_too(make_api: Callable[..., Api]) -> None:
    api = make_api(upload_max_bytes=5000)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    def endless() -> Iterator[bytes]:
        yield head
        for _ in range(100):
            yield b"y" * 1000
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused(api.client.post("/datasets", content=endless(), headers=headers), 413, "body_too_large")


@pytest.mark.parametrize("with_length", [True, False])
def test_json_over_eight_mebibytes_is_refused(shared_api: Api, with_length: bool) -> None:
    body = json.dumps({"name": "x" * 9 * 1024**2}).encode()
    content: Any = body if with_length else iter([body[: 5 * 1024**2], body[5 * 1024**2 :]])
    refused(shared_api.client.post("/projects", content=content, headers=JSON), 413, "body_too_large")


@only_sqlite
def test_a_line_over_the_limit_is_refused(make_api: Callable[..., Api]) -> None:
    api = make_api(line_max_bytes=100)
    error = refused(api.upload([{"prompt": "x" * 200, "completion": "y"}]), 422, "invalid_dataset")
    assert error["errors"][0]["code"] == "line_too_long"
