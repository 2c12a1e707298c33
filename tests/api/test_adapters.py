"""Adapters, generation, models and health over HTTP. No engine runs."""

import hashlib
import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from core.control.running import events, workers
from core.control.tables import Adapter
from core.hashes import describe
from core.ml import contract
from core.settings import Settings
from tests import tiny
from tests.api.conftest import ADMIN_KEY, Api, only_sqlite, refused
from tests.conftest import Valkey
from tests.control import rows


@pytest.fixture
def adapter(api: Api, tiny_model: Path, tmp_path: Path) -> Adapter:
    """An adapter as the worker leaves it: a zip, its files, and a row."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    contract.save(contract.load(tiny_model), folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    files = [dict(info) for info in describe(folder)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for info in files:
            archive.write(folder / str(info["path"]), str(info["path"]))
    packed = tmp_path / "adapter.zip"
    packed.write_bytes(buffer.getvalue())
    row = rows.adapter(
        api.project_id,
        files=files,
        size=packed.stat().st_size,
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    api.storage.put_folder(folder, f"{row.key}/files", [str(info["path"]) for info in files])
    api.storage.put(packed, f"{row.key}/adapter.zip")
    with api.sessions.begin() as session:
        session.add(row)
    return row


def test_an_adapter_says_what_it_is(api: Api, adapter: Adapter) -> None:
    answer = api.client.get(f"/adapters/{adapter.id}")
    assert answer.status_code == 200
    shown = answer.json()
    assert (shown["object"], shown["base_model"], shown["sha256"]) == ("adapter", tiny.NAME, adapter.sha256)
    assert shown["files"] == adapter.files
    assert api.client.get("/adapters").json()["data"] == [shown]
    refused(api.client.get("/adapters/ad_none"), 404, "adapter_not_found")


def test_lists_are_paged(api: Api) -> None:
    made = []
    for _ in range(3):
        rows.dataset(api.sessions, api.project_id)  # lets a millisecond pass
        row = rows.adapter(api.project_id)
        with api.sessions.begin() as session:
            session.add(row)
        made.insert(0, row.id)
    body = api.client.get("/adapters", params={"limit": 2}).json()
    assert ([row["id"] for row in body["data"]], body["has_more"]) == (made[:2], True)
    body = api.client.get("/adapters", params={"limit": 2, "after": made[1]}).json()
    assert ([row["id"] for row in body["data"]], body["has_more"]) == (made[2:], False)


def test_the_download_is_the_zip_that_the_row_describes(api: Api, adapter: Adapter) -> None:
    answer = api.client.get(f"/adapters/{adapter.id}/download")
    assert answer.headers["content-type"] == "application/zip"
    assert len(answer.content) == adapter.size
    assert hashlib.sha256(answer.content).hexdigest() == adapter.sha256
    assert answer.headers["etag"] == f'"{adapter.sha256}"'
    assert zipfile.ZipFile(io.BytesIO(answer.content)).testzip() is None
    head = api.client.head(f"/adapters/{adapter.id}/download")
    assert (int(head.headers["content-length"]), head.content) == (adapter.size, b"")
    known = api.client.get(
        f"/adapters/{adapter.id}/download", headers={"if-none-match": answer.headers["etag"]}
    )
    assert known.status_code == 304


def test_a_download_can_be_taken_up_again(api: Api, adapter: Adapter) -> None:
    path = f"/adapters/{adapter.id}/download"
    whole = api.client.get(path).content
    half = len(whole) // 2
    first = api.client.get(path, headers={"range": f"bytes=0-{half - 1}"})
    rest = api.client.get(path, headers={"range": f"bytes={half}-", "if-range": first.headers["etag"]})
    assert (first.status_code, rest.status_code) == (206, 206)
    assert first.content + rest.content == whole
    refused(api.client.get(path, headers={"range": f"bytes={len(whole)}-"}), 416)


def test_every_listed_file_can_be_had(api: Api, adapter: Adapter) -> None:
    for info in adapter.files:
        answer = api.client.get(f"/adapters/{adapter.id}/files/{info['path']}")
        assert hashlib.sha256(answer.content).hexdigest() == info["sha256"]
        assert answer.headers["etag"] == f'"{info["sha256"]}"'
    path = f"/adapters/{adapter.id}/files/adapter_model.safetensors"
    part = api.client.get(path, headers={"range": "bytes=256-511"})
    assert (part.status_code, part.content) == (206, bytes(range(256)))


@pytest.mark.parametrize(
    "path",
    [
        "nothing",
        "",
        "../adapter.zip",
        "%2e%2e/adapter.zip",
        "..%2fadapter.zip",
        "%2e%2e%2f%2e%2e%2f%2e%2e%2fgraft.db",
        "..%5cadapter.zip",
        "%2fetc%2fpasswd",
        "//etc/passwd",
        "./adapter_config.json",
        "%2e/adapter_config.json",
        "adapter_config.json/",
        "adapter_config.json%00",
        "ADAPTER_CONFIG.JSON",
        "x/../adapter_config.json%20",
    ],
)
@only_sqlite
def test_no_path_leads_out_of_the_adapter(api: Api, adapter: Adapter, path: str) -> None:
    answer = api.client.get(f"/adapters/{adapter.id}/files/{path}")
    if answer.request.url.path == f"/adapters/{adapter.id}/files/adapter_config.json":
        assert answer.content == b"{}"  # the client itself made a plain path of it
    else:
        refused(answer, 404)


def test_delete_takes_row_and_files(api: Api, adapter: Adapter) -> None:
    assert api.client.delete(f"/adapters/{adapter.id}").json() == {"id": adapter.id, "deleted": True}
    assert api.stored() == []
    refused(api.client.get(f"/adapters/{adapter.id}/download"), 404, "adapter_not_found")


def test_an_adapter_whose_files_are_gone_says_so(api: Api, adapter: Adapter) -> None:
    api.storage.delete(adapter.key)
    refused(api.client.get(f"/adapters/{adapter.id}/download"), 404, "file_missing")
    refused(api.client.get(f"/adapters/{adapter.id}/files/adapter_config.json"), 404, "file_missing")
    refused(api.client.post("/generate", json={"adapter_id": adapter.id, "prompt": "Hi"}), 404)


# ---- Generation


@only_sqlite
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["base", "adapter"])
def test_without_an_engine_generation_is_unavailable(
    api: Api, adapter: Adapter, what: str, stream: bool
) -> None:
    body = {"prompt": "Hi", "stream": stream} | ({"adapter_id": adapter.id} if what == "adapter" else {})
    answer = api.client.post("/generate", json=body)
    refused(answer, 503, "engine_unavailable")
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "raw": True}, "raw"),
        ({"prompt": "a", "tools": [{"name": "a"}]}, "tools"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a", "name": 1}]}, "messages.0.name"),
        ({"prompt": "a", "adapter_id": "x", "model": "y"}, ""),
        ({"prompt": "a", "stream": True, "n": 2}, "n"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_k": -1}, "top_k"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "stop": [""]}, "stop.0"),
    ],
)
def test_a_wrong_request_is_named_by_its_field(shared_api: Api, body: dict[str, Any], param: str) -> None:
    error = refused(shared_api.client.post("/generate", json=body), 422, "invalid_request")
    assert error["errors"][0]["field"] == param
    assert error["param"] == (param or None)
    assert f'"{param}"' in error["message"] or not param


def test_a_conversation_is_checked_as_those_of_a_data_set(shared_api: Api) -> None:
    for message, code, param in (
        ({"role": "user"}, "not_text", "messages.0.content"),
        ({"role": "tool", "content": "a"}, "tool_without_call", "messages.0"),
    ):
        answer = shared_api.client.post("/generate", json={"messages": [message]})
        error = refused(answer, 422, code)
        assert (error["param"], error["message"].split()[0]) == (param, param)


def test_a_prompt_longer_than_the_model_reads_is_refused(shared_api: Api) -> None:
    body = {"prompt": "x" * 2000, "max_new_tokens": 5}
    error = refused(shared_api.client.post("/generate", json=body), 400, "prompt_too_long")
    assert "512" in error["message"]
    assert error["param"] == "prompt"
    body = {"prompt": "x", "max_new_tokens": 512}
    error = refused(shared_api.client.post("/generate", json=body), 400, "prompt_too_long")
    assert error["param"] == "max_new_tokens"
    # 256 is no number that the client sent.
    error = refused(shared_api.client.post("/generate", json={"prompt": "x" * 400}), 400, "prompt_too_long")
    assert (error["param"], "max_new_tokens" in error["hint"]) == ("prompt", True)


def test_an_empty_raw_prompt_is_refused(shared_api: Api) -> None:
    error = refused(
        shared_api.client.post("/generate", json={"prompt": "", "raw": True}), 422, "empty_prompt"
    )
    assert error["param"] == "prompt"


def test_what_does_not_exist_cannot_generate(shared_api: Api) -> None:
    refused(
        shared_api.client.post("/generate", json={"prompt": "a", "adapter_id": "ad_none"}),
        404,
        "adapter_not_found",
    )
    error = refused(shared_api.client.post("/generate", json={"prompt": "a", "model": "tests/tny"}), 404)
    assert 'did you mean "tests/tiny"' in error["message"]


def test_a_model_that_is_not_here_yet_is_said(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api(models={"tests/absent": str(tmp_path / "absent")}, default_model="tests/absent")
    refused(api.client.post("/generate", json={"prompt": "a"}), 503, "model_not_ready")


def test_a_checkpoint_that_cannot_be_talked_to_says_why(api: Api) -> None:
    def ask(name: str) -> Any:
        return api.client.post("/generate", json={"adapter_id": name, "prompt": "Hi"})

    plain = rows.job(api.sessions, api.project_id, spec={"lora": {"init": "default"}})
    error = refused(ask(f"{plain.id}@latest"), 404, "checkpoint_not_found")
    assert "no checkpoint yet" in error["message"]
    moved = rows.job(api.sessions, api.project_id, spec={"lora": {"init": "pissa"}})
    files = [{"path": "adapter_model.safetensors", "bytes": 1, "sha256": "0" * 64}]
    with api.sessions.begin() as session:
        for job in (plain, moved):
            events.add_checkpoint(session, job.id, 4, f"jobs/{job.id}/checkpoints/1-4", files, {})
    assert "the steps 4" in (refused(ask(f"{plain.id}@3"), 404, "checkpoint_not_found")["hint"] or "")
    error = refused(ask(f"{plain.id}@4"), 404, "file_missing")
    assert error["message"] == f"The files of checkpoint {plain.id}@4 are not in the storage any more."
    assert (error["param"], "@latest" in error["hint"]) == ("adapter_id", True)
    refused(ask(f"{moved.id}@latest"), 409, "checkpoint_not_servable")
    for name in (plain.id, f"{plain.id}@", f"{plain.id}@\u0664"):
        assert "@latest" in refused(ask(name), 404, "checkpoint_not_found")["hint"]
    assert refused(ask("job_none@latest"), 404, "job_not_found")["param"] == "adapter_id"


# ---- Models and health


def test_the_catalogue_lists_what_can_be_named(shared_api: Api) -> None:
    models = {model["name"]: model for model in shared_api.client.get("/models").json()["data"]}
    assert models[tiny.NAME] == {
        "name": tiny.NAME,
        "object": "model",
        "source": "folder",
        "parameters": None,
        "context": 512,
        "ready": True,
        "default": True,
    }
    built_in = models["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert (built_in["context"], built_in["default"], built_in["ready"]) == (8192, False, False)


def test_a_live_process_says_so_without_a_key(api: Api) -> None:
    assert api.nobody.get("/health/live").json() == {"status": "ok"}


def test_ready_names_the_parts_that_are_down(api: Api) -> None:
    answer = api.nobody.get("/health/ready")
    assert answer.status_code == 503
    assert answer.json()["parts"] == {
        "database": "ok",
        "broker": "down",
        "storage": "ok",
        "workers": "down",
        "engine": "down",
    }
    assert answer.json()["engine"] == {}


def test_ready_sees_the_broker_and_the_workers(make_api: Callable[..., Api], valkey: Valkey) -> None:
    api = make_api(broker_url=valkey.url)
    with api.sessions.begin() as session:
        workers.register(session, 1)
    parts = api.nobody.get("/health/ready").json()["parts"]
    assert (parts["broker"], parts["workers"], parts["engine"]) == ("ok", "ok", "down")
    valkey.stop()
    assert api.nobody.get("/health/ready").json()["parts"]["broker"] == "down"


@only_sqlite
def test_ready_answers_soon_where_no_bucket_does(make_api: Callable[..., Api]) -> None:
    silent = make_api(storage_url="s3://graft", s3_endpoint_url="http://127.0.0.1:9")
    started = time.monotonic()
    assert silent.nobody.get("/health/ready").json()["parts"]["storage"] == "down"
    assert time.monotonic() - started < 4


@only_sqlite
def test_ready_answers_when_the_storage_is_broken(make_api: Callable[..., Api], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    parts = make_api(storage_url=str(tmp_path / "file")).nobody.get("/health/ready").json()["parts"]
    assert (parts["storage"], parts["database"]) == ("down", "ok")


@only_sqlite
def test_a_database_that_is_gone_is_said(api: Api, closed_port: int) -> None:
    changes = {"database_url": f"postgresql://nobody@127.0.0.1:{closed_port}/none", "admin_key": None}
    app = create_app(Settings(**(api.services.settings.model_dump() | changes)))
    with TestClient(
        app, raise_server_exceptions=False, headers={"authorization": f"Bearer {ADMIN_KEY}"}
    ) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").json()["parts"]["database"] == "down"
        answer = client.get("/jobs")
        refused(answer, 503, "database_unavailable")
        assert int(answer.headers["retry-after"]) > 0
