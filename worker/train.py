"""One job from claim to end: start the trainer, write what it reports, publish what it made.

Heartbeat, cancel and shutdown ride on the same loop. Artifact first, row second: files lie in the
storage, whole, before a row names them.
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import log
from core.control import events, jobs
from core.control.db import DatabaseUnavailable, Session, reading
from core.control.tables import Dataset, Job
from core.errors import Fenced, GraftError, NotFound
from core.ml import catalogue
from core.ml.training.config import Spec
from core.ml.training.run import Run
from worker import artifacts, child
from worker.context import Context

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
# A database that is away does not end a training; one that stays away does.
_DATABASE_PATIENCE = 600.0


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
    cancel: bool = False


def run(context: Context, job_id: str) -> None:
    """Claim the job and see it through; returns at once when it is somebody else's."""
    if context.stopping.is_set():
        return
    with context.sessions.begin() as session:
        job = jobs.claim(session, job_id, context.owner, context.settings.lease_seconds)
    if job is None:
        return
    token = log.job_id.set(job.id)
    attempt = Attempt(job, context.settings.scratch / job.id / str(job.fence))
    try:
        _attempt(context, attempt)
    except Fenced:
        logger.warning("lease lost; this attempt writes nothing more")
    finally:
        shutil.rmtree(attempt.work, ignore_errors=True)
        log.job_id.reset(token)


def _attempt(context: Context, attempt: Attempt) -> None:
    """Run the attempt and write its end, whatever that is."""
    try:
        adapter_folder = _train(context, attempt)
        if adapter_folder is not None:
            _patiently(lambda: _publish(context, attempt, *adapter_folder))
            return
    except GraftError as error:
        attempt.outcome = ("error", error.as_dict())
    except (Fenced, DatabaseUnavailable):
        raise
    except Exception as error:
        logger.exception("the attempt broke off in the worker")
        attempt.outcome = ("crash", {"why": f"the worker met {type(error).__name__}: {error}"})
    _patiently(lambda: _end(context, attempt))


def _train(context: Context, attempt: Attempt) -> tuple[Path, dict[str, float]] | None:
    """The trainer from start to end; the finished adapter's folder and metrics, if it got so far."""
    run = _inputs(context, attempt)
    trainer = child.start("train", run, attempt.job.id)
    with ThreadPoolExecutor(1, thread_name_prefix="upload") as uploader:
        try:
            _supervise(context, attempt, trainer, uploader)
        finally:
            trainer.close()
        wait([upload for _, upload in attempt.uploads])
    _patiently(lambda: _write(context, attempt))
    kind, data = attempt.outcome
    return (Path(data["folder"]), data["metrics"]) if kind == "done" else None


def _inputs(context: Context, attempt: Attempt) -> Run:
    """Everything the trainer needs, as files on this machine."""
    job, work = attempt.job, attempt.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    spec = dict(job.spec)
    validation = spec.pop("validation", None) or {}
    with reading(context.sessions) as session:
        train = session.get(Dataset, job.dataset_id)
        valid = (
            session.get(Dataset, validation["dataset_id"]) if validation.get("dataset_id") else None
        )
        saved = events.checkpoints(session, job.id)
    if train is None or (validation.get("dataset_id") and valid is None):
        raise NotFound("dataset_not_found", "The data set of this job was deleted.")
    resume: Path | None = None
    damaged, step = [], 0
    for row in saved:
        folder = work / f"resume-{row.step}"
        if artifacts.fetch_checkpoint(context, row, folder):
            resume, step = folder, row.step
            break
        damaged.append(row.step)
    with context.sessions.begin() as session:
        jobs.renew(session, job.id, job.fence, context.settings.lease_seconds, step=step)
        events.forget_after(session, job.id, step)
        for number in damaged:
            events.add(
                session,
                job.id,
                "checkpoint_damaged",
                f"The checkpoint of step {number} is damaged and was not used.",
                level="warning",
                data={"step": number},
            )
        if resume:
            events.add(
                session,
                job.id,
                "resumed",
                f"Resumed from the checkpoint of step {step}.",
                data={"step": step},
            )
    return Run(
        model=catalogue.find(context.catalogue, job.model),
        spec=Spec.model_validate(spec),
        train=artifacts.fetch_dataset(context, train, work / "train"),
        valid=artifacts.fetch_dataset(context, valid, work / "valid") if valid else None,
        fraction=validation.get("fraction"),
        work=work,
        resume=resume,
    )


def _supervise(
    context: Context, attempt: Attempt, trainer: child.Child, uploader: ThreadPoolExecutor
) -> None:
    """Until the trainer has ended: take its reports, write them, renew the lease, pass on stops."""
    beat = heard = time.monotonic()
    away_since: float | None = None
    asked = False
    while True:
        ended = trainer.exit_code is not None
        reports = trainer.receive(0 if ended else _TICK_SECONDS)
        if reports:
            heard = time.monotonic()
        for kind, data in reports:
            _take(context, attempt, kind, data, uploader)
        if ended and not reports:
            if attempt.outcome[0] == "crash":
                attempt.outcome = (
                    "crash",
                    {"why": f"its trainer process ended with exit code {trainer.exit_code}"},
                )
            return
        if (
            attempt.reports
            or any(upload.done() for _, upload in attempt.uploads)
            or (time.monotonic() - beat >= context.settings.heartbeat_seconds)
        ):
            try:
                _write(context, attempt)
                beat, away_since = time.monotonic(), None
            except DatabaseUnavailable:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > _DATABASE_PATIENCE:
                    raise
                logger.warning("database is away; training goes on")
                time.sleep(1)
        if (attempt.cancel or context.stopping.is_set()) and not asked:
            asked = True
            trainer.ask_to_stop()
        if time.monotonic() - heard > context.settings.stall_seconds:
            raise TimeoutError(
                f"the trainer gave no sign of life for {context.settings.stall_seconds:.0f} s"
            )


def _take(
    context: Context,
    attempt: Attempt,
    kind: str,
    data: dict[str, Any],
    uploader: ThreadPoolExecutor,
) -> None:
    if kind in ("done", "stopped", "error"):
        attempt.outcome = (kind, data)
    elif kind == "checkpoint":
        attempt.uploads.append(
            (data, uploader.submit(artifacts.store_checkpoint, context, attempt.job, data))
        )
    else:
        attempt.reports.append((kind, data))


def _write(context: Context, attempt: Attempt) -> None:
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
        for kind, data in attempt.reports:
            _record(session, attempt, kind, data, columns, metrics)
        attempt.cancel = jobs.renew(
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
        events.add(
            session, job.id, "phase", f"Phase: {data['phase'].replace('_', ' ')}.", data=data
        )
    elif kind == "plan":
        job.spec = columns["spec"] = data["spec"] | {"validation": job.spec.get("validation")}
        columns["total_steps"] = data["total_steps"]
        dropped = data["dropped"]
        message = f"{data['rows']} rows, {data['trained_tokens']} trained tokens, {data['total_steps']} steps."
        events.add(
            session,
            job.id,
            "plan",
            message + (f" {len(dropped)} rows are too long and left out." if dropped else ""),
            level="warning" if dropped else "info",
            data={name: value for name, value in data.items() if name != "spec"},
        )
    elif kind == "model_loaded":
        attempt.model_seconds = data["seconds"]
    elif kind == "first_step":
        seconds = time.time() - job.created_at.timestamp()
        events.add(
            session,
            job.id,
            "first_step",
            f"First optimizer step {seconds:.1f} s after the job was posted "
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
            {
                "train_loss" if name == "loss" else name: value
                for name, value in data["values"].items()
            }
        )
        if data["progress"]:
            columns.update(step=data["step"], **data["progress"])


def _publish(context: Context, attempt: Attempt, folder: Path, metrics: dict[str, float]) -> None:
    job = attempt.job
    adapter = artifacts.store_adapter(context, job, folder, metrics, attempt.work)
    try:
        with context.sessions.begin() as session:
            jobs.renew(
                session,
                job.id,
                job.fence,
                context.settings.lease_seconds,
                metrics=job.metrics | metrics,
            )
            jobs.succeed(session, job.id, job.fence, adapter)
    except Exception:
        context.storage.delete(adapter.key)
        raise


def _end(context: Context, attempt: Attempt) -> None:
    """The end of an attempt that made no adapter: failed, cancelled, released or crashed."""
    job = attempt.job
    kind, data = attempt.outcome
    with context.sessions.begin() as session:
        if kind == "error":
            jobs.fail(
                session,
                job.id,
                job.fence,
                GraftError(data["code"], data["message"], hint=data["hint"]),
            )
        elif kind == "stopped" and attempt.cancel:
            jobs.cancelled(session, job.id, job.fence)
        elif kind == "stopped":
            jobs.release(
                session,
                job.id,
                job.fence,
                "The worker shuts down; the job goes on from its last checkpoint.",
            )
        else:
            jobs.crash(
                session,
                job.id,
                job.fence,
                data["why"],
                code="worker_crash_loop",
                max_crashes=context.settings.max_crashes,
            )


def _patiently(write: Callable[[], None]) -> None:
    """Try a write until the database is there again."""
    started = time.monotonic()
    while True:
        try:
            write()
        except DatabaseUnavailable:
            if time.monotonic() - started > _DATABASE_PATIENCE:
                raise
            time.sleep(1)
        else:
            return
