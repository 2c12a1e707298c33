"""What a job leaves behind while it runs: events, metrics and checkpoints. Never its status.

Types of events: those of its life are `created`, `started`, `resumed` (from a checkpoint), `released`, `crashed`,
`recovered`, `pause_requested`, `paused`, `resume_requested`, `cancel_requested`, `cancelled`, `retried`,
`failed` and `succeeded`; those of its work `phase`, `plan`, `first_step`, `checkpoint`, `checkpoint_damaged`,
`samples`, `certificate`, and what the trainer notes under names of its own. docs/operations.md explains them.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import delete, select

from core.control.db import Session
from core.control.tables import Checkpoint, JobEvent, JobMetric, utcnow


def add(
    session: Session,
    job_id: str,
    type_: str,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> None:
    session.add(
        JobEvent(job_id=job_id, created_at=utcnow(), level=level, type=type_, message=message, data=data)
    )


def after(session: Session, job_id: str, last: int, *, limit: int = 500) -> list[JobEvent]:
    """The events that follow the one with id `last` (0: all), oldest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > last)
    return list(session.scalars(query.order_by(JobEvent.id).limit(limit)))


def latest(session: Session, job_id: str, type_: str, *, before: int | None = None) -> JobEvent | None:
    """The newest event of this type, or the newest of those before the one with this id."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == type_)
    if before is not None:
        query = query.where(JobEvent.id < before)
    return session.scalars(query.order_by(JobEvent.id.desc()).limit(1)).first()


def planned(session: Session, job_id: str) -> dict[str, Any]:
    """What was planned for the run that made the newest checkpoint; for the last run, where there is none."""
    saved = latest(session, job_id, "checkpoint")
    # A run that began anew since then, and came to no checkpoint, had other plans.
    plan = latest(session, job_id, "plan", before=saved.id if saved else None)
    return (plan.data or {}) if plan else {}


def page(session: Session, job_id: str, *, limit: int, before: int | None) -> list[JobEvent]:
    """Newest first; one more than `limit`, to tell whether there are more."""
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    if before is not None:
        query = query.where(JobEvent.id < before)
    return list(session.scalars(query.order_by(JobEvent.id.desc()).limit(limit + 1)))


def measure(session: Session, job_id: str, step: int, values: dict[str, float]) -> None:
    """Keep the values of a step, beside those it has already."""
    row = session.get(JobMetric, (job_id, step))
    if row is None:
        session.add(JobMetric(job_id=job_id, step=step, values=values))
    else:
        row.values = row.values | values


def metrics(session: Session, job_id: str, points: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Steps and their values; so many `points` at most, evenly thinned out, first and last kept."""
    query = select(JobMetric.step, JobMetric.values).where(JobMetric.job_id == job_id)
    if points is not None:
        # Of a million steps only the wanted ones' values are read.
        steps = session.scalars(
            select(JobMetric.step).where(JobMetric.job_id == job_id).order_by(JobMetric.step)
        ).all()
        if len(steps) > points:
            query = query.where(
                JobMetric.step.in_([steps[round(i * (len(steps) - 1) / (points - 1))] for i in range(points)])
            )
    return [(step, values) for step, values in session.execute(query.order_by(JobMetric.step))]


def values_at(session: Session, job_id: str, step: int) -> dict[str, Any]:
    """What was measured at this very step; nothing where nothing was."""
    row = session.get(JobMetric, (job_id, step))
    return dict(row.values) if row else {}


def forget_after(session: Session, job_id: str, step: int) -> None:
    """Drop the metrics of steps that will be done again after a crash."""
    session.execute(delete(JobMetric).where(JobMetric.job_id == job_id, JobMetric.step > step))


def add_checkpoint(
    session: Session,
    job_id: str,
    step: int,
    key: str,
    files: Iterable[dict[str, Any]],
    metrics: dict[str, Any],
) -> None:
    """Register a checkpoint whose files lie in the storage; a step done again replaces its first one."""
    session.merge(
        Checkpoint(
            job_id=job_id,
            step=step,
            key=key,
            files=list(files),
            metrics=metrics,
            created_at=utcnow(),
        )
    )


def checkpoints(session: Session, job_id: str) -> list[Checkpoint]:
    """Newest first."""
    return list(
        session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())
        )
    )


def drop_checkpoints(session: Session, rows: Iterable[Checkpoint]) -> None:
    for row in rows:
        session.delete(row)


def best(rows: Iterable[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss, the earlier of two alike; None where none was evaluated."""
    evaluated = [row for row in rows if "eval_loss" in row.metrics]
    return min(evaluated, key=lambda row: (row.metrics["eval_loss"], row.step), default=None)


def forget(session: Session, job_id: str) -> list[str]:
    """Drop all metrics and checkpoints; the keys of their files, to be deleted after the commit."""
    rows = checkpoints(session, job_id)
    drop_checkpoints(session, rows)
    forget_after(session, job_id, -1)
    return [row.key for row in rows]
