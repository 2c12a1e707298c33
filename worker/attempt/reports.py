"""What a trainer reports, turned into rows."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.control.db import Session
from core.control.running import attempts, events
from core.control.tables import Asked, Job
from worker.attempt import artifacts
from worker.child.spawn import Child
from worker.context import Context

Json = dict[str, Any]

_PLAN_NOTES = {
    "dropped": "rows are too long and left out",
    "truncated": "rows are too long and lost the beginning of their prompt",
    "validation_dropped": "validation rows are too long and left out",
    "validation_truncated": "validation rows are too long and lost the beginning of their prompt",
    "in_both": "validation rows are trained too, or were before, so their loss proves nothing",
}


@dataclass
class Attempt:
    """One claim of a job, while it runs: reports not yet written, uploads not yet registered.

    `settled` is called when the child has taken all the memory it will take.
    """

    job: Job
    work: Path
    reports: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    uploads: list[tuple[dict[str, Any], Future[None]]] = field(default_factory=list)
    stored: list[dict[str, Any]] = field(default_factory=list)
    outcome: tuple[str, dict[str, Any]] = ("crash", {})
    model_seconds: float = 0.0
    asked: Asked | None = None
    child: Child | None = None
    fenced: bool = False
    training: bool = False
    settled: Callable[[], None] = lambda: None
    claimed: float = field(default_factory=time.time)


@dataclass
class _News:
    """What the reports of one transaction change in the job's row, and the keys of files that are nobody's after it."""

    metrics: Json
    columns: Json = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


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
    news = _News(dict(job.metrics))
    with context.sessions.begin() as session:
        # The job's row first: who follows the events must not see later ones before these.
        attempts.renew(session, job.id, job.fence, context.settings.lease_seconds)
        for kind, data in attempt.reports:
            if (record := _RECORDS.get(kind)) is not None:
                record(session, attempt, data, news)
        if attempt.stored:
            news.columns["crashes"] = 0  # only attempts that come no further use the patience up
        attempt.asked = attempts.renew(
            session,
            job.id,
            job.fence,
            context.settings.lease_seconds,
            metrics=news.metrics,
            **news.columns,
        )
        if attempt.stored:
            news.dropped += _register(session, attempt)
    job.metrics = news.metrics
    job.checkpoint_spec = news.columns.get("checkpoint_spec", job.checkpoint_spec)
    attempt.reports.clear()
    attempt.stored.clear()
    for key in news.dropped:
        context.storage.delete(key)


def _register(session: Session, attempt: Attempt) -> list[str]:
    """Enter the stored checkpoints; those beyond the last few and the best are dropped, and their keys returned."""
    job = attempt.job
    session.flush()
    for data in attempt.stored:
        step = data["step"]
        # Of this very step: by now later ones may have been measured.
        measured = _named(events.values_at(session, job.id, step))
        key = artifacts.checkpoint_key(job, step)
        events.add_checkpoint(session, job.id, step, key, data["files"], measured)
        events.add(session, job.id, "checkpoint", f"Checkpoint of step {step} saved.", data={"step": step})
    session.flush()
    rows = events.checkpoints(session, job.id)
    best = events.best(rows)
    old = [row for row in rows[int(job.spec["checkpoints"]["keep"]) :] if row is not best]
    events.drop_checkpoints(session, old)
    return [row.key for row in old]


def _phase(session: Session, attempt: Attempt, data: Json, news: _News) -> None:
    news.columns["phase"] = data["phase"]
    message = f"Phase: {data['phase'].replace('_', ' ')}."
    events.add(session, attempt.job.id, "phase", message, data=data)


def _plan(session: Session, attempt: Attempt, data: Json, news: _News) -> None:
    job = attempt.job
    job.spec = news.columns["spec"] = data["spec"] | {"validation": job.spec.get("validation")}
    news.columns["total_steps"] = data["total_steps"]
    message = f"{data['rows']} rows, {data['trained_tokens']} trained tokens, {data['total_steps']} steps."
    notes = [f" {data[name]['count']} {words}." for name, words in _PLAN_NOTES.items() if data[name]["count"]]
    events.add(
        session,
        job.id,
        "plan",
        message + "".join(notes),
        level="warning" if notes else "info",
        data={name: value for name, value in data.items() if name != "spec"},
    )


def _model_loaded(session: Session, attempt: Attempt, data: Json, news: _News) -> None:
    attempt.model_seconds = data["seconds"]
    if attempt.job.checkpoint_spec is not None:
        # This run can be, so its checkpoints take the place of those that do not fit it.
        news.dropped += events.forget(session, attempt.job.id)
        news.columns["checkpoint_spec"] = None


def _first_step(session: Session, attempt: Attempt, data: Json, _news: _News) -> None:
    job = attempt.job
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


def _metrics(session: Session, attempt: Attempt, data: Json, news: _News) -> None:
    events.measure(session, attempt.job.id, data["step"], data["values"])
    news.metrics |= _named(data["values"])
    if data["progress"]:
        news.columns |= {"step": data["step"], **data["progress"]}


def _samples(session: Session, attempt: Attempt, data: Json, _news: _News) -> None:
    message = f"Answers to {len(data['samples'])} prompts at step {data['step']}."
    events.add(session, attempt.job.id, "samples", message, data=data)


def _note(session: Session, attempt: Attempt, data: Json, _news: _News) -> None:
    events.add(session, attempt.job.id, data["type"], data["message"], level=data["level"], data=data["data"])


def _named(values: Json) -> Json:
    """Values of a step by the names they have in a job's metrics."""
    return {"train_loss" if name == "loss" else name: value for name, value in values.items()}


_RECORDS: dict[str, Callable[[Session, Attempt, Json, _News], None]] = {
    "phase": _phase,
    "plan": _plan,
    "model_loaded": _model_loaded,
    "first_step": _first_step,
    "metrics": _metrics,
    "samples": _samples,
    "note": _note,
}
