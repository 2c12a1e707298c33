"""The life of a job and its queries: the only writer of a job's status.

    queued ── claim ──> running ── succeed ──> succeeded
      ^                   │ ├── fail ────────> failed
      ├── release ────────┤ └── cancelled ───> cancelled   (a queued job is cancelled at once)
      └── crash, bounded ─┘

Every write of a worker goes through `_held`, which names the fence of its claim: a worker that lost
its lease raises `Fenced` and changes nothing. Leases are compared by the database's clock alone.
"""

from typing import Any

from sqlalchemy import ColumnElement, CursorResult, delete, or_, select, update
from sqlalchemy.orm import Session

from core.control import events
from core.control.db import now_epoch
from core.control.tables import FINISHED, Adapter, IdempotencyKey, Job, JobStatus, new_id, utcnow
from core.errors import Conflict, Fenced, GraftError, NotFound

# Seconds until a crashed job may start again: at once, then longer and longer.
_BACKOFF = (0, 10, 30, 60, 120)
_SEND_AGAIN = 30.0


def create(
    session: Session,
    project_id: str,
    *,
    name: str,
    model: str,
    dataset_id: str,
    spec: dict[str, Any],
    labels: dict[str, str],
) -> Job:
    job = Job(
        id=new_id("job"),
        project_id=project_id,
        name=name,
        model=model,
        dataset_id=dataset_id,
        spec=spec,
        labels=labels,
        status=JobStatus.QUEUED,
        metrics={},
        created_at=utcnow(),
    )
    session.add(job)
    session.flush()
    events.add(session, job.id, "created", "Job created and queued.")
    return job


def replay(session: Session, project_id: str, key: str, body_sha256: str) -> Job | None:
    """The job that the same request made before, if any.

    Raises:
        Conflict: `idempotency_conflict`, the key was used with another body.
    """
    row = session.scalars(
        select(IdempotencyKey).where(
            IdempotencyKey.project_id == project_id, IdempotencyKey.key == key
        )
    ).first()
    if row is None:
        return None
    if row.body_sha256 != body_sha256:
        raise Conflict(
            "idempotency_conflict",
            "This Idempotency-Key was used with another request body.",
            hint="Use a new key for a new job.",
        )
    return session.get(Job, row.job_id)


def remember(session: Session, project_id: str, key: str, body_sha256: str, job_id: str) -> None:
    """Tie a job to the key it was made with; a second job with the key fails with IntegrityError."""
    session.add(
        IdempotencyKey(
            project_id=project_id,
            key=key,
            body_sha256=body_sha256,
            job_id=job_id,
            created_at=utcnow(),
        )
    )
    session.flush()


def get(session: Session, project_id: str, job_id: str) -> Job:
    """Raises NotFound `job_not_found`, for another project's job too."""
    job = session.get(Job, job_id)
    if job is None or job.project_id != project_id:
        raise NotFound(
            "job_not_found",
            f'There is no job "{job_id[:60]}".',
            hint="GET /jobs lists those of your project.",
        )
    return job


def page(
    session: Session,
    project_id: str,
    *,
    limit: int,
    after: str | None,
    status: JobStatus | None,
    labels: dict[str, str],
) -> list[Job]:
    """Newest first; one more than `limit`, to tell whether there are more."""
    query = select(Job).where(Job.project_id == project_id)
    if after is not None:
        query = query.where(Job.id < after)
    if status is not None:
        query = query.where(Job.status == status)
    for name, value in labels.items():
        query = query.where(Job.labels[name].as_string() == value)
    return list(session.scalars(query.order_by(Job.id.desc()).limit(limit + 1)))


def position(session: Session, job: Job) -> int:
    """How many queued jobs come before this one."""
    query = select(Job.id).where(Job.status == JobStatus.QUEUED, Job.id < job.id)
    return len(session.scalars(query).all())


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancel a queued job at once, ask a running one to stop; a cancelled one stays as it is.

    Raises:
        Conflict: `job_finished`, it succeeded or failed already.
    """
    job = get(session, project_id, job_id)
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise Conflict(
            "job_finished", f"Job {job.id} has {job.status} already, so it cannot be cancelled."
        )
    if job.status == JobStatus.RUNNING and not job.cancel_requested:
        events.add(
            session,
            job.id,
            "cancel_requested",
            "Cancel requested; the job stops after its current step.",
        )
        job.cancel_requested = True
    if job.status == JobStatus.QUEUED:
        changed = _update(
            session,
            [Job.id == job.id, Job.status == JobStatus.QUEUED],
            status=JobStatus.CANCELLED,
            finished_at=utcnow(),
            phase=None,
        )
        if not changed:  # a worker claimed it in this moment
            _update(session, [Job.id == job.id], cancel_requested=True)
        else:
            events.add(session, job.id, "cancelled", "Job cancelled before it started.")
    session.flush()
    session.refresh(job)
    return job


def remove(session: Session, project_id: str, job_id: str) -> Job:
    """Delete a finished job with all it left behind; its adapter stays.

    Raises:
        Conflict: `job_not_finished`.
    """
    job = get(session, project_id, job_id)
    if job.status not in FINISHED:
        raise Conflict(
            "job_not_finished",
            f"Job {job.id} is {job.status}; only finished jobs are deleted.",
            hint="Cancel it first.",
        )
    session.execute(update(Adapter).where(Adapter.job_id == job.id).values(job_id=None))
    session.execute(delete(Job).where(Job.id == job.id))
    return job


# ---- What a worker does


def claim(session: Session, job_id: str, owner: str, lease_seconds: float) -> Job | None:
    """Take a queued job, or None when somebody else has it or it is not due."""
    due = or_(Job.not_before.is_(None), Job.not_before <= now_epoch())
    taken = _update(
        session,
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
    events.add(
        session, job_id, "started", f"Attempt {job.attempt} started.", data={"attempt": job.attempt}
    )
    return job


def renew(session: Session, job_id: str, fence: int, lease_seconds: float, **changes: Any) -> bool:
    """Prolong the lease, together with other `changes` of columns; True when a cancel is asked for.

    Raises:
        Fenced: the job belongs to a newer claim, or is over.
    """
    _held(session, job_id, fence, lease_until=now_epoch() + lease_seconds, **changes)
    return session.scalars(select(Job.cancel_requested).where(Job.id == job_id)).one()


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
    _held(session, job_id, fence, **_queued_again(0))
    events.add(session, job_id, "released", why)


def crash(
    session: Session, job_id: str, fence: int, why: str, *, code: str, max_crashes: int
) -> None:
    """The attempt broke off. The job goes on from its last checkpoint, unless it broke too often."""
    job = session.get_one(Job, job_id, populate_existing=True)
    crashes = job.crashes + 1
    if job.cancel_requested:
        cancelled(session, job_id, fence)
        return
    if crashes >= max_crashes:
        hint = "The log of the worker tells more; a smaller batch or model needs less memory."
        fail(
            session,
            job_id,
            fence,
            GraftError(
                code, f"The job broke off {crashes} times, the last time because {why}.", hint=hint
            ),
        )
        _update(session, [Job.id == job_id], crashes=crashes)
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


# ---- What the sweep asks


def lost(session: Session, dead_owners: list[str]) -> list[Job]:
    """Running jobs whose lease is over, or whose worker is known to be dead."""
    query = select(Job).where(
        Job.status == JobStatus.RUNNING,
        or_(Job.lease_until < now_epoch(), Job.owner.in_(dead_owners)),
    )
    return list(session.scalars(query.order_by(Job.id).limit(100)))


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
    _update(session, [Job.id == job_id], sent_at=now_epoch())


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
    if not _update(
        session, [Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING], **changes
    ):
        raise Fenced(f"job {job_id} is no longer held with fence {fence}")


def _update(session: Session, where: list[ColumnElement[bool]], **values: Any) -> bool:
    session.flush()
    statement = (
        update(Job).where(*where).values(**values).execution_options(synchronize_session=False)
    )
    result = session.execute(statement)
    assert isinstance(result, CursorResult)  # noqa: S101 - what an UPDATE returns
    return result.rowcount == 1
