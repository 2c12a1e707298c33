"""The worker's part of a job where the database or the storage plays tricks, without a trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from core.control import attempts, events, jobs
from core.control.db import Session, Sessions
from core.control.tables import Adapter, Job, JobStatus
from core.errors import Fenced
from core.hashes import describe
from tests.control import rows
from worker import reports, train
from worker.context import Context
from worker.reports import Attempt


class LosesAnswers:
    """A database whose commit arrives while its answer does not, the first `times` times."""

    def __init__(self, sessions: Sessions, times: int) -> None:
        self.sessions, self.times, self.kw = sessions, times, sessions.kw

    def __call__(self, **options: Any) -> Session:
        return self.sessions(**options)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        with self.sessions.begin() as session:
            yield session
        if self.times:
            self.times -= 1
            raise OperationalError("COMMIT", {}, Exception("server closed the connection"))


@pytest.fixture
def attempt(context: Context, project_id: str, tmp_path: Path) -> Attempt:
    job = rows.job(context.sessions, project_id)
    with context.sessions.begin() as session:
        claimed = attempts.claim(session, job.id, "worker_1", 60)
    assert claimed is not None
    claimed.spec = {**claimed.spec, "checkpoints": {"keep": 2}}
    work = tmp_path / "work"
    work.mkdir()
    return Attempt(claimed, work)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def job_of(context: Context, attempt: Attempt) -> Job:
    with context.sessions() as session:
        return session.get_one(Job, attempt.job.id)


@pytest.mark.parametrize("lost", [0, 1])
def test_an_adapter_stays_when_only_the_answer_of_its_commit_is_lost(
    context: Context, attempt: Attempt, finished: Path, lost: int
) -> None:
    shaky = Context(**{**vars(context), "sessions": LosesAnswers(context.sessions, lost)})
    train._publish(shaky, attempt, finished, {"train_loss": 1.0})
    job = job_of(context, attempt)
    assert job.status == JobStatus.SUCCEEDED
    with context.sessions() as session:
        (adapter,) = session.query(Adapter).all()
    assert adapter.id == job.adapter_id
    assert context.storage.size(f"{adapter.key}/adapter.zip") == adapter.size
    assert context.storage.open(f"{adapter.key}/files/adapter_model.safetensors").read() == b"weights"


def test_a_worker_that_lost_its_lease_publishes_nothing(
    context: Context, attempt: Attempt, finished: Path
) -> None:
    with context.sessions.begin() as session:
        attempts.release(session, attempt.job.id, attempt.job.fence, "taken")
    with pytest.raises(Fenced):
        train._publish(context, attempt, finished, {})
    with context.sessions() as session:
        assert session.query(Adapter).all() == []
    folder = context.storage.local("adapters")
    assert folder is not None
    assert not folder.is_dir() or list(folder.iterdir()) == []


def store(context: Context, attempt: Attempt, step: int, tmp_path: Path) -> None:
    folder = tmp_path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(str(step).encode())
    files = describe(folder)
    key = f"jobs/{attempt.job.id}/checkpoints/0-{step}"
    context.storage.put_folder(folder, key, ["optimizer.pt"])
    with context.sessions.begin() as session:
        events.add_checkpoint(session, attempt.job.id, step, key, [dict(info) for info in files], {})


def test_damaged_checkpoints_are_passed_over_and_do_not_push_out_the_good_one(
    context: Context, attempt: Attempt, tmp_path: Path
) -> None:
    for step in (10, 20, 30):
        store(context, attempt, step, tmp_path)
    for step in (20, 30):
        broken = context.storage.local(f"jobs/{attempt.job.id}/checkpoints/0-{step}/optimizer.pt")
        assert broken is not None
        broken.write_bytes(b"x")
    with context.sessions() as session:
        saved = events.checkpoints(session, attempt.job.id)
    resume, step = train._resume(context, attempt, saved)
    assert step == 10
    assert resume is not None
    assert (resume / "optimizer.pt").read_bytes() == b"10"
    with context.sessions() as session:
        assert [row.step for row in events.checkpoints(session, attempt.job.id)] == [10]
        kinds = [event.type for event in events.after(session, attempt.job.id, 0)]
    assert kinds.count("checkpoint_damaged") == 2
    assert "resumed" in kinds


def test_progress_gives_the_patience_with_crashes_back(context: Context, attempt: Attempt) -> None:
    with context.sessions.begin() as session:
        session.get_one(Job, attempt.job.id).crashes = 3
    attempt.stored.append({"step": 5, "files": []})
    reports.write(context, attempt)
    assert job_of(context, attempt).crashes == 0


def test_a_write_that_fails_is_written_later_and_once(context: Context, attempt: Attempt) -> None:
    attempt.reports.append(("phase", {"phase": "training"}))
    with context.sessions.begin() as session:
        attempts.renew(session, attempt.job.id, attempt.job.fence, 60)
    reports.write(context, attempt)
    reports.write(context, attempt)
    with context.sessions() as session:
        kinds = [event.type for event in events.after(session, attempt.job.id, 0)]
        page = jobs.page(session, attempt.job.project_id, limit=10, after=None, status=None, labels={})
    assert kinds.count("phase") == 1
    assert page[0].phase == "training"
