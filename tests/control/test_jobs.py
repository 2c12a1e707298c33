"""A job from the outside: created, listed, cancelled, deleted."""

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from core.control import attempts, events, jobs
from core.control.db import Sessions
from core.control.tables import Adapter, Asked, Checkpoint, IdempotencyKey, JobEvent, JobMetric, JobStatus
from core.errors import Conflict, GraftError, NotFound
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
        attempts.cancelled(session, job.id, fence)
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


def test_the_position_counts_the_queued_jobs_before(sessions: Sessions, project_id: str) -> None:
    first, second, third = (rows.job(sessions, project_id) for _ in range(3))

    def positions() -> list[int]:
        with sessions() as session:
            return [jobs.position(session, job) for job in (first, second, third)]

    assert positions() == [0, 1, 2]
    rows.claimed(sessions, first.id)
    assert positions()[1:] == [0, 1]


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
        found = [(row.step, row.values) for row in events.metrics(session, job.id)]
    assert found == [(1, {"loss": 9.0}), (2, {"loss": 2.0, "eval_loss": 0.5})]


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
