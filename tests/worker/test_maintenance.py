"""The sweep, in this process."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from ulid import ULID

from core.control import queue
from core.control.db import Session, Sessions, reading
from core.control.running import probes, workers
from core.control.tables import JobKind, Project, Worker, utcnow
from core.ml import memory
from tests.control import rows
from worker import maintenance
from worker.context import Context

# The rows of both databases are tests/control's.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def test_a_worker_that_was_struck_out_enters_itself_again_with_its_device(context: Context) -> None:
    context.device.update(name="CPU", free_bytes=1)
    app = queue.create(context.settings)
    for _ in range(2):
        maintenance.sweep(context, app, trust_leases=True)
        with context.sessions.begin() as session:
            (worker,) = workers.alive(session)
            assert (worker.id, worker.slots) == (context.owner, context.settings.worker_slots)
            assert workers.device(session) == {"name": "CPU", "free_bytes": 1}
            session.delete(session.get_one(Worker, context.owner))


def told(context: Context, **device: Any) -> int:
    """The free memory that the row tells after a sweep, where one byte was free before."""
    context.device.update(name="it", free_bytes=1, **device)
    maintenance.sweep(context, queue.create(context.settings), trust_leases=True)
    with reading(context.sessions) as session:
        device = workers.device(session) or {}
    return int(device["free_bytes"])


def test_the_memory_of_a_cpu_is_measured_while_nothing_runs_on_it(context: Context, project_id: str) -> None:
    most = psutil.virtual_memory().total
    assert 2**20 < told(context, cuda=False) <= most
    with context.sessions.begin() as session:
        probe = probes.ask(session, model="m", dataset_id="ds", spec={})
    assert told(context) == 1
    with context.sessions.begin() as session:
        probes.answer(session, probe, {})
    job = rows.job(context.sessions, project_id)
    rows.claimed(context.sessions, job.id, owner="another")
    assert told(context) > 1
    job = rows.job(context.sessions, project_id)
    rows.claimed(context.sessions, job.id, owner=context.owner)
    assert told(context) == 1


def test_several_trainers_of_a_cpu_share_its_memory(context: Context) -> None:
    many = replace(context, settings=context.settings.model_copy(update={"trainer_processes": 1000}))
    assert 1 < told(many, cuda=False) <= psutil.virtual_memory().total // 1000


def test_the_memory_of_a_gpu_is_what_it_was_at_the_start(context: Context) -> None:
    assert told(context, cuda=True) == 1


def test_the_limit_of_a_container_holds_for_the_memory_measured_again(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    for name, said in (("current", "100"), ("stat", "inactive_file 40"), ("max", "1000")):
        (tmp_path / f"memory.{name}").write_text(f"{said}\n")
    assert told(context, cuda=False) == 940


def test_the_sweep_leaves_a_running_probe_its_folder(context: Context) -> None:
    folders = {}
    for name, age in (
        ("probe_new", context.settings.lease_seconds + 1),
        ("probe_old", 1000),
        ("job_old", 1000),
    ):
        folder = folders[name] = context.settings.scratch / name
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
    maintenance._clear_scratch(context)
    assert [name for name, folder in folders.items() if folder.is_dir()] == ["probe_new"]


def test_a_job_that_ends_while_its_folder_is_looked_at_disturbs_no_sweep(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = context.settings.scratch / "job_1"
    folder.mkdir(parents=True)

    @contextmanager
    def ends(sessions: Sessions) -> Iterator[Session]:
        with reading(sessions) as session:
            shutil.rmtree(folder, ignore_errors=True)
            yield session

    monkeypatch.setattr(maintenance, "reading", ends)
    maintenance.sweep(context, queue.create(context.settings), trust_leases=True)
    assert not folder.exists()


def stored(context: Context) -> list[str]:
    root = Path(context.settings.storage)
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


def test_files_that_no_row_names_are_removed_after_a_day(
    context: Context, project_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    job = rows.job(context.sessions, project_id)
    adapter = rows.adapter(project_id, job.id)
    with context.sessions.begin() as session:
        session.add(adapter)
        session.get_one(Project, project_id).created_at = utcnow() - timedelta(days=3)
    export = rows.export(context.sessions, adapter.id)
    asked = {"export": {"adapter_id": adapter.id, "format": "gguf"}}
    rows.job(context.sessions, project_id, kind=JobKind.EXPORT, spec=asked)
    old, new = (str(ULID.from_timestamp(time.time() - days * 86400)) for days in (2, 0))
    kept = [
        f"{adapter.key}/files/weights",
        f"{export.key}/export.zip",
        f"adapters/ad_{new}/adapter.zip",
        f"{adapter.key}/exports/exp_{new}/export.zip",
        f"datasets/ds_{new}/data",
        f"jobs/{job.id}/logs/1.txt",
        "datasets/mine/data",
    ]
    left = [
        f"adapters/ad_{old}/adapter.zip",
        f"{adapter.key}/exports/exp_{old}/export.zip",
        f"datasets/ds_{old}/data",
        f"jobs/{job.id}/checkpoints/0-5/weights",
        f"jobs/job_{old}/logs/1.txt",
    ]
    for key in kept + left:
        (tmp_path / "file").write_bytes(b"bytes")
        context.storage.put(tmp_path / "file", key)
    maintenance.remove_orphans(context)
    assert stored(context) == sorted(kept)
    said = [record.key for record in caplog.records if record.message == "removed files without a row"]
    assert sorted(said) == sorted(key.rpartition("/logs")[0] or str(Path(key).parent) for key in left)


def test_what_cannot_be_removed_does_not_keep_the_rest(
    context: Context, project_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with context.sessions.begin() as session:
        session.get_one(Project, project_id).created_at = utcnow() - timedelta(days=3)
    ids = [f"ds_{ULID.from_timestamp(time.time() - 86400 * 2)}" for _ in range(2)]
    for id_ in ids:
        (tmp_path / "file").write_bytes(b"bytes")
        context.storage.put(tmp_path / "file", f"datasets/{id_}/data")
    delete = context.storage.delete

    def refuse(key: str) -> None:
        if key.endswith(ids[0]):
            raise PermissionError(key)
        delete(key)

    monkeypatch.setattr(context.storage, "delete", refuse)
    maintenance.remove_orphans(context)
    assert stored(context) == [f"datasets/{ids[0]}/data"]


class HourThenStop(threading.Event):
    """An hour that passes at once, and a shutdown after it."""

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout == 3600
        stopped = self.is_set()
        self.set()
        return stopped


def test_one_worker_an_hour_looks_for_files_of_nobody(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(maintenance, "remove_orphans", lambda context: looked.append(context.owner))
    for owner in ("worker_1", "worker_2"):
        maintenance._orphans_loop(replace(context, owner=owner, stopping=HourThenStop()))
    assert looked == ["worker_1"]
