"""Jobs as clients see them: create, look, pause, resume, cancel, retry, delete. What workers write is in `attempts`."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import delete, func, select

from core.control import adapters, datasets, db
from core.control.db import Session
from core.control.running import events
from core.control.tables import (
    FINISHED,
    Adapter,
    Asked,
    IdempotencyKey,
    Job,
    JobKind,
    JobStatus,
    new_id,
    utcnow,
)
from core.errors import BadRequest, Conflict, NotFound
from core.ml.training.spec import changes as spec_changes


def create(
    session: Session,
    project_id: str,
    *,
    name: str,
    model: str,
    dataset_id: str | None,
    spec: dict[str, Any],
    labels: dict[str, str],
    kind: JobKind = JobKind.TRAIN,
    priority: int = 0,
    preset: dict[str, Any] | None = None,
) -> Job:
    job = Job(
        id=new_id("job"),
        project_id=project_id,
        name=name,
        model=model,
        dataset_id=dataset_id,
        spec=spec,
        labels=labels,
        kind=kind,
        priority=priority,
        preset=preset,
        recoveries=[],
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


def get(session: Session, project_id: str, job_id: str, *, lock: bool = False) -> Job:
    """Raises NotFound `job_not_found`, for another project's job too."""
    job = db.locked(session, Job, job_id, "change") if lock else session.get(Job, job_id)
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


def positions(session: Session, rows: Iterable[Job]) -> dict[str, int]:
    """How many queued jobs come before each of these that is queued: of higher priority, or as high and older."""
    ids = [job.id for job in rows if job.status == JobStatus.QUEUED]
    if not ids:
        return {}
    before = func.row_number().over(order_by=(Job.priority.desc(), Job.id)) - 1
    queue = select(Job.id, before.label("before")).where(Job.status == JobStatus.QUEUED).subquery()
    found = {row.id: row.before for row in session.execute(select(queue).where(queue.c.id.in_(ids)))}
    return {id_: found.get(id_, 0) for id_ in ids}  # 0: it left the queue in this moment


def log_key(job_id: str, fence: int) -> str:
    """Where the log of one attempt lies; a zombie can only ever overwrite its own."""
    return f"jobs/{job_id}/logs/{fence}.txt"


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancel a queued or paused job at once, ask a running one to stop; a cancelled one stays as it is.

    Raises:
        Conflict: `job_finished`, it succeeded or failed already.
    """
    job = get(session, project_id, job_id, lock=True)
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise Conflict("job_finished", f"Job {job.id} has {job.status} already, so it cannot be cancelled.")
    if job.status in (JobStatus.QUEUED, JobStatus.PAUSED):
        told = "before it started" if job.attempt == 0 else "while it did not run"
        job.status, job.finished_at = JobStatus.CANCELLED, utcnow()
        events.add(session, job.id, "cancelled", f"Job cancelled {told}.")
    elif job.status == JobStatus.RUNNING and job.asked is not Asked.CANCEL:
        job.asked = Asked.CANCEL
        events.add(
            session, job.id, "cancel_requested", "Cancel requested; the job stops after its current step."
        )
    return job


def pause(session: Session, project_id: str, job_id: str) -> Job:
    """Pause a queued job at once, ask a running one to save and leave; a paused one stays as it is.

    Raises:
        Conflict: `job_finished`; `job_cancelling`, a cancel was asked for before.
    """
    job = get(session, project_id, job_id, lock=True)
    _refuse_ended(job, "paused")
    if job.status == JobStatus.QUEUED:
        job.status = JobStatus.PAUSED
        events.add(session, job.id, "paused", "Job paused while it waited in the queue.")
    elif job.status == JobStatus.RUNNING and job.asked is None:
        job.asked = Asked.PAUSE
        told = "Pause requested; the job saves a checkpoint after its current step and frees the device."
        events.add(session, job.id, "pause_requested", told)
    return job


def resume(session: Session, project_id: str, job_id: str) -> Job:
    """Queue a paused job again, take the pause back that a running one has not answered yet.

    Raises:
        Conflict: `job_finished`; `job_cancelling`.
    """
    job = get(session, project_id, job_id, lock=True)
    _refuse_ended(job, "resumed")
    if job.status == JobStatus.PAUSED:
        job.status, job.sent_at, job.not_before = JobStatus.QUEUED, None, None
        events.add(session, job.id, "resume_requested", "The pause is over; the job is queued again.")
    elif job.asked is Asked.PAUSE:
        # If its trainer is leaving already, the end of the attempt finds nothing asked and queues the job again.
        job.asked = None
        events.add(session, job.id, "resume_requested", "The pause is taken back.")
    return job


def retry(session: Session, project_id: str, job_id: str, changes: dict[str, Any]) -> Job:
    """Queue a failed or cancelled job again, with `changes` in its spec, from its last checkpoint.

    From the beginning where the changes leave its checkpoints without use: they stay until the new run has its model, so
    that a change which cannot be does not cost them. A queued or running job that has these values stays as it is.

    Raises:
        Conflict: `job_not_finished`; `job_finished`, it succeeded.
        BadRequest: `invalid_request`, the changes do not go with the spec.
        NotFound: `dataset_not_found`, `adapter_not_found`: what it needs was deleted.
    """
    job = get(session, project_id, job_id, lock=True)
    if job.kind == JobKind.EXPORT and changes:
        raise BadRequest("invalid_request", "An export has no spec that could be changed.")
    if job.status in (JobStatus.QUEUED, JobStatus.RUNNING) and spec_changes.holds(job.spec, changes):
        return job
    if job.status not in FINISHED:
        hint = (
            "POST /jobs/{id}/resume lets it go on." if job.status == JobStatus.PAUSED else "Cancel it first."
        )
        raise Conflict("job_not_finished", f"Job {job.id} is {job.status}, so it is not retried.", hint=hint)
    if job.status == JobStatus.SUCCEEDED:
        hint = "Post a new job; with continue_from it begins with this one's adapter."
        raise Conflict("job_finished", f"Job {job.id} has succeeded, so it is not retried.", hint=hint)
    validation, export = job.spec.get("validation") or {}, job.spec.get("export") or {}
    for dataset_id in filter(None, (job.dataset_id, validation.get("dataset_id"))):
        datasets.get(session, project_id, dataset_id, to="use")
    for adapter_id in filter(None, (job.spec.get("continue_from"), export.get("adapter_id"))):
        adapters.get(session, project_id, adapter_id, to="use")
    _queue_again(session, job, changes)
    return job


def _queue_again(session: Session, job: Job, changes: dict[str, Any]) -> None:
    saved = events.checkpoints(session, job.id)
    # A row of an earlier version may lack fields; with the changes it gets their defaults.
    before = spec_changes.merged(job.spec, {}) if changes else job.spec
    spec = spec_changes.merged(job.spec, changes) if changes else job.spec
    different = spec_changes.changed(before, spec)
    made_with = job.checkpoint_spec or before
    epoch = events.planned(session, job.id).get("steps_per_epoch")
    reasons = spec_changes.unfit(made_with, spec, saved[0].step, epoch) if saved else []
    whence = f"from the checkpoint of step {saved[0].step}" if saved else "from the beginning"
    if reasons:
        whence = f"from the beginning: its checkpoints do not fit the new {', '.join(reasons)}"
        job.step, job.total_steps, job.metrics = 0, None, {}
    job.checkpoint_spec = made_with if reasons else None
    if job.preset is not None:
        job.preset = job.preset | {"diff": spec_changes.preset_diff(job.preset["diff"], before, spec)}
    job.spec, job.status, job.error, job.finished_at = spec, JobStatus.QUEUED, None, None
    job.crashes, job.recoveries = 0, []
    job.sent_at, job.not_before = None, None
    events.add(
        session,
        job.id,
        "retried",
        f"Retried{' with changes' if different else ''}; the job goes on {whence}.",
        data={"changes": different, "from_start": bool(reasons)},
    )


def _refuse_ended(job: Job, what: str) -> None:
    if job.status in FINISHED:
        hint = None if job.status == JobStatus.SUCCEEDED else "POST /jobs/{id}/retry makes a new attempt."
        message = f"Job {job.id} has ended ({job.status}), so it cannot be {what}."
        raise Conflict("job_finished", message, hint=hint)
    if job.asked is Asked.CANCEL:
        message = f"Job {job.id} is being cancelled, so it cannot be {what}."
        raise Conflict("job_cancelling", message, hint="POST /jobs/{id}/retry takes it up again afterwards.")


def remove(session: Session, project_id: str, job_id: str, *, with_adapter: bool = False) -> list[str]:
    """Delete a finished job with all it left behind, its adapter only if asked; the keys of their files, to be
    deleted after the commit.

    Raises:
        Conflict: `job_not_finished`; `adapter_in_use`.
    """
    job = get(session, project_id, job_id, lock=True)
    if job.status not in FINISHED:
        raise Conflict(
            "job_not_finished",
            f"Job {job.id} is {job.status}; only finished jobs are deleted.",
            hint="Cancel it first.",
        )
    keys = [f"jobs/{job.id}"]
    for adapter in session.scalars(select(Adapter).where(Adapter.job_id == job.id)):
        if with_adapter:
            keys.append(adapters.delete(session, project_id, adapter.id).key)
        else:
            adapter.job_id = None
    session.flush()
    session.execute(delete(Job).where(Job.id == job.id))
    return keys
