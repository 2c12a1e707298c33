"""The end of an attempt, written by the worker: what the trainer's last word makes of the job."""

import signal
from pathlib import Path
from typing import Any

import pytest

from core.control import jobs as control
from core.control.running import attempts, events
from core.control.tables import Dataset, Job, JobStatus
from core.errors import GraftError, NotFound
from core.hashes import describe, sha256
from core.ml.training import config
from core.ml.training.config import Spec
from core.settings import Settings
from tests.control import rows
from worker import jobs
from worker.attempt import artifacts
from worker.attempt.reports import Attempt
from worker.context import Context


@pytest.fixture
def job(context: Context, project_id: str) -> Job:
    planned = Spec.model_validate({"training": {"batch_size": 8}})  # as a trainer leaves it
    spec = config.settle(planned).model_dump() | {"validation": None}
    return rows.job(context.sessions, project_id, spec=spec)


def attempt_of(context: Context, job: Job, step: int = 7) -> Attempt:
    claimed = rows.claimed(context.sessions, job.id)
    with context.sessions.begin() as session:
        attempts.renew(session, job.id, claimed.fence, 60, step=step)
    return Attempt(claimed, Path("unused"))


def ended(context: Context, attempt: Attempt, kind: str, **data: Any) -> Job:
    attempt.outcome = (kind, data)
    jobs.end(context, attempt)
    return rows.read(context.sessions, attempt.job.id)


def test_a_run_that_changes_its_spec_is_queued_again(context: Context, job: Job) -> None:
    changes = {"training": {"learning_rate": 1e-4}}
    again = ended(
        context,
        attempt_of(context, job),
        "again",
        cause="exploding",
        message="It exploded.",
        changes=changes,
        from_start=False,
    )
    assert (again.status, again.crashes) == (JobStatus.QUEUED, 0)
    assert again.recoveries == [{"step": 7, "cause": "exploding", "changes": changes}]
    assert again.spec["training"]["learning_rate"] == 1e-4


def test_a_trainer_killed_twice_at_one_step_gets_on_with_less_memory(context: Context, job: Job) -> None:
    killed = {"why": "it was killed", "exit_code": -signal.SIGKILL}
    first = ended(context, attempt_of(context, job), "crash", **killed)
    assert (first.crashes, first.recoveries) == (1, [])
    again = attempt_of(context, job)
    again.training = True
    second = ended(context, again, "crash", **killed)
    assert (second.status, second.crashes) == (JobStatus.QUEUED, 1)
    assert second.spec["training"]["batch_size"] == 4
    assert second.recoveries[0]["cause"] == "out_of_memory"


@pytest.mark.parametrize(
    ("exit_code", "step", "training"),
    [
        (-signal.SIGKILL, 8, True),
        (-signal.SIGSEGV, 7, True),
        (1, 7, True),
        (None, 7, True),
        (-signal.SIGKILL, 7, False),  # while it loaded the model, or in the proof
    ],
)
def test_other_ends_say_nothing_about_the_memory_of_the_training(
    context: Context, job: Job, exit_code: int | None, step: int, training: bool
) -> None:
    ended(context, attempt_of(context, job), "crash", why="it was killed", exit_code=-signal.SIGKILL)
    again = attempt_of(context, job, step)
    again.training = training
    second = ended(context, again, "crash", why="it fell", exit_code=exit_code)
    assert (second.crashes, second.recoveries) == (2, [])


@pytest.mark.parametrize(
    ("asked", "status", "event"),
    [
        (["pause"], "paused", "paused"),
        (["cancel"], "cancelled", "cancelled"),
        (["pause", "cancel"], "cancelled", "cancelled"),
        (["pause", "resume"], "queued", "released"),
        ([], "queued", "released"),
    ],
)
def test_a_trainer_that_left_leaves_the_job_as_it_is_wanted_now(
    context: Context, job: Job, asked: list[str], status: str, event: str
) -> None:
    attempt = attempt_of(context, job)
    for what in asked:
        with context.sessions.begin() as session:
            getattr(control, what)(session, job.project_id, job.id)
    context.stopping.set()  # a worker that shuts down forgets no pause
    assert ended(context, attempt, "stopped").status == status
    with context.sessions() as session:
        assert events.after(session, job.id, 0)[-1].type == event


def stored_rows(context: Context, project_id: str, tmp_path: Path, size: int) -> Dataset:
    file = tmp_path / "rows"
    file.write_bytes(b"x" * size)
    dataset = rows.dataset(context.sessions, project_id, sha256=sha256(file))
    context.storage.put(file, dataset.key)
    return dataset


def test_a_full_disk_of_the_work_folder_is_said_and_not_tried_again(
    context: Context, job: Job, project_id: str, small_disk: Path, tmp_path: Path
) -> None:
    dataset = stored_rows(context, project_id, tmp_path, 2 * 1024**2)
    with context.sessions.begin() as session:
        session.get_one(Job, job.id).dataset_id = dataset.id
    full = Context(
        **{**vars(context), "settings": Settings(home=small_disk, storage_url=context.storage.url)}
    )
    jobs.run(full)
    ended = rows.read(context.sessions, job.id)
    assert (ended.status, ended.crashes) == (JobStatus.FAILED, 0)
    assert ended.error is not None
    assert ended.error["code"] == "storage_full"


def test_what_the_worker_met_stands_in_the_event(
    context: Context, job: Job, project_id: str, tmp_path: Path
) -> None:
    dataset = stored_rows(context, project_id, tmp_path, 10)
    place = context.storage.local(dataset.key)
    assert place is not None
    place.unlink()
    place.mkdir()
    with context.sessions.begin() as session:
        session.get_one(Job, job.id).dataset_id = dataset.id
    jobs.run(context)
    with context.sessions() as session:
        event = events.latest(session, job.id, "crashed")
    assert event is not None
    assert "because the worker met IsADirectoryError: [Errno 21] Is a directory: " in event.message


# ---- The adapter to continue from


@pytest.fixture
def adapter_id(context: Context, project_id: str, tmp_path: Path) -> str:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (folder / name).write_text(name)
    row = rows.adapter(project_id, files=[dict(info) for info in describe(folder)])
    context.storage.put_folder(folder, f"{row.key}/files", [info["path"] for info in row.files])
    with context.sessions.begin() as session:
        session.add(row)
    return row.id


def test_the_adapter_to_continue_from_is_brought(
    context: Context, job: Job, adapter_id: str, tmp_path: Path
) -> None:
    folder, _ = artifacts.fetch_adapter(context, job, adapter_id, tmp_path / "start")
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_that_is_missing_foreign_or_damaged_is_not_trained_on(
    context: Context, job: Job, adapter_id: str, tmp_path: Path
) -> None:
    foreign = rows.job(context.sessions, rows.project(context.sessions, "theirs"))
    for asked, name in ((job, "ad_none"), (foreign, adapter_id)):
        with pytest.raises(NotFound) as caught:
            artifacts.fetch_adapter(context, asked, name, tmp_path / "start")
        assert caught.value.code == "adapter_not_found"
    weights = context.storage.local(f"adapters/{adapter_id}/files/adapter_model.safetensors")
    assert weights is not None
    weights.write_text("x")
    with pytest.raises(GraftError) as damaged:
        artifacts.fetch_adapter(context, job, adapter_id, tmp_path / "start")
    assert damaged.value.code == "adapter_damaged"
