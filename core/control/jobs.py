"""Jobs as clients see them: create, look, cancel, delete. What workers write is in `attempts`."""

from typing import Any

from sqlalchemy import delete, func, select, update

from core.control import events
from core.control.db import Session
from core.control.tables import FINISHED, Adapter, Asked, IdempotencyKey, Job, JobStatus, new_id, utcnow
from core.errors import Conflict, NotFound


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
        select(IdempotencyKey).where(IdempotencyKey.project_id == project_id, IdempotencyKey.key == key)
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
    query = select(func.count()).where(Job.status == JobStatus.QUEUED, Job.id < job.id)
    return session.scalar(query) or 0


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancel a queued job at once, ask a running one to stop; a cancelled one stays as it is.

    Raises:
        Conflict: `job_finished`, it succeeded or failed already.
    """
    job = get(session, project_id, job_id)
    session.refresh(job, with_for_update=True)
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise Conflict("job_finished", f"Job {job.id} has {job.status} already, so it cannot be cancelled.")
    if job.status == JobStatus.QUEUED:
        job.status, job.finished_at = JobStatus.CANCELLED, utcnow()
        events.add(session, job.id, "cancelled", "Job cancelled before it started.")
    elif job.status == JobStatus.RUNNING and job.asked is not Asked.CANCEL:
        job.asked = Asked.CANCEL
        events.add(
            session, job.id, "cancel_requested", "Cancel requested; the job stops after its current step."
        )
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
