"""Who answers, before an engine is asked."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.serving import models
from core.control.tables import FINISHED, Adapter, Job, JobStatus
from core.ml import contract
from core.storage import Storage
from tests import tiny
from tests.api.conftest import Api, only_sqlite, refused
from tests.control import rows

pytestmark = only_sqlite


def adapter(api: Api, tiny_model: Path, folder: Path, **fields: Any) -> Adapter:
    contract.save(contract.load(tiny_model), folder)
    names = [file.name for file in folder.iterdir()]
    with api.sessions.begin() as session:
        row = rows.adapter(api.project_id, **fields)
        session.add(row)
    api.storage.put_folder(folder, f"{row.key}/files", names)
    return row


def test_an_adapter_whose_base_model_is_not_here_waits_for_it(
    make_api: Callable[..., Api], tiny_model: Path, tmp_path: Path
) -> None:
    api = make_api(models={tiny.NAME: str(tiny_model), "tests/absent": str(tmp_path / "absent")})
    row = adapter(api, tiny_model, tmp_path / "adapter", base_model="tests/absent")
    for path, body in (
        ("/generate", {"prompt": "a", "adapter_id": row.id}),
        ("/v1/completions", {"prompt": "a", "model": row.id}),
    ):
        refused(api.client.post(path, json=body), 503, "model_not_ready")


def test_an_adapter_in_a_bucket_is_fetched_once_and_leaves_no_files(
    api: Api, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "local", lambda *_: None)  # as of a bucket
    row = adapter(api, tiny_model, tmp_path / "adapter", base_model=tiny.NAME)
    fetched: list[str] = []
    get = Storage.get

    def counted(storage: Storage, key: str, target: Path) -> None:
        fetched.append(key)
        get(storage, key, target)

    def full_folder(**_asked: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(_storage: Storage, _key: str, _target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    body = {"prompt": "a", "adapter_id": row.id}
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "get", full)
        refused(api.client.post("/generate", json=body), 507, "storage_full")
    with monkeypatch.context() as patch:
        patch.setattr(models, "TemporaryDirectory", full_folder)
        refused(api.client.post("/generate", json=body), 507, "storage_full")
    kept = contract.load_cached.cache_info().currsize
    monkeypatch.setattr(Storage, "get", counted)
    for _ in range(2):
        refused(api.client.post("/generate", json=body), 503, "engine_unavailable")
    assert len(fetched) == len(models._PROMPT_FILES)
    assert contract.load_cached.cache_info().currsize == kept
    assert not list((tmp_path / "home").rglob("tokenizer.json"))


@pytest.mark.parametrize("status", FINISHED)
def test_a_job_that_is_over_gets_no_checkpoint_any_more(api: Api, status: JobStatus) -> None:
    job = rows.job(api.sessions, api.project_id, spec={"lora": {"init": "default"}})
    with api.sessions.begin() as session:
        session.get_one(Job, job.id).status = status
    body = {"targets": ["base", f"{job.id}@latest"], "prompt": "Hi"}
    error = refused(api.client.post("/compare", json=body), 404, "checkpoint_not_found")
    assert error["message"] == f"Job {job.id} is {status} and has no checkpoint."
    assert error["param"] == "targets.1"


def test_a_job_without_a_step_is_told_of_its_newest_one(api: Api) -> None:
    job = rows.job(api.sessions, api.project_id)
    body = {"model": job.id, "messages": [{"role": "user", "content": "Hi"}]}
    error = refused(api.client.post("/v1/chat/completions", json=body), 404, "checkpoint_not_found")
    assert (error["param"], "@latest" in error["hint"]) == ("model", True)


def test_an_adapter_without_its_files_says_so(api: Api, tiny_model: Path, tmp_path: Path) -> None:
    row = adapter(api, tiny_model, tmp_path / "adapter", base_model=tiny.NAME)
    api.storage.delete(f"{row.key}/files")
    body = {"prompt": "a", "adapter_id": row.id}
    error = refused(api.client.post("/generate", json=body), 404, "file_missing")
    assert error["message"] == f"The files of adapter {row.id} are not in the storage any more."
    assert (error["param"], "backup" in error["hint"]) == ("adapter_id", True)
    assert row.key not in str(error)


def test_a_target_that_is_not_there_is_named(api: Api) -> None:
    for name in ("tests/tny", "ad_none", "job_none@latest"):
        body = {"targets": ["base", name], "prompt": "Hi"}
        assert refused(api.client.post("/compare", json=body), 404)["param"] == "targets.1"
