"""A training job: what the trainer is given, and what becomes of what it made.

Artifact first, row second: files lie in the storage, whole, before a row names them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from core.control.db import Session, reading
from core.control.running import attempts, events
from core.control.tables import Adapter, Checkpoint, Job
from core.ml.training.run import Run
from worker.attempt import artifacts
from worker.attempt.reports import Attempt
from worker.attempt.supervise import insert, see_through
from worker.context import Context


def make(context: Context, attempt: Attempt) -> bool:
    """Train an adapter, prove it in a fresh process and publish it; False: `attempt.outcome` tells what came instead."""
    run = _inputs(context, attempt)
    kind, done = see_through(context, attempt, "train", run, attempt.job.id)
    if kind != "done":
        return False
    folder = Path(done["folder"])
    attempt.reports.append(("phase", {"phase": "evaluating"}))
    facts = {
        "job_id": attempt.job.id,
        "spec": attempt.job.spec,
        "metrics": done["metrics"],
        "step": done["step"],
    }
    facts |= artifacts.dataset_names(context, attempt.job)
    kind, proved = see_through(context, attempt, "prove", run, folder, facts)
    if kind != "proved":
        return False
    publish(context, attempt, folder, done["metrics"] | proved["metrics"], proved["certificate"])
    return True


def _inputs(context: Context, attempt: Attempt) -> Run:
    """Everything the trainer needs, as files on this machine."""
    job, work = attempt.job, attempt.work
    run = artifacts.fetch_run(context, job, work)
    if job.checkpoint_spec is not None:
        return run  # from the beginning: its checkpoints were made with another spec
    with reading(context.sessions) as session:
        saved, planned = events.checkpoints(session, job.id), events.planned(session, job.id)
    resume, best = fetch_checkpoints(context, attempt, saved)
    # A run that goes on holds its weights as before, whatever memory is free now: other roundings, other losses.
    return replace(run, resume=resume, best=best, kept=planned.get("weights_kept") if resume else None)


def fetch_checkpoints(
    context: Context, attempt: Attempt, saved: list[Checkpoint]
) -> tuple[Path | None, Path | None]:
    """The newest whole checkpoint and the best one, brought here; what comes after the newest is dropped.

    Damaged ones are dropped too: newer ones would push the good ones out, a better one would be taken for the best.
    """
    left, damaged = list(saved), []
    while left and (resume := _fetched(context, attempt, left[0])) is None:
        damaged.append(left.pop(0))
    newest = left[0].step if left else 0
    while (row := events.best(left)) is not None:
        if best := resume if row is left[0] else _fetched(context, attempt, row):
            break
        damaged.append(row)
        left.remove(row)
    _start_from(context, attempt, newest if left else None, damaged)
    return (resume if left else None), (best if row is not None else None)


def _fetched(context: Context, attempt: Attempt, row: Checkpoint) -> Path | None:
    folder = attempt.work / f"step-{row.step}"
    return folder if artifacts.fetch_checkpoint(context, row, folder) else None


def _start_from(context: Context, attempt: Attempt, step: int | None, damaged: list[Checkpoint]) -> None:
    """Have the rows tell where the attempt starts; `step` is that of its checkpoint, None without one."""
    job = attempt.job
    with context.sessions.begin() as session:
        attempts.renew(session, job.id, job.fence, context.settings.lease_seconds, step=step or 0)
        events.forget_after(session, job.id, step or 0)
        events.drop_checkpoints(session, damaged)
        for row in damaged:
            message = f"The checkpoint of step {row.step} is damaged and was not used."
            events.add(
                session, job.id, "checkpoint_damaged", message, level="warning", data={"step": row.step}
            )
        if step is not None:
            message = f"Resumed from the checkpoint of step {step}."
            events.add(session, job.id, "resumed", message, data={"step": step})
    for row in damaged:
        context.storage.delete(row.key)


def publish(
    context: Context,
    attempt: Attempt,
    folder: Path,
    metrics: dict[str, float],
    certificate: dict[str, Any],
) -> None:
    """Store the adapter once, then insert its row and end the job, as often as the database needs."""
    job = attempt.job
    fields = artifacts.store_adapter(context, job, folder, metrics, attempt.work)
    fields["certificate"] = certificate

    def tell(session: Session) -> None:
        attempts.renew(
            session, job.id, job.fence, context.settings.lease_seconds, metrics=job.metrics | metrics
        )
        _certified(session, job, certificate)

    insert(context, job, lambda: Adapter(**fields), tell)


def _certified(session: Session, job: Job, certificate: dict[str, Any]) -> None:
    """One event with the verdict, a warning where a check did not hold."""
    faults = [check["name"] for check in certificate["checks"] if not check["ok"]]
    told = f"Not everything holds: {', '.join(faults)}." if faults else "Every check of the adapter holds."
    told += f" {certificate['evaluation']['verdict']['words']}"
    events.add(
        session,
        job.id,
        "certificate",
        told,
        level="warning" if faults else "info",
        data={"ok": certificate["ok"], "faults": faults, "verdict": certificate["evaluation"]["verdict"]},
    )
