"""The sweep, in this process."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from core.control import queue
from core.control.db import Session, Sessions, reading
from core.control.running import workers
from core.control.tables import Worker
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
