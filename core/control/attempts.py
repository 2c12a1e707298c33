"""The attempts of a job: what workers and the sweep write. With `jobs` the only writer of a status.

    queued ── claim ──> running ── succeed ──> succeeded
      ^                   │ ├── fail ────────> failed
      ├── release ────────┤ └── cancelled ───> cancelled
      └── crash, bounded ─┘

Every write of a worker goes through `_held`, which names the fence of its claim: a worker that lost
its lease raises `Fenced` and changes nothing. Leases are compared by the database's clock alone.
"""

from typing import Any

from sqlalchemy import or_, select

from core.control import events
from core.control.db import Session, now_epoch, update_one
from core.control.tables import Adapter, Asked, Job, JobStatus, utcnow
from core.errors import Fenced, GraftError

# Seconds until a crashed job may start again: at once, then longer and longer.
_BACKOFF = (0, 10, 30, 60, 120)
# A message unanswered for so long may be lost, and is sent again.
_SEND_AGAIN = 30.0


def claim(session: Session, job_id: str, owner: str, lease_seconds: float) -> Job | None:
    """Take a queued job, or None when somebody else has it or it is not due."""
    due = or_(Job.not_before.is_(None), Job.not_before <= now_epoch())
    taken = update_one(
        session,
        Job,
        [Job.id == job_id, Job.status == JobStatus.QUEUED, due],
        status=JobStatus.RUNNING,
        phase="preparing",
        fence=Job.fence + 1,
        attempt=Job.attempt + 1,
        owner=owner,
        lease_until=now_epoch() + lease_seconds,
        error=None,
    )
    if not taken:
        return None
    job = session.get_one(Job, job_id, populate_existing=True)
    job.started_at = job.started_at or utcnow()
    events.add(session, job_id, "started", f"Attempt {job.attempt} started.", data={"attempt": job.attempt})
    return job


def renew(session: Session, job_id: str, fence: int, lease_seconds: float, **changes: Any) -> Asked | None:
    """Prolong the lease, together with other `changes` of columns; what a client asks of the job.

    Raises:
        Fenced: the job belongs to a newer claim, or is over.
    """
    _held(session, job_id, fence, lease_until=now_epoch() + lease_seconds, **changes)
    return session.scalars(select(Job.asked).where(Job.id == job_id)).one()


def succeed(session: Session, job_id: str, fence: int, adapter: Adapter) -> None:
    """Insert the adapter and end the job, in one transaction. Its files are stored already."""
    session.add(adapter)
    _held(
        session,
        job_id,
        fence,
        status=JobStatus.SUCCEEDED,
        phase=None,
        adapter_id=adapter.id,
        finished_at=utcnow(),
        eta_seconds=None,
        owner=None,
        lease_until=None,
    )
    events.add(
        session,
        job_id,
        "succeeded",
        f"Job succeeded; its adapter is {adapter.id}.",
        data={"adapter_id": adapter.id},
    )


def fail(session: Session, job_id: str, fence: int, error: GraftError) -> None:
    _held(
        session,
        job_id,
        fence,
        status=JobStatus.FAILED,
        phase=None,
        error=error.as_dict(),
        finished_at=utcnow(),
        eta_seconds=None,
        owner=None,
        lease_until=None,
    )
    events.add(session, job_id, "failed", error.message, level="error", data=error.as_dict())


def cancelled(session: Session, job_id: str, fence: int) -> None:
    _held(
        session,
        job_id,
        fence,
        status=JobStatus.CANCELLED,
        phase=None,
        finished_at=utcnow(),
        eta_seconds=None,
        owner=None,
        lease_until=None,
    )
    events.add(session, job_id, "cancelled", "Job cancelled.")


def release(session: Session, job_id: str, fence: int, why: str) -> None:
    """Give the job back to the queue without counting a crash: the worker stops, not the job."""
    if session.get_one(Job, job_id, populate_existing=True).asked is Asked.CANCEL:
        cancelled(session, job_id, fence)
        return
    _held(session, job_id, fence, **_queued_again(0))
    events.add(session, job_id, "released", why)


def crash(session: Session, job_id: str, fence: int, why: str, *, code: str, max_crashes: int) -> None:
    """The attempt broke off. The job goes on from its last checkpoint, unless it broke too often."""
    job = session.get_one(Job, job_id, populate_existing=True)
    crashes = job.crashes + 1
    if job.asked is Asked.CANCEL:
        cancelled(session, job_id, fence)
        return
    if crashes >= max_crashes:
        hint = "The log of the worker tells more; a smaller batch or model needs less memory."
        fail(
            session,
            job_id,
            fence,
            GraftError(code, f"The job broke off {crashes} times, the last time because {why}.", hint=hint),
        )
        update_one(session, Job, [Job.id == job_id], crashes=crashes)
        return
    _held(
        session,
        job_id,
        fence,
        crashes=crashes,
        **_queued_again(_BACKOFF[min(crashes, len(_BACKOFF)) - 1]),
    )
    events.add(
        session,
        job_id,
        "crashed",
        f"The attempt broke off because {why}; the job goes on from its last checkpoint.",
        level="warning",
        data={"code": code, "crashes": crashes},
    )


def lost(session: Session, dead_owners: list[str]) -> list[Job]:
    """Running jobs whose lease is over, or whose worker is known to be dead."""
    query = select(Job).where(
        Job.status == JobStatus.RUNNING,
        or_(Job.lease_until < now_epoch(), Job.owner.in_(dead_owners)),
    )
    # Locked, so that a heartbeat of this moment is not overlooked.
    return list(session.scalars(query.order_by(Job.id).limit(100).with_for_update(skip_locked=True)))


def unsent(session: Session, limit: int) -> list[str]:
    """Ids of queued jobs that are due and whose message was never sent, or may be lost; oldest first."""
    now = now_epoch()
    query = select(Job.id).where(
        Job.status == JobStatus.QUEUED,
        or_(Job.not_before.is_(None), Job.not_before <= now),
        or_(Job.sent_at.is_(None), Job.sent_at < now - _SEND_AGAIN),
    )
    return list(session.scalars(query.order_by(Job.id).limit(limit)))


def mark_sent(session: Session, job_id: str) -> None:
    update_one(session, Job, [Job.id == job_id], sent_at=now_epoch())


def _queued_again(delay: float) -> dict[str, Any]:
    return {
        "status": JobStatus.QUEUED,
        "phase": None,
        "owner": None,
        "lease_until": None,
        "sent_at": None,
        "eta_seconds": None,
        "not_before": now_epoch() + delay if delay else None,
    }


def _held(session: Session, job_id: str, fence: int, **changes: Any) -> None:
    if not update_one(
        session, Job, [Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING], **changes
    ):
        raise Fenced(f"job {job_id} is no longer held with fence {fence}")
