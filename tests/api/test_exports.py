"""Exports of adapters, and jobs as scripts, over HTTP. No worker runs."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

from core.control import jobs
from core.control.tables import Adapter, Export, Job, JobKind, new_id
from core.hashes import describe
from tests.api.conftest import Api, only_sqlite, refused
from tests.control import rows
from worker.attempt import artifacts


@pytest.fixture
def adapter(api: Api) -> Adapter:
    row = rows.adapter(api.project_id)
    with api.sessions.begin() as session:
        session.add(row)
    return row


@pytest.fixture
def export(api: Api, adapter: Adapter, tmp_path: Path) -> Export:
    """An export as the worker leaves it."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "Modelfile").write_text("FROM ./m.gguf\n")
    (folder / "m.gguf").write_bytes(bytes(range(256)) * 8)
    packed = tmp_path / "export.zip"
    artifacts.pack(folder, ["Modelfile", "m.gguf"], packed)
    row = Export(
        id=new_id("exp"),
        adapter_id=adapter.id,
        job_id="job_1",
        format="gguf",
        size=packed.stat().st_size,
        sha256=hashlib.sha256(packed.read_bytes()).hexdigest(),
        files=[dict(info) for info in describe(folder)],
        report={"degraded": False, "reasons": []},
    )
    api.storage.put(packed, row.archive)
    with api.sessions.begin() as session:
        session.add(row)
    return row


def test_an_export_is_a_job_of_its_own(api: Api, adapter: Adapter) -> None:
    answer = api.client.post(f"/adapters/{adapter.id}/export", json={"format": "gguf"})
    assert answer.status_code == 201
    job = answer.json()
    assert (job["object"], job["kind"], job["status"]) == ("job", "export", "queued")
    assert (job["dataset_id"], job["model"], job["adapter_id"]) == (None, adapter.base_model, None)
    assert job["spec"] == {"export": {"adapter_id": adapter.id, "format": "gguf"}}
    assert api.client.get(f"/jobs/{job['id']}").json()["id"] == job["id"]
    assert rows.read(api.sessions, job["id"]).kind is JobKind.EXPORT
    assert api.client.post(f"/jobs/{job['id']}/cancel").json()["status"] == "cancelled"


def test_the_same_key_asks_for_one_export(api: Api, adapter: Adapter) -> None:
    path, key = f"/adapters/{adapter.id}/export", {"idempotency-key": "k"}
    first = api.client.post(path, json={"format": "merged"}, headers=key).json()
    again = api.client.post(path, json={"format": "merged"}, headers=key).json()
    assert first["id"] == again["id"]
    refused(api.client.post(path, json={"format": "gguf"}, headers=key), 409, "idempotency_conflict")
    assert api.client.post(path, json={"format": "merged"}).json()["id"] != first["id"]


def test_the_same_export_asked_for_at_once_is_one(
    api: Api, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, key = f"/adapters/{adapter.id}/export", {"idempotency-key": "k"}
    first = api.client.post(path, json={"format": "merged"}, headers=key).json()
    replay, looked = jobs.replay, []

    def too_early(*args: Any) -> Job | None:
        looked.append(args)
        return None if len(looked) == 1 else replay(*args)

    monkeypatch.setattr(jobs, "replay", too_early)  # it looked before the first one was there
    again = api.client.post(path, json={"format": "merged"}, headers=key)
    assert (again.status_code, len(looked)) == (201, 2)
    assert again.json() == first
    assert first["queue"] == {"position": 0}
    assert len(api.client.get("/jobs").json()["data"]) == 1


def test_only_what_is_there_and_known_is_exported(api: Api, adapter: Adapter) -> None:
    path = f"/adapters/{adapter.id}/export"
    error = refused(api.client.post(path, json={"format": "onnx"}), 422, "invalid_request")
    assert error["errors"][0]["field"] == "format"
    refused(api.client.post("/adapters/ad_none/export", json={"format": "gguf"}), 404, "adapter_not_found")
    refused(api.stranger.post(path, json={"format": "gguf"}), 404, "adapter_not_found")


def test_an_export_is_listed_and_shown(api: Api, adapter: Adapter, export: Export) -> None:
    shown = api.client.get(f"/adapters/{adapter.id}/exports/{export.id}").json()
    assert (shown["object"], shown["format"], shown["sha256"]) == ("adapter.export", "gguf", export.sha256)
    assert shown["report"] == export.report
    assert [info["path"] for info in shown["files"]] == ["Modelfile", "m.gguf"]
    listed = api.client.get(f"/adapters/{adapter.id}/exports").json()
    assert (listed["data"], listed["has_more"]) == ([shown], False)
    other = rows.adapter(api.project_id)
    with api.sessions.begin() as session:
        session.add(other)
    assert api.client.get(f"/adapters/{other.id}/exports").json()["data"] == []
    refused(api.client.get(f"/adapters/{other.id}/exports/{export.id}"), 404, "export_not_found")
    refused(api.stranger.get(f"/adapters/{adapter.id}/exports"), 404, "adapter_not_found")
    path = f"/adapters/{adapter.id}/exports/{export.id}/download"
    refused(api.stranger.get(path), 404, "adapter_not_found")


def test_the_download_is_the_zip_that_the_row_describes(api: Api, adapter: Adapter, export: Export) -> None:
    path = f"/adapters/{adapter.id}/exports/{export.id}/download"
    whole = api.client.get(path)
    assert hashlib.sha256(whole.content).hexdigest() == export.sha256
    assert whole.headers["etag"] == f'"{export.sha256}"'
    packed = zipfile.ZipFile(io.BytesIO(whole.content))
    assert packed.testzip() is None
    assert {info.compress_type for info in packed.infolist()} == {zipfile.ZIP_STORED}
    part = api.client.get(path, headers={"range": "bytes=10-99", "if-range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, whole.content[10:100])
    head = api.client.head(path)
    assert (int(head.headers["content-length"]), head.content) == (export.size, b"")
    assert api.client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304


def test_an_adapter_takes_its_exports_with_it(api: Api, adapter: Adapter, export: Export) -> None:
    assert api.stored() == [export.archive]
    api.client.delete(f"/adapters/{adapter.id}")
    assert api.stored() == []
    with api.sessions() as session:
        assert session.get(Export, export.id) is None


@only_sqlite
@pytest.mark.parametrize(
    ("tool", "sign", "kind"),
    [
        ("trl", "SFTTrainer(", "text/x-python"),
        ("axolotl", "micro_batch_size: ", "application/yaml"),
        ("llamafactory", "finetuning_type: ", "application/yaml"),
    ],
)
def test_a_training_is_had_as_a_script(api: Api, tool: str, sign: str, kind: str) -> None:
    job = api.client.post("/jobs", json={"dataset_id": api.dataset_id(), "seed": 7}).json()
    answer = api.client.get(f"/jobs/{job['id']}/script", params={"as": tool})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kind)
    assert sign in answer.text
    assert answer.text.startswith(f"# Job {job['id']} of Graft")
    assert f"#   graft data conversations {job['dataset_id']} --model {job['model']} " in answer.text
    refused(api.stranger.get(f"/jobs/{job['id']}/script", params={"as": tool}), 404, "job_not_found")


@only_sqlite
@pytest.mark.parametrize(
    ("text", "stage"), [("### Human: q{}### Assistant: a{}", "sft"), ("plain text {}", "pt")]
)
def test_texts_in_a_layout_are_conversations_to_a_script(api: Api, text: str, stage: str) -> None:
    dataset_id = api.upload([{"text": text.format(i, i)} for i in range(3)]).json()["id"]
    job = api.client.post("/jobs", json={"dataset_id": dataset_id}).json()
    answer = api.client.get(f"/jobs/{job['id']}/script", params={"as": "llamafactory"})
    assert f'stage: "{stage}"' in answer.text


@only_sqlite
def test_an_export_has_no_script(api: Api, adapter: Adapter) -> None:
    job = api.client.post(f"/adapters/{adapter.id}/export", json={"format": "gguf"}).json()
    refused(api.client.get(f"/jobs/{job['id']}/script", params={"as": "trl"}), 409, "not_a_training")
    refused(api.client.get(f"/jobs/{job['id']}/script", params={"as": "word"}), 422, "invalid_request")
    refused(api.client.get(f"/jobs/{job['id']}/script"), 422, "invalid_request")
