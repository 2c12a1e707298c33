"""What a trainer reports, turned into rows."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.control import attempts, events
from core.control.db import Session
from core.control.tables import Asked, Job
from worker import artifacts, child
from worker.context import Context

_PLAN_NOTES = {
    "dropped": "rows are too long and left out",
    "truncated": "rows are too long and lost the beginning of their prompt",
    "in_both": "validation rows are trained too, so their loss proves nothing",
}


@dataclass
class Attempt:
    """One claim of a job, while it runs: reports not yet written, uploads not yet registered."""

    job: Job
    work: Path
    reports: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    uploads: list[tuple[dict[str, Any], Future[None]]] = field(default_factory=list)
    stored: list[dict[str, Any]] = field(default_factory=list)
    outcome: tuple[str, dict[str, Any]] = ("crash", {})
    model_seconds: float = 0.0
    asked: Asked | None = None
    trainer: child.Child | None = None
    fenced: bool = False
    training: bool = False
    claimed: float = field(default_factory=time.time)


def write(context: Context, attempt: Attempt) -> None:
    """One short transaction with all that is waiting; when it fails, all of it waits on.

    Raises:
        StorageFull: a checkpoint could not be stored.
    """
    job = attempt.job
    for item in [item for item in attempt.uploads if item[1].done()]:
        attempt.uploads.remove(item)
        item[1].result()
        attempt.stored.append(item[0])
    columns: dict[str, Any] = {}
    metrics = dict(job.metrics)
    old = []
    with context.sessions.begin() as session:
        # The job's row first: who follows the events must not see later ones before these.
        attempts.renew(session, job.id, job.fence, context.settings.lease_seconds)
        for kind, data in attempt.reports:
            _record(session, attempt, kind, data, columns, metrics)
        if attempt.stored:
            columns["crashes"] = 0  # only attempts that come no further use the patience up
        attempt.asked = attempts.renew(
            session, job.id, job.fence, context.settings.lease_seconds, metrics=metrics, **columns
        )
        for data in attempt.stored:
            key = artifacts.checkpoint_key(job, data["step"])
            events.add_checkpoint(session, job.id, data["step"], key, data["files"], metrics)
            events.add(
                session,
                job.id,
                "checkpoint",
                f"Checkpoint of step {data['step']} saved.",
                data={"step": data["step"]},
            )
        if attempt.stored:
            session.flush()
            old = events.checkpoints(session, job.id)[int(job.spec["checkpoints"]["keep"]) :]
            events.drop_checkpoints(session, old)
    job.metrics = metrics
    attempt.reports.clear()
    attempt.stored.clear()
    for row in old:
        context.storage.delete(row.key)


def _record(
    session: Session,
    attempt: Attempt,
    kind: str,
    data: dict[str, Any],
    columns: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Turn one report into rows, and into changes of the job's own columns and latest metrics."""
    job = attempt.job
    if kind == "phase":
        columns["phase"] = data["phase"]
        attempt.training = data["phase"] == "training" or attempt.training
        events.add(session, job.id, "phase", f"Phase: {data['phase'].replace('_', ' ')}.", data=data)
    elif kind == "plan":
        job.spec = columns["spec"] = data["spec"] | {"validation": job.spec.get("validation")}
        columns["total_steps"] = data["total_steps"]
        message = (
            f"{data['rows']} rows, {data['trained_tokens']} trained tokens, {data['total_steps']} steps."
        )
        notes = [
            f" {data[name]['count']} {words}." for name, words in _PLAN_NOTES.items() if data[name]["count"]
        ]
        events.add(
            session,
            job.id,
            "plan",
            message + "".join(notes),
            level="warning" if notes else "info",
            data={name: value for name, value in data.items() if name != "spec"},
        )
    elif kind == "model_loaded":
        attempt.model_seconds = data["seconds"]
    elif kind == "first_step":
        first = job.attempt == 1
        seconds = time.time() - (job.created_at.timestamp() if first else attempt.claimed)
        events.add(
            session,
            job.id,
            "first_step",
            f"First optimizer step {seconds:.1f} s after {'the job was posted' if first else 'this attempt began'} "
            f"(of which {attempt.model_seconds:.1f} s for loading the model).",
            data={
                "seconds": round(seconds, 3),
                "model_seconds": round(attempt.model_seconds, 3),
                **data,
            },
        )
    elif kind == "metrics":
        events.measure(session, job.id, data["step"], data["values"])
        metrics.update(
            {"train_loss" if name == "loss" else name: value for name, value in data["values"].items()}
        )
        if data["progress"]:
            columns.update(step=data["step"], **data["progress"])
