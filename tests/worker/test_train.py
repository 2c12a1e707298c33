"""The worker's part of a job where the database or the storage plays tricks, without a trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from core.control import jobs
from core.control.db import Session, Sessions
from core.control.running import attempts, events
from core.control.tables import Adapter, Checkpoint, Job, JobStatus
from core.errors import Fenced
from core.hashes import describe, sha256
from core.ml.training import config
from core.ml.training.config import Spec
from tests.control import rows
from worker import train
from worker.attempt import artifacts, reports
from worker.attempt.reports import Attempt
from worker.context import Context

CERTIFICATE: dict[str, Any] = {
    "version": 1,
    "ok": False,
    "checks": [{"name": "keys", "ok": True}, {"name": "stop_rate", "ok": False}],
    "evaluation": {"metrics": ["rouge"], "verdict": {"words": "It is better."}},
}


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
    train.publish(shaky, attempt, finished, {"train_loss": 1.0}, CERTIFICATE)
    job = job_of(context, attempt)
    assert job.status == JobStatus.SUCCEEDED
    with context.sessions() as session:
        (adapter,) = session.query(Adapter).all()
    assert adapter.id == job.adapter_id
    assert (adapter.certificate, adapter.metrics, job.metrics) == (
        CERTIFICATE,
        {"train_loss": 1.0},
        {"train_loss": 1.0},
    )
    assert context.storage.size(f"{adapter.key}/adapter.zip") == adapter.size
    with context.sessions() as session:
        event = events.latest(session, job.id, "certificate")
    assert event is not None
    assert (event.level, event.message) == ("warning", "Not everything holds: stop_rate. It is better.")
    assert context.storage.open(f"{adapter.key}/files/adapter_model.safetensors").read() == b"weights"


def test_a_worker_that_lost_its_lease_publishes_nothing(
    context: Context, attempt: Attempt, finished: Path
) -> None:
    with context.sessions.begin() as session:
        attempts.release(session, attempt.job.id, attempt.job.fence, "taken")
    with pytest.raises(Fenced):
        train.publish(context, attempt, finished, {}, CERTIFICATE)
    with context.sessions() as session:
        assert session.query(Adapter).all() == []
    folder = context.storage.local("adapters")
    assert folder is not None
    assert not folder.is_dir() or list(folder.iterdir()) == []


def store(context: Context, attempt: Attempt, step: int, tmp_path: Path, **metrics: float) -> None:
    folder = tmp_path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(str(step).encode())
    files = describe(folder)
    key = f"jobs/{attempt.job.id}/checkpoints/0-{step}"
    context.storage.put_folder(folder, key, ["optimizer.pt"])
    with context.sessions.begin() as session:
        events.add_checkpoint(session, attempt.job.id, step, key, [dict(info) for info in files], metrics)


def damage(context: Context, attempt: Attempt, step: int) -> None:
    file = context.storage.local(f"jobs/{attempt.job.id}/checkpoints/0-{step}/optimizer.pt")
    assert file is not None
    file.write_bytes(b"x")


def kept(context: Context, attempt: Attempt) -> list[int]:
    with context.sessions() as session:
        return [row.step for row in events.checkpoints(session, attempt.job.id)]


def fetched(context: Context, attempt: Attempt) -> list[bytes | None]:
    """What lies in the checkpoint to resume from and in the best one."""
    with context.sessions() as session:
        saved = events.checkpoints(session, attempt.job.id)
    folders = train.fetch_checkpoints(context, attempt, saved)
    return [folder and (folder / "optimizer.pt").read_bytes() for folder in folders]


def told(context: Context, attempt: Attempt) -> list[str]:
    with context.sessions() as session:
        return [event.type for event in events.after(session, attempt.job.id, 0)]


def test_damaged_checkpoints_are_passed_over_and_do_not_push_out_the_good_one(
    context: Context, attempt: Attempt, tmp_path: Path
) -> None:
    for step in (10, 20, 30):
        store(context, attempt, step, tmp_path)
    for step in (20, 30):
        damage(context, attempt, step)
    assert fetched(context, attempt) == [b"10", None]
    assert kept(context, attempt) == [10]
    kinds = told(context, attempt)
    assert kinds.count("checkpoint_damaged") == 2
    assert "resumed" in kinds


def test_the_best_checkpoint_comes_along_and_a_damaged_one_is_not_taken_for_it(
    context: Context, attempt: Attempt, tmp_path: Path
) -> None:
    for step, loss in ((10, 0.5), (20, 0.25), (30, 0.75)):
        store(context, attempt, step, tmp_path, eval_loss=loss)
    assert fetched(context, attempt) == [b"30", b"20"]
    damage(context, attempt, 20)
    assert fetched(context, attempt) == [b"30", b"10"]
    assert kept(context, attempt) == [30, 10]


def test_a_newest_checkpoint_that_is_the_best_one_too_is_fetched_once(
    context: Context, attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, loss in ((10, 0.5), (20, 0.25)):
        store(context, attempt, step, tmp_path, eval_loss=loss)
    asked: list[int] = []
    fetch = artifacts.fetch_checkpoint

    def counted(context: Context, row: Checkpoint, folder: Path) -> bool:
        asked.append(row.step)
        return fetch(context, row, folder)

    monkeypatch.setattr(artifacts, "fetch_checkpoint", counted)
    assert fetched(context, attempt) == [b"20", b"20"]
    assert asked == [20]


@pytest.mark.parametrize("resumes", [True, False])
def test_a_run_that_goes_on_holds_its_weights_as_it_did(
    context: Context, attempt: Attempt, tmp_path: Path, resumes: bool
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    job = attempt.job
    dataset = rows.dataset(context.sessions, job.project_id, sha256=sha256(file))
    context.storage.put(file, dataset.key)
    job.dataset_id, job.spec = dataset.id, config.settle(Spec()).model_dump()
    for kept in (False, True):
        with context.sessions.begin() as session:
            events.add(session, job.id, "plan", "Planned.", data={"weights_kept": kept})
    if resumes:
        store(context, attempt, 10, tmp_path)
    run = train._inputs(context, attempt)
    assert (run.resume is not None, run.kept) == (resumes, True if resumes else None)
    job.checkpoint_spec = job.spec
    run = train._inputs(context, attempt)
    assert (run.resume, run.kept) == (None, None)


def test_without_a_whole_checkpoint_the_job_begins_anew(
    context: Context, attempt: Attempt, tmp_path: Path
) -> None:
    store(context, attempt, 10, tmp_path, eval_loss=0.5)
    damage(context, attempt, 10)
    assert fetched(context, attempt) == [None, None]
    assert kept(context, attempt) == []
    assert job_of(context, attempt).step == 0


# ---- Reports


def report(context: Context, attempt: Attempt, *reported: tuple[str, dict[str, Any]]) -> None:
    attempt.reports.extend(reported)
    reports.write(context, attempt)


def measured(step: int, **values: float) -> tuple[str, dict[str, Any]]:
    return "metrics", {"step": step, "values": values, "progress": None}


def test_the_last_checkpoints_and_the_best_are_kept_with_what_their_own_step_measured(
    context: Context, attempt: Attempt
) -> None:
    losses = {1: 0.9, 2: 0.3, 3: 0.8, 4: 0.3, 5: 0.7}
    for step, loss in losses.items():
        attempt.stored.append({"step": step, "files": []})
        # A checkpoint is stored while the training goes on: a later step is known when it is entered.
        report(context, attempt, measured(step, loss=1.0, eval_loss=loss), measured(step + 1, loss=2.0))
    assert kept(context, attempt) == [5, 4, 2]
    with context.sessions() as session:
        rows_ = {row.step: row.metrics for row in events.checkpoints(session, attempt.job.id)}
    assert rows_ == {step: {"train_loss": 1.0, "eval_loss": losses[step]} for step in (5, 4, 2)}


def test_a_step_that_was_not_evaluated_is_not_the_best(context: Context, attempt: Attempt) -> None:
    report(context, attempt, measured(2, eval_loss=0.3))
    attempt.stored.append({"step": 3, "files": []})
    report(context, attempt, measured(3, loss=1.0))
    attempt.stored.append({"step": 4, "files": []})
    report(context, attempt, ("metrics", {"step": 4, "values": {"eval_loss": 0.2}, "progress": None}))
    with context.sessions() as session:
        saved = events.checkpoints(session, attempt.job.id)
    assert {row.step: row.metrics for row in saved} == {3: {"train_loss": 1.0}, 4: {"eval_loss": 0.2}}


def test_samples_and_notes_become_events(context: Context, attempt: Attempt) -> None:
    sample = {"prompt": "Hi", "expected": None, "text": "Hello", "finish_reason": "stop"}
    note = {"type": "early_stop", "level": "warning", "message": "Stopped early.", "data": {"step": 9}}
    unknown = ("alive", {})
    report(context, attempt, ("samples", {"step": 5, "samples": [sample]}), ("note", note), unknown)
    with context.sessions() as session:
        *_, samples, early = events.after(session, attempt.job.id, 0)
    assert (samples.type, samples.message) == ("samples", "Answers to 1 prompts at step 5.")
    assert samples.data == {"step": 5, "samples": [sample]}
    assert (early.type, early.level, early.message, early.data) == tuple(note.values())


@pytest.mark.parametrize("lost", [0, 1])
def test_checkpoints_of_another_spec_stay_until_a_new_run_has_its_model(
    context: Context, attempt: Attempt, tmp_path: Path, lost: int
) -> None:
    store(context, attempt, 10, tmp_path)
    attempt.job.checkpoint_spec = attempt.job.spec
    with context.sessions.begin() as session:
        session.get_one(Job, attempt.job.id).checkpoint_spec = attempt.job.spec
    report(context, attempt, ("phase", {"phase": "loading_model"}))
    assert kept(context, attempt) == [10]
    shaky = Context(**{**vars(context), "sessions": LosesAnswers(context.sessions, lost)})
    attempt.reports.append(("model_loaded", {"seconds": 1.0}))
    if lost:
        with pytest.raises(OperationalError):
            reports.write(shaky, attempt)
    reports.write(shaky, attempt)
    assert kept(context, attempt) == []
    assert job_of(context, attempt).checkpoint_spec is None
    attempt.stored.append({"step": 1, "files": []})
    report(context, attempt, ("model_loaded", {"seconds": 1.0}))
    assert kept(context, attempt) == [1]


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
