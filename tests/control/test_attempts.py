"""What workers and the sweep do to a job: nobody may have it twice, and a stale holder writes nothing."""

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, inspect, select, update

from core.control import jobs
from core.control.db import Session, Sessions, now_epoch
from core.control.running import attempts, events
from core.control.tables import Adapter, Job, JobEvent, JobStatus
from core.errors import Fenced, GraftError
from tests.control import rows


@pytest.fixture
def project_id(sessions: Sessions) -> str:
    return rows.project(sessions)


@pytest.fixture
def job_id(sessions: Sessions, project_id: str) -> str:
    return rows.job(sessions, project_id).id


def state(sessions: Sessions, job_id: str) -> dict[str, object]:
    """Every column of a job, and how many events it has."""
    with sessions() as session:
        job = session.get_one(Job, job_id)
        columns = {column.key: getattr(job, column.key) for column in inspect(Job).columns}
        return columns | {"events": session.scalar(select(func.count()).where(JobEvent.job_id == job_id))}


def crash(sessions: Sessions, job_id: str, fence: int, *, max_crashes: int = 5) -> None:
    with sessions.begin() as session:
        attempts.crash(session, job_id, fence, "it fell over", code="worker_lost", max_crashes=max_crashes)


def set_columns(sessions: Sessions, job_id: str, **values: object) -> None:
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def test_eight_workers_never_have_the_same_job(sessions: Sessions, project_id: str) -> None:
    ids = [rows.job(sessions, project_id).id for _ in range(20)]

    def work(worker: int) -> list[tuple[str, int]]:
        mine = random.Random(worker).sample(ids, len(ids))
        taken = []
        for job_id in mine:
            with sessions.begin() as session:
                if job := attempts.claim(session, job_id, f"w{worker}", 60):
                    taken.append((job_id, job.fence))
        return taken

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(work, range(8)))
    taken = Counter(job_id for result in results for job_id, _ in result)
    assert taken == dict.fromkeys(ids, 1)
    assert {fence for result in results for _, fence in result} == {1}
    for worker, result in enumerate(results):
        assert {rows.read(sessions, job_id).owner for job_id, _ in result} <= {f"w{worker}"}


def test_a_claim_starts_an_attempt_under_a_lease(sessions: Sessions, job_id: str) -> None:
    job = rows.claimed(sessions, job_id, owner="w7", lease=60)
    assert (job.status, job.owner, job.attempt, job.fence) == (JobStatus.RUNNING, "w7", 1, 1)
    assert job.started_at is not None
    with sessions() as session:
        left = session.scalars(select(Job.lease_until - now_epoch()).where(Job.id == job_id)).one()
    assert 50 < left <= 60


def test_every_claim_raises_the_fence_and_keeps_the_first_start(sessions: Sessions, job_id: str) -> None:
    started = rows.claimed(sessions, job_id).started_at
    for fence in (1, 2, 3):
        with sessions.begin() as session:
            attempts.release(session, job_id, fence, "The worker stops.")
        again = rows.claimed(sessions, job_id)
        assert (again.fence, again.attempt, again.started_at) == (fence + 1, fence + 1, started)


@pytest.mark.parametrize("unknown", ["", "job_none", "x' OR 1=1 --"])
def test_what_is_no_job_is_not_claimed(sessions: Sessions, job_id: str, unknown: str) -> None:
    with sessions.begin() as session:
        assert attempts.claim(session, unknown, "w1", 60) is None
    assert rows.read(sessions, job_id).status == JobStatus.QUEUED


WRITES: dict[str, Callable[[Session, Job], object]] = {
    "renew": lambda session, job: attempts.renew(session, job.id, 1, 60, step=99, phase="late"),
    "succeed": lambda session, job: attempts.succeed(
        session, job.id, 1, rows.adapter(job.project_id, job.id)
    ),
    "fail": lambda session, job: attempts.fail(session, job.id, 1, GraftError("late", "Late.")),
    "recover": lambda session, job: attempts.recover(
        session, job.id, 1, cause="late", message="Late.", changes={}, from_start=True
    ),
    "release": lambda session, job: attempts.release(session, job.id, 1, "Late."),
    "crash": lambda session, job: attempts.crash(session, job.id, 1, "late", code="late", max_crashes=5),
    "last crash": lambda session, job: attempts.crash(session, job.id, 1, "late", code="late", max_crashes=1),
}


@pytest.mark.parametrize("now", ["claimed by another", "queued again", "over", "cancel asked for", "paused"])
def test_a_stale_holder_is_fenced_and_changes_nothing(sessions: Sessions, job_id: str, now: str) -> None:
    job = rows.claimed(sessions, job_id)
    if now == "over":
        with sessions.begin() as session:
            attempts.fail(session, job_id, 1, GraftError("broken", "It broke."))
    else:
        with sessions.begin() as session:
            attempts.release(session, job_id, 1, "The worker stops.")
        if now not in ("queued again", "paused"):
            rows.claimed(sessions, job_id, owner="w2")
        if now == "paused":
            with sessions.begin() as session:
                jobs.pause(session, job.project_id, job_id)
        if now == "cancel asked for":
            with sessions.begin() as session:
                jobs.cancel(session, job.project_id, job_id)
    before = state(sessions, job_id)
    for name, write in WRITES.items():
        with pytest.raises(Fenced), sessions.begin() as session:
            write(session, job)
        assert state(sessions, job_id) == before, name
    with sessions() as session:
        assert session.scalars(select(Adapter)).all() == []


def test_renewing_prolongs_the_lease_and_writes_the_progress(sessions: Sessions, job_id: str) -> None:
    fence = rows.claimed(sessions, job_id, lease=5).fence
    before = rows.read(sessions, job_id).lease_until
    with sessions.begin() as session:
        attempts.renew(session, job_id, fence, 60, step=3, total_steps=10, metrics={"loss": 0.5})
    after = rows.read(sessions, job_id)
    assert (after.step, after.total_steps, after.metrics) == (3, 10, {"loss": 0.5})
    assert before is not None
    assert after.lease_until is not None
    assert after.lease_until > before + 50


def test_success_brings_the_adapter_and_the_end_together(sessions: Sessions, job_id: str) -> None:
    job = rows.claimed(sessions, job_id)
    adapter = rows.adapter(job.project_id, job_id)
    with sessions.begin() as session:
        attempts.succeed(session, job_id, job.fence, adapter)
    ended = rows.read(sessions, job_id)
    assert (ended.status, ended.adapter_id, ended.owner, ended.phase) == (
        JobStatus.SUCCEEDED,
        adapter.id,
        None,
        None,
    )
    assert ended.finished_at is not None
    with sessions() as session:
        assert session.get_one(Adapter, adapter.id).job_id == job_id


def test_failure_keeps_code_message_and_hint(sessions: Sessions, job_id: str) -> None:
    fence = rows.claimed(sessions, job_id).fence
    with sessions.begin() as session:
        attempts.fail(session, job_id, fence, GraftError("storage_full", "No space.", hint="Free some."))
    ended = rows.read(sessions, job_id)
    assert ended.status == JobStatus.FAILED
    assert ended.error == {"code": "storage_full", "message": "No space.", "hint": "Free some."}


def test_a_release_counts_no_crash_and_is_due_at_once(sessions: Sessions, job_id: str) -> None:
    fence = rows.claimed(sessions, job_id).fence
    with sessions.begin() as session:
        attempts.mark_sent(session, job_id)
        attempts.release(session, job_id, fence, "The worker stops.")
    again = rows.read(sessions, job_id)
    assert (again.status, again.crashes, again.not_before, again.sent_at) == (JobStatus.QUEUED, 0, None, None)
    assert (again.owner, again.lease_until) == (None, None)


def test_crashes_wait_longer_each_time_and_end_in_failure(sessions: Sessions, job_id: str) -> None:
    waits = []
    for _ in range(6):
        set_columns(sessions, job_id, not_before=None)
        crash(sessions, job_id, rows.claimed(sessions, job_id).fence, max_crashes=7)
        with sessions() as session:
            waits.append(session.scalars(select(Job.not_before - now_epoch()).where(Job.id == job_id)).one())
    assert waits[0] is None
    assert [round(wait / 10) * 10 for wait in waits[1:]] == [10, 30, 60, 120, 120]
    set_columns(sessions, job_id, not_before=None)
    crash(sessions, job_id, rows.claimed(sessions, job_id).fence, max_crashes=7)
    ended = rows.read(sessions, job_id)
    assert (ended.status, ended.crashes) == (JobStatus.FAILED, 7)
    assert ended.error is not None
    assert ended.error["code"] == "worker_lost"
    assert ended.error["message"] == "The job broke off 7 times, the last time because it fell over."


def test_a_job_that_is_not_due_is_neither_claimed_nor_sent(sessions: Sessions, job_id: str) -> None:
    for crashes in (1, 2):
        crash(sessions, job_id, rows.claimed(sessions, job_id).fence)
        assert rows.read(sessions, job_id).crashes == crashes
    with sessions.begin() as session:
        assert attempts.claim(session, job_id, "w1", 60) is None
        assert attempts.unsent(session, 10) == []
    set_columns(sessions, job_id, not_before=now_epoch() - 0.1)
    with sessions.begin() as session:
        assert attempts.unsent(session, 10) == [job_id]
        assert attempts.claim(session, job_id, "w1", 60) is not None


def test_a_crash_of_a_job_to_be_cancelled_cancels_it(
    sessions: Sessions, project_id: str, job_id: str
) -> None:
    fence = rows.claimed(sessions, job_id).fence
    with sessions.begin() as session:
        jobs.cancel(session, project_id, job_id)
    crash(sessions, job_id, fence)
    assert rows.read(sessions, job_id).status == JobStatus.CANCELLED


def test_a_crash_of_a_job_to_be_paused_pauses_it(sessions: Sessions, project_id: str, job_id: str) -> None:
    fence = rows.claimed(sessions, job_id).fence
    with sessions.begin() as session:
        jobs.pause(session, project_id, job_id)
    crash(sessions, job_id, fence, max_crashes=1)
    paused = rows.read(sessions, job_id)
    assert (paused.status, paused.crashes, paused.asked, paused.owner) == (JobStatus.PAUSED, 1, None, None)
    assert lost(sessions, ["w1"]) == []
    with sessions.begin() as session:
        assert attempts.unsent(session, 10) == []
        jobs.resume(session, project_id, job_id)
        assert attempts.unsent(session, 10) == [job_id]


# ---- A run that changes its own spec


def recover(sessions: Sessions, job_id: str, changes: dict[str, object], **options: object) -> list[str]:
    fence = rows.claimed(sessions, job_id).fence
    told: dict[str, object] = {"cause": "divergence", "message": "The loss exploded.", "from_start": False}
    with sessions.begin() as session:
        attempts.renew(session, job_id, fence, 60, step=7)
        return list(attempts.recover(session, job_id, fence, changes=changes, **(told | options)))  # type: ignore[arg-type]


def test_a_recovery_changes_the_spec_and_counts_no_crash(sessions: Sessions, job_id: str) -> None:
    with sessions.begin() as session:
        events.add_checkpoint(session, job_id, 5, "key", [], {})
    changes: dict[str, object] = {"training": {"learning_rate": 0.0001}}
    assert recover(sessions, job_id, changes) == []
    job = rows.read(sessions, job_id)
    assert (job.status, job.crashes, job.step, job.not_before, job.sent_at) == ("queued", 0, 7, None, None)
    assert job.recoveries == [{"step": 7, "cause": "divergence", "changes": changes}]
    assert job.spec["training"]["learning_rate"] == 0.0001
    assert (job.spec["seed"], job.spec["validation"]) == (42, None)
    with sessions() as session:
        last = events.latest(session, job_id, "recovered")
        assert last is not None
        assert (last.level, last.message) == ("warning", "The loss exploded.")
        assert len(events.checkpoints(session, job_id)) == 1


def test_a_recovery_from_the_start_drops_what_was_learnt(sessions: Sessions, job_id: str) -> None:
    with sessions.begin() as session:
        events.add_checkpoint(session, job_id, 5, "a key", [], {})
        events.measure(session, job_id, 5, {"loss": 1.0})
    assert recover(sessions, job_id, {}, from_start=True) == ["a key"]
    assert rows.read(sessions, job_id).step == 0
    with sessions() as session:
        assert events.checkpoints(session, job_id) == []
        assert events.metrics(session, job_id) == []


def test_a_run_changes_its_spec_eight_times_at_most(sessions: Sessions, job_id: str) -> None:
    for _ in range(8):
        recover(sessions, job_id, {"training": {"learning_rate": 0.0001}})
        assert rows.read(sessions, job_id).status == JobStatus.QUEUED
    recover(sessions, job_id, {}, cause="out_of_memory", message="No memory.")
    job = rows.read(sessions, job_id)
    assert (job.status, len(job.recoveries)) == (JobStatus.FAILED, 8)
    assert job.error is not None
    assert job.error["code"] == "out_of_memory"
    assert job.error["message"].startswith("No memory.")


def test_a_recovery_that_cannot_be_fails_the_job(sessions: Sessions, job_id: str) -> None:
    recover(sessions, job_id, {"training": {"batch_size": 3}})
    job = rows.read(sessions, job_id)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert "multiple of batch_size" in job.error["message"]


@pytest.mark.parametrize(("ask", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_what_a_client_asks_comes_before_a_recovery(
    sessions: Sessions, project_id: str, job_id: str, ask: str, status: str
) -> None:
    fence = rows.claimed(sessions, job_id).fence
    with sessions.begin() as session:
        getattr(jobs, ask)(session, project_id, job_id)
        changes = {"training": {"learning_rate": 0.0001}}
        attempts.recover(session, job_id, fence, cause="x", message="x", changes=changes, from_start=False)
    assert rows.read(sessions, job_id).status == status


# ---- The queue


def test_the_highest_priority_comes_first_then_the_oldest(sessions: Sessions, project_id: str) -> None:
    low, first, second, high = (
        rows.job(sessions, project_id, priority=priority).id for priority in (-1, 0, 0, 5)
    )
    later = rows.job(sessions, project_id, priority=9).id
    set_columns(sessions, later, not_before=now_epoch() + 60)
    with sessions() as session:
        assert attempts.unsent(session, 10) == [high, first, second, low]
    taken = []
    while True:
        with sessions.begin() as session:
            if (job := attempts.claim_next(session, "w1", 60)) is None:
                break
            taken.append(job.id)
    assert taken == [high, first, second, low]


def test_eight_workers_empty_the_queue_and_nothing_is_left_over(sessions: Sessions, project_id: str) -> None:
    ids = [rows.job(sessions, project_id, priority=i % 3).id for i in range(20)]

    def work(worker: int) -> list[str]:
        taken = []
        for _ in range(len(ids) // 8 + 1):  # as many messages as there are jobs, and a few more
            with sessions.begin() as session:
                if job := attempts.claim_next(session, f"w{worker}", 60):
                    taken.append(job.id)
        return taken

    with ThreadPoolExecutor(8) as threads:
        taken = [job_id for result in threads.map(work, range(8)) for job_id in result]
    assert sorted(taken) == sorted(ids)


# ---- The sweep


def lost(sessions: Sessions, dead: list[str] | None = None) -> list[str]:
    with sessions() as session:
        return [job.id for job in attempts.lost(session, dead or [])]


def test_a_lease_that_is_over_is_seen(sessions: Sessions, job_id: str) -> None:
    fence = rows.claimed(sessions, job_id, lease=60).fence
    for seconds, over in ((60, []), (0.1, [job_id]), (60, [])):
        with sessions.begin() as session:
            attempts.renew(session, job_id, fence, seconds)
        time.sleep(0.2)
        assert lost(sessions) == over


def test_the_databases_clock_says_when_a_lease_is_over(sessions: Sessions, job_id: str) -> None:
    rows.claimed(sessions, job_id, lease=1000)
    set_columns(sessions, job_id, lease_until=now_epoch() - 0.001)
    assert lost(sessions) == [job_id]
    set_columns(sessions, job_id, lease_until=now_epoch() + 5)
    assert lost(sessions) == []


def test_the_job_of_a_dead_worker_is_lost_at_once(sessions: Sessions, job_id: str) -> None:
    rows.claimed(sessions, job_id, owner="w1", lease=1000)
    assert lost(sessions, ["w2"]) == []
    assert lost(sessions, ["w2", "w1"]) == [job_id]


def test_a_job_that_does_not_run_is_never_lost(sessions: Sessions, project_id: str, job_id: str) -> None:
    fence = rows.claimed(sessions, job_id, lease=0).fence
    with sessions.begin() as session:
        attempts.fail(session, job_id, fence, GraftError("broken", "It broke."))
    rows.job(sessions, project_id)
    assert lost(sessions, ["w1"]) == []


def test_messages_never_sent_or_long_unanswered_are_sent_oldest_first(
    sessions: Sessions, project_id: str
) -> None:
    new, sent, stale, running = (rows.job(sessions, project_id).id for _ in range(4))
    rows.claimed(sessions, running)
    with sessions.begin() as session:
        attempts.mark_sent(session, sent)
        attempts.mark_sent(session, stale)
    set_columns(sessions, stale, sent_at=now_epoch() - 31)
    with sessions() as session:
        assert attempts.unsent(session, 10) == [new, stale]
        assert attempts.unsent(session, 1) == [new]
