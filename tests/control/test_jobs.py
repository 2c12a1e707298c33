"""A job from the outside: created, listed, cancelled, deleted."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from core.control import adapters, datasets, exports, jobs
from core.control.db import Sessions
from core.control.running import attempts, events
from core.control.tables import (
    Adapter,
    Asked,
    Checkpoint,
    IdempotencyKey,
    Job,
    JobEvent,
    JobMetric,
    JobStatus,
)
from core.errors import BadRequest, Conflict, GraftError, NotFound
from tests.control import rows


@pytest.fixture
def project_id(sessions: Sessions) -> str:
    return rows.project(sessions)


def told(sessions: Sessions, job_id: str) -> list[str]:
    with sessions() as session:
        return [event.type for event in events.after(session, job_id, 0)]


def test_a_new_job_is_queued_and_says_so(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id, labels={"team": "a"})
    assert (job.status, job.attempt, job.fence, job.crashes) == (JobStatus.QUEUED, 0, 0, 0)
    assert told(sessions, job.id) == ["created"]


def test_cancelling_a_queued_job_ends_it_at_once(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    for _ in range(2):
        with sessions.begin() as session:
            assert jobs.cancel(session, project_id, job.id).status == JobStatus.CANCELLED
    assert told(sessions, job.id) == ["created", "cancelled"]
    assert rows.read(sessions, job.id).finished_at is not None
    with sessions.begin() as session:
        assert attempts.claim(session, job.id, "w1", 60) is None


def test_cancelling_a_running_job_asks_its_worker(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    fence = rows.claimed(sessions, job.id).fence
    with sessions.begin() as session:
        assert attempts.renew(session, job.id, fence, 60) is None
    for _ in range(2):
        with sessions.begin() as session:
            assert jobs.cancel(session, project_id, job.id).status == JobStatus.RUNNING
    with sessions.begin() as session:
        assert attempts.renew(session, job.id, fence, 60) is Asked.CANCEL
        attempts.release(session, job.id, fence, "The trainer left.")
    assert told(sessions, job.id) == ["created", "started", "cancel_requested", "cancelled"]
    ended = rows.read(sessions, job.id)
    assert (ended.status, ended.owner, ended.lease_until) == (JobStatus.CANCELLED, None, None)


def test_a_job_that_has_ended_cannot_be_cancelled(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    fence = rows.claimed(sessions, job.id).fence
    with sessions.begin() as session:
        attempts.fail(session, job.id, fence, GraftError("broken", "It broke."))
    with pytest.raises(Conflict) as caught, sessions.begin() as session:
        jobs.cancel(session, project_id, job.id)
    assert caught.value.code == "job_finished"
    assert rows.read(sessions, job.id).asked is None


# ---- Pause and resume


def released(sessions: Sessions, job_id: str, fence: int) -> str:
    """The trainer has left; what becomes of the job."""
    with sessions.begin() as session:
        attempts.release(session, job_id, fence, "The trainer left.")
    return rows.read(sessions, job_id).status


def ask(sessions: Sessions, project_id: str, job_id: str, what: str) -> Job:
    with sessions.begin() as session:
        job: Job = getattr(jobs, what)(session, project_id, job_id)
        return job


def test_a_queued_job_is_paused_at_once_and_resumed(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    for _ in range(2):
        assert ask(sessions, project_id, job.id, "pause").status == JobStatus.PAUSED
    with sessions.begin() as session:
        assert attempts.claim_next(session, "w1", 60) is None
        assert attempts.unsent(session, 10) == []
    for _ in range(2):
        assert ask(sessions, project_id, job.id, "resume").status == JobStatus.QUEUED
    assert told(sessions, job.id) == ["created", "paused", "resume_requested"]
    assert rows.claimed(sessions, job.id).attempt == 1


def test_a_running_job_is_paused_when_its_trainer_has_left(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    fence = rows.claimed(sessions, job.id).fence
    for _ in range(2):
        assert ask(sessions, project_id, job.id, "pause").status == JobStatus.RUNNING
    with sessions.begin() as session:
        assert attempts.renew(session, job.id, fence, 60) is Asked.PAUSE
    assert released(sessions, job.id, fence) == JobStatus.PAUSED
    paused = rows.read(sessions, job.id)
    assert (paused.owner, paused.lease_until, paused.asked, paused.finished_at) == (None, None, None, None)
    assert ask(sessions, project_id, job.id, "pause").status == JobStatus.PAUSED
    assert told(sessions, job.id) == ["created", "started", "pause_requested", "paused"]


def test_a_pause_that_is_taken_back_leaves_the_job_running(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    fence = rows.claimed(sessions, job.id).fence
    ask(sessions, project_id, job.id, "pause")
    assert ask(sessions, project_id, job.id, "resume").status == JobStatus.RUNNING
    with sessions.begin() as session:
        assert attempts.renew(session, job.id, fence, 60) is None
    assert released(sessions, job.id, fence) == JobStatus.QUEUED


def test_a_resume_never_leaves_a_job_paused_whenever_it_comes(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(15):
            fence = rows.claimed(sessions, job.id).fence
            ask(sessions, project_id, job.id, "pause")
            leaving = threads.submit(released, sessions, job.id, fence)
            coming = threads.submit(ask, sessions, project_id, job.id, "resume")
            leaving.result()
            coming.result()
            now = rows.read(sessions, job.id)
            assert (now.status, now.asked) == (JobStatus.QUEUED, None)


def test_a_cancel_wins_over_a_pause(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    fence = rows.claimed(sessions, job.id).fence
    ask(sessions, project_id, job.id, "pause")
    ask(sessions, project_id, job.id, "cancel")
    for late in ("pause", "resume"):
        with pytest.raises(Conflict) as caught:
            ask(sessions, project_id, job.id, late)
        assert caught.value.code == "job_cancelling"
    assert released(sessions, job.id, fence) == JobStatus.CANCELLED


def test_a_paused_job_is_cancelled_at_once(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    ask(sessions, project_id, job.id, "pause")
    assert ask(sessions, project_id, job.id, "cancel").status == JobStatus.CANCELLED
    assert rows.read(sessions, job.id).finished_at is not None


def test_a_paused_job_is_unfinished_and_keeps_its_data(sessions: Sessions, project_id: str) -> None:
    data = rows.dataset(sessions, project_id)
    job = rows.job(sessions, project_id, dataset_id=data.id)
    ask(sessions, project_id, job.id, "pause")
    with pytest.raises(Conflict) as caught, sessions.begin() as session:
        jobs.remove(session, project_id, job.id)
    assert caught.value.code == "job_not_finished"
    with pytest.raises(Conflict) as caught, sessions.begin() as session:
        datasets.delete(session, project_id, data.id)
    assert caught.value.code == "dataset_in_use"


# ---- Retry


@pytest.fixture
def failed(sessions: Sessions, project_id: str) -> Job:
    """A job that failed at step 12, with a checkpoint of step 10."""
    data = rows.dataset(sessions, project_id)
    job = rows.job(sessions, project_id, dataset_id=data.id)
    rows.claimed(sessions, job.id)
    with sessions.begin() as session:
        attempts.crash(session, job.id, 1, "it fell", code="worker_lost", max_crashes=5)
    fence = rows.claimed(sessions, job.id).fence
    with sessions.begin() as session:
        attempts.renew(session, job.id, fence, 60, step=12, metrics={"train_loss": 1.0})
        events.measure(session, job.id, 10, {"loss": 1.0})
        events.add_checkpoint(session, job.id, 10, "a key", [], {})
        attempts.fail(session, job.id, fence, GraftError("broken", "It broke."))
    return rows.read(sessions, job.id)


def retry(sessions: Sessions, job: Job, changes: dict[str, Any] | None = None) -> bool:
    """Whether it goes on from its checkpoint."""
    with sessions.begin() as session:
        return jobs.retry(session, job.project_id, job.id, changes or {}).checkpoint_spec is None


def test_a_failed_job_is_retried_from_its_checkpoint(sessions: Sessions, failed: Job) -> None:
    assert retry(sessions, failed, {"training": {"learning_rate": 0.001}, "limits": {"max_seconds": 60}})
    job = rows.read(sessions, failed.id)
    assert (job.status, job.error, job.finished_at, job.crashes, job.step) == ("queued", None, None, 0, 12)
    assert (job.spec["training"]["learning_rate"], job.spec["limits"]["max_seconds"]) == (0.001, 60)
    with sessions() as session:
        event = events.latest(session, job.id, "retried")
        assert [row.step for row in events.checkpoints(session, job.id)] == [10]
        assert attempts.unsent(session, 10) == [job.id]
    assert event is not None
    assert event.message == "Retried with changes; the job goes on from the checkpoint of step 10."
    assert event.data is not None
    assert event.data["changes"]["training.learning_rate"] == 0.001
    assert rows.claimed(sessions, job.id).attempt == 3


def test_changes_that_no_checkpoint_fits_start_the_job_over(sessions: Sessions, failed: Job) -> None:
    assert not retry(sessions, failed, {"lora": {"r": 4}})
    job = rows.read(sessions, failed.id)
    assert (job.status, job.step, job.metrics) == ("queued", 0, {})
    with sessions() as session:
        event = events.latest(session, job.id, "retried")
    assert event is not None
    assert "from the beginning: its checkpoints do not fit the new lora.r" in event.message


def test_changes_that_cannot_be_are_taken_back_without_a_loss(sessions: Sessions, failed: Job) -> None:
    assert not retry(sessions, failed, {"lora": {"r": 4}})
    fence = rows.claimed(sessions, failed.id).fence
    with sessions.begin() as session:
        attempts.fail(session, failed.id, fence, GraftError("broken", "It was broken again."))
    assert not retry(sessions, failed, {"training": {"learning_rate": 0.001}})  # still of another rank
    with sessions.begin() as session:
        jobs.cancel(session, failed.project_id, failed.id)
    assert retry(sessions, failed, {"lora": {"r": 16}})
    with sessions() as session:
        assert [row.step for row in events.checkpoints(session, failed.id)] == [10]


def test_a_retry_is_judged_by_the_run_that_made_the_checkpoints(sessions: Sessions, failed: Job) -> None:
    changes = {"training": {"epochs": 2, "learning_rate": 0.001}}
    with sessions.begin() as session:
        for kind, steps in (("plan", 5), ("checkpoint", 0), ("plan", 50)):
            events.add(session, failed.id, kind, "Of step 10.", data={"steps_per_epoch": steps})
    assert not retry(sessions, failed, changes)  # all ten steps were done at another rate
    for _ in range(2):
        with sessions.begin() as session:
            jobs.cancel(session, failed.project_id, failed.id)
        assert not retry(sessions, failed)


@pytest.mark.parametrize(("epochs", "fits"), [(2, True), (1, False)])
def test_a_checkpoint_beyond_a_new_end_in_epochs_is_not_used(
    sessions: Sessions, failed: Job, epochs: int, fits: bool
) -> None:
    with sessions.begin() as session:
        events.add(session, failed.id, "plan", "Planned.", data={"steps_per_epoch": 6})
    assert retry(sessions, failed, {"training": {"epochs": epochs, "learning_rate": 0.001}}) is fits


def test_a_retry_can_be_asked_for_twice_but_not_with_other_changes(sessions: Sessions, failed: Job) -> None:
    changes = {"training": {"learning_rate": 0.001, "batch_size": "auto"}}
    for status in ("queued", "queued", "running"):
        if status == "running":
            rows.claimed(sessions, failed.id)
        retry(sessions, failed, changes)
        assert rows.read(sessions, failed.id).status == status
    assert told(sessions, failed.id).count("retried") == 1
    with pytest.raises(Conflict) as caught:
        retry(sessions, failed, {"training": {"learning_rate": 0.5}})
    assert caught.value.code == "job_not_finished"


def test_a_paused_job_is_resumed_and_not_retried(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    ask(sessions, project_id, job.id, "pause")
    with pytest.raises(Conflict) as caught:
        retry(sessions, job)
    assert caught.value.hint is not None
    assert "/resume" in caught.value.hint


def test_changes_that_do_not_go_with_the_rest_change_nothing(sessions: Sessions, failed: Job) -> None:
    with pytest.raises(BadRequest) as caught:
        retry(sessions, failed, {"training": {"batch_size": 3}})
    assert caught.value.param == "training"
    assert rows.read(sessions, failed.id).status == JobStatus.FAILED


def test_a_job_whose_data_is_gone_is_not_retried(sessions: Sessions, failed: Job) -> None:
    assert failed.dataset_id is not None
    with sessions.begin() as session:
        datasets.delete(session, failed.project_id, failed.dataset_id)
    with pytest.raises(NotFound) as caught:
        retry(sessions, failed)
    assert caught.value.code == "dataset_not_found"


@pytest.mark.parametrize("kind", ["continue", "export"])
def test_a_job_whose_adapter_is_gone_is_not_retried(sessions: Sessions, project_id: str, kind: str) -> None:
    adapter = rows.adapter(project_id)
    with sessions.begin() as session:
        session.add(adapter)
        session.flush()
        job, _ = exports.ask(session, project_id, adapter.id, "merged", idempotency_key=None)
    if kind == "continue":
        job = rows.job(sessions, project_id, dataset_id=None, spec=rows.SPEC | {"continue_from": adapter.id})
    fence = rows.claimed(sessions, job.id).fence
    with sessions.begin() as session:
        attempts.fail(session, job.id, fence, GraftError("broken", "It broke."))
        for other in session.scalars(select(Job).where(Job.id != job.id)):
            jobs.cancel(session, project_id, other.id)
        session.flush()
        adapters.delete(session, project_id, adapter.id)
    with pytest.raises(NotFound) as caught:
        retry(sessions, job)
    assert caught.value.code == "adapter_not_found"
    assert rows.read(sessions, job.id).status == JobStatus.FAILED


def test_an_export_is_retried_without_changes_only(sessions: Sessions, project_id: str) -> None:
    adapter = rows.adapter(project_id)
    with sessions.begin() as session:
        session.add(adapter)
        session.flush()
        job, _ = exports.ask(session, project_id, adapter.id, "merged", idempotency_key=None)
    with pytest.raises(BadRequest, match="An export has no spec"):
        retry(sessions, job, {"seed": 1})  # also while it waits


def test_a_job_that_succeeded_is_neither_paused_nor_resumed_nor_retried(
    sessions: Sessions, project_id: str
) -> None:
    job = rows.job(sessions, project_id)
    fence = rows.claimed(sessions, job.id).fence
    with sessions.begin() as session:
        attempts.succeed(session, job.id, fence, rows.adapter(project_id, job.id))
    for what in ("pause", "resume"):
        with pytest.raises(Conflict) as caught:
            ask(sessions, project_id, job.id, what)
        assert caught.value.code == "job_finished"
    with pytest.raises(Conflict) as caught:
        retry(sessions, job)
    assert caught.value.code == "job_finished"


# ---- Delete


def test_only_a_finished_job_is_deleted_and_takes_its_traces_along(
    sessions: Sessions, project_id: str
) -> None:
    job, other = rows.job(sessions, project_id), rows.job(sessions, project_id)
    fence = rows.claimed(sessions, job.id).fence
    adapter = rows.adapter(project_id, job.id)
    with sessions.begin() as session:
        events.measure(session, job.id, 1, {"loss": 1.0})
        events.add_checkpoint(session, job.id, 1, "key", [], {})
        jobs.remember(session, project_id, "key", "sha", job.id)
    with pytest.raises(Conflict) as caught, sessions.begin() as session:
        jobs.remove(session, project_id, job.id)
    assert caught.value.code == "job_not_finished"
    with sessions.begin() as session:
        attempts.succeed(session, job.id, fence, adapter)
    with sessions.begin() as session:
        jobs.remove(session, project_id, job.id)
    with sessions() as session:
        with pytest.raises(NotFound):
            jobs.get(session, project_id, job.id)
        for table in (JobMetric, Checkpoint, IdempotencyKey):
            assert session.scalar(select(func.count()).select_from(table)) == 0
        assert session.scalars(select(JobEvent.job_id)).all() == [other.id]
        assert session.get_one(Adapter, adapter.id).job_id is None


def test_an_adapter_goes_with_its_job_only_if_asked(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    adapter = rows.adapter(project_id, job.id)
    with sessions.begin() as session:
        attempts.succeed(session, job.id, rows.claimed(sessions, job.id).fence, adapter)
    with sessions.begin() as session:
        keys = jobs.remove(session, project_id, job.id, with_adapter=True)
    assert keys == [f"jobs/{job.id}", adapter.key]
    with sessions() as session:
        assert session.get(Adapter, adapter.id) is None


@pytest.mark.parametrize("what", ["remove", "retry"])
def test_a_job_that_is_deleted_while_somebody_waits_for_it_is_not_found(
    sessions: Sessions, failed: Job, what: str
) -> None:
    def wait() -> None:
        with sessions.begin() as session:
            if what == "remove":
                jobs.remove(session, failed.project_id, failed.id)
            else:
                jobs.retry(session, failed.project_id, failed.id, {})

    with ThreadPoolExecutor(1) as other:
        with sessions.begin() as session:
            jobs.remove(session, failed.project_id, failed.id)
            waiting = other.submit(wait)
            time.sleep(0.3)
        with pytest.raises(NotFound):
            waiting.result(30)


def test_an_adapter_that_is_deleted_is_not_its_jobs_any_more(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    adapter = rows.adapter(project_id, job.id)
    with sessions.begin() as session:
        attempts.succeed(session, job.id, rows.claimed(sessions, job.id).fence, adapter)
    assert rows.read(sessions, job.id).adapter_id == adapter.id
    with sessions.begin() as session:
        adapters.delete(session, project_id, adapter.id)
    assert rows.read(sessions, job.id).adapter_id is None


@pytest.mark.parametrize("kind", ["continue", "export"])
def test_an_adapter_that_an_unfinished_job_needs_is_not_deleted(
    sessions: Sessions, project_id: str, kind: str
) -> None:
    job = rows.job(sessions, project_id)
    adapter = rows.adapter(project_id, job.id)
    with sessions.begin() as session:
        attempts.succeed(session, job.id, rows.claimed(sessions, job.id).fence, adapter)
    if kind == "continue":
        user = rows.job(sessions, project_id, spec=rows.SPEC | {"continue_from": adapter.id})
    else:
        with sessions.begin() as session:
            user, _ = exports.ask(session, project_id, adapter.id, "merged", idempotency_key=None)
    for remove in (
        lambda session: adapters.delete(session, project_id, adapter.id),
        lambda session: jobs.remove(session, project_id, job.id, with_adapter=True),
    ):
        with pytest.raises(Conflict) as caught, sessions.begin() as session:
            remove(session)
        assert caught.value.code == "adapter_in_use"
        assert user.id in caught.value.message
    assert rows.read(sessions, job.id).status == JobStatus.SUCCEEDED
    ask(sessions, project_id, user.id, "cancel")
    with sessions.begin() as session:
        adapters.delete(session, project_id, adapter.id)


# ---- Lists


def listed(sessions: Sessions, project_id: str, **wanted: object) -> list[str]:
    options = {"limit": 10, "after": None, "status": None, "labels": {}} | wanted
    with sessions() as session:
        return [job.id for job in jobs.page(session, project_id, **options)]  # type: ignore[arg-type]


def test_pages_are_newest_first_and_tell_of_more(sessions: Sessions, project_id: str) -> None:
    made = [rows.job(sessions, project_id).id for _ in range(5)][::-1]
    assert listed(sessions, project_id, limit=2) == made[:3]
    assert listed(sessions, project_id, limit=2, after=made[1]) == made[2:5]
    assert listed(sessions, project_id, limit=2, after=made[4]) == []


def test_jobs_are_chosen_by_status_and_metadata(sessions: Sessions, project_id: str) -> None:
    one = rows.job(sessions, project_id, labels={"team": "a", "run": "1"}).id
    two = rows.job(sessions, project_id, labels={"team": "a", "run": "2"}).id
    three = rows.job(sessions, project_id, labels={"team": "b", "a.b": "x y"}).id
    rows.claimed(sessions, two)
    assert listed(sessions, project_id, labels={"team": "a"}) == [two, one]
    assert listed(sessions, project_id, labels={"team": "a", "run": "1"}) == [one]
    assert listed(sessions, project_id, labels={"a.b": "x y"}) == [three]
    assert listed(sessions, project_id, labels={"nobody": "has it"}) == []
    assert listed(sessions, project_id, status=JobStatus.RUNNING) == [two]
    assert listed(sessions, project_id, status=JobStatus.QUEUED, labels={"team": "a"}) == [one]


@pytest.mark.parametrize("name", ["a'b", "$", "a.b", "a[0]", "0", "été", ""])
def test_any_name_of_metadata_can_be_asked_for(sessions: Sessions, project_id: str, name: str) -> None:
    job = rows.job(sessions, project_id, labels={name: "yes"})
    rows.job(sessions, project_id, labels={"other": "yes"})
    assert listed(sessions, project_id, labels={name: "yes"}) == [job.id]


def positions(sessions: Sessions, *made: Job) -> list[int | None]:
    with sessions() as session:
        found = jobs.positions(session, made)
    return [found.get(job.id) for job in made]


def test_the_position_counts_the_queued_jobs_before(sessions: Sessions, project_id: str) -> None:
    first, second, third = (rows.job(sessions, project_id) for _ in range(3))
    assert positions(sessions, first, second, third) == [0, 1, 2]
    taken = rows.claimed(sessions, first.id)
    assert positions(sessions, taken, second, third) == [None, 0, 1]
    assert positions(sessions, third) == [1]


def test_a_job_that_left_the_queue_since_it_was_read_has_a_position(
    sessions: Sessions, project_id: str
) -> None:
    job = rows.job(sessions, project_id)
    rows.claimed(sessions, job.id)
    assert positions(sessions, job) == [0]


def test_a_higher_priority_comes_before(sessions: Sessions, project_id: str) -> None:
    made = [rows.job(sessions, project_id, priority=priority) for priority in (0, 0, 3)]
    assert positions(sessions, *made) == [1, 2, 0]


# ---- Idempotency


def test_the_same_request_gives_the_job_it_made_before(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    other = rows.project(sessions, "theirs")
    with sessions.begin() as session:
        jobs.remember(session, project_id, "key", "sha", job.id)
    with sessions() as session:
        found = jobs.replay(session, project_id, "key", "sha")
        assert found is not None
        assert found.id == job.id
        assert jobs.replay(session, project_id, "another", "sha") is None
        assert jobs.replay(session, other, "key", "sha") is None
        with pytest.raises(Conflict) as caught:
            jobs.replay(session, project_id, "key", "other body")
    assert caught.value.code == "idempotency_conflict"


def test_one_key_makes_one_job(sessions: Sessions, project_id: str) -> None:
    first, second = rows.job(sessions, project_id), rows.job(sessions, project_id)
    with sessions.begin() as session:
        jobs.remember(session, project_id, "key", "sha", first.id)
    with pytest.raises(IntegrityError), sessions.begin() as session:
        jobs.remember(session, project_id, "key", "sha", second.id)


# ---- Events, metrics, checkpoints


def test_events_are_read_forwards_and_backwards(sessions: Sessions, project_id: str) -> None:
    job, other = rows.job(sessions, project_id), rows.job(sessions, project_id)
    with sessions.begin() as session:
        for i in range(5):
            events.add(session, job.id, "note", str(i), data={"i": i})
            events.add(session, other.id, "note", "not ours")
    with sessions() as session:
        forwards = events.after(session, job.id, 0)
        assert [event.message for event in forwards[1:]] == ["0", "1", "2", "3", "4"]
        assert [event.message for event in events.after(session, job.id, forwards[3].id)] == ["3", "4"]
        backwards = events.page(session, job.id, limit=2, before=None)
        assert [event.message for event in backwards] == ["4", "3", "2"]
        more = events.page(session, job.id, limit=2, before=backwards[1].id)
        assert [event.message for event in more] == ["2", "1", "0"]


def test_metrics_of_a_step_are_joined_and_those_done_again_replaced(
    sessions: Sessions, project_id: str
) -> None:
    job = rows.job(sessions, project_id)
    with sessions.begin() as session:
        for step in (3, 1, 2):
            events.measure(session, job.id, step, {"loss": float(step)})
        events.measure(session, job.id, 2, {"eval_loss": 0.5})
        events.measure(session, job.id, 1, {"loss": 9.0})
    with sessions.begin() as session:
        events.forget_after(session, job.id, 2)
    with sessions() as session:
        found = events.metrics(session, job.id)
    assert found == [(1, {"loss": 9.0}), (2, {"loss": 2.0, "eval_loss": 0.5})]


def test_the_best_checkpoint_has_the_lowest_validation_loss(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    losses = {1: None, 2: 0.5, 3: 0.25, 4: 0.25, 5: 0.75}
    with sessions.begin() as session:
        for step, loss in losses.items():
            events.add_checkpoint(session, job.id, step, "key", [], {"eval_loss": loss} if loss else {})
    with sessions() as session:
        found = events.checkpoints(session, job.id)
    best = events.best(found)
    assert best is not None
    assert best.step == 3
    assert events.best([row for row in found if row.step == 1]) is None


def test_a_checkpoint_written_again_replaces_the_first(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    with sessions.begin() as session:
        events.add_checkpoint(session, job.id, 5, "a", [{"path": "x"}], {})
        events.add_checkpoint(session, job.id, 10, "b", [], {})
    with sessions.begin() as session:
        events.add_checkpoint(session, job.id, 5, "c", [{"path": "y"}], {"loss": 1.0})
    with sessions.begin() as session:
        found = events.checkpoints(session, job.id)
        assert [(row.step, row.key, row.files) for row in found] == [(10, "b", []), (5, "c", [{"path": "y"}])]
        events.drop_checkpoints(session, found[1:])
    with sessions() as session:
        assert [row.step for row in events.checkpoints(session, job.id)] == [10]
