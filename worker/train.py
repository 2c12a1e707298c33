"""One job from claim to end: start the trainer, write what it reports, publish what it made.

Heartbeat, cancel and shutdown ride on the same loop. Artifact first, row second: files lie in the
storage, whole, before a row names them.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from core import log
from core.control import attempts, events
from core.control.db import DatabaseUnavailable, reading
from core.control.tables import Adapter, Asked, Checkpoint
from core.errors import Fenced, GraftError
from core.ml.training.run import Run
from worker import artifacts, child, reports
from worker.context import Context
from worker.heartbeat import beating
from worker.reports import Attempt

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
# A database that is away does not end a training; one that stays away does.
_DATABASE_PATIENCE = 600.0


def run(context: Context, job_id: str) -> None:
    """Claim the job and see it through; returns at once when it is somebody else's."""
    if context.stopping.is_set():
        return
    with context.sessions.begin() as session:
        job = attempts.claim(session, job_id, context.owner, context.settings.lease_seconds)
    if job is None:
        return
    token = log.job_id.set(job.id)
    attempt = Attempt(job, context.settings.scratch / job.id / str(job.fence))
    try:
        with beating(context, attempt):
            _attempt(context, attempt)
    except Fenced:
        logger.warning("lease lost; this attempt writes nothing more")
    finally:
        shutil.rmtree(attempt.work, ignore_errors=True)
        with contextlib.suppress(OSError):  # a newer attempt works beside it
            attempt.work.parent.rmdir()
        log.job_id.reset(token)


def _attempt(context: Context, attempt: Attempt) -> None:
    """Run the attempt and write its end, whatever that is."""
    try:
        adapter_folder = _train(context, attempt)
        if adapter_folder is not None:
            _publish(context, attempt, *adapter_folder)
            return
    except GraftError as error:
        attempt.outcome = ("error", error.as_dict())
    except (Fenced, *DatabaseUnavailable):
        raise
    except Exception as error:
        logger.exception("the attempt broke off in the worker")
        attempt.outcome = ("crash", {"why": f"the worker met {type(error).__name__}"})
    _patiently(lambda: _end(context, attempt))


def _train(context: Context, attempt: Attempt) -> tuple[Path, dict[str, float]] | None:
    """The trainer from start to end; the finished adapter's folder and metrics, if it got so far."""
    run = _inputs(context, attempt)
    trainer = child.start("train", run, attempt.job.id, patience=context.settings.lease_seconds)
    attempt.trainer = trainer
    with ThreadPoolExecutor(1, thread_name_prefix="upload") as uploader:
        try:
            _supervise(context, attempt, trainer, uploader)
        finally:
            trainer.close()
        wait([upload for _, upload in attempt.uploads])
    _patiently(lambda: reports.write(context, attempt))
    kind, data = attempt.outcome
    return (Path(data["folder"]), data["metrics"]) if kind == "done" else None


def _inputs(context: Context, attempt: Attempt) -> Run:
    """Everything the trainer needs, as files on this machine."""
    job, work = attempt.job, attempt.work
    shutil.rmtree(work.parent, ignore_errors=True)  # what earlier attempts left when they broke off
    work.mkdir(parents=True)
    with reading(context.sessions) as session:
        saved = events.checkpoints(session, job.id)
    run = artifacts.fetch_run(context, job, work)
    resume, _ = _resume(context, attempt, saved)
    return replace(run, resume=resume)


def _resume(context: Context, attempt: Attempt, saved: list[Checkpoint]) -> tuple[Path | None, int]:
    """The newest checkpoint that is whole, brought here, and its step; what comes after it is dropped."""
    job = attempt.job
    folder, step = None, 0
    for row in saved:
        target = attempt.work / f"resume-{row.step}"
        if artifacts.fetch_checkpoint(context, row, target):
            folder, step = target, row.step
            break
    # Newer ones that are damaged would push the good ones out.
    damaged = [row for row in saved if row.step > step]
    with context.sessions.begin() as session:
        attempts.renew(session, job.id, job.fence, context.settings.lease_seconds, step=step)
        events.forget_after(session, job.id, step)
        events.drop_checkpoints(session, damaged)
        for row in damaged:
            message = f"The checkpoint of step {row.step} is damaged and was not used."
            events.add(
                session, job.id, "checkpoint_damaged", message, level="warning", data={"step": row.step}
            )
        if folder is not None:
            message = f"Resumed from the checkpoint of step {step}."
            events.add(session, job.id, "resumed", message, data={"step": step})
    for row in damaged:
        context.storage.delete(row.key)
    return folder, step


def _supervise(
    context: Context, attempt: Attempt, trainer: child.Child, uploader: ThreadPoolExecutor
) -> None:
    """Until the trainer has ended: take its reports, write them, renew the lease, pass on stops."""
    written = heard = time.monotonic()
    asked = False
    while True:
        ended = trainer.exit_code is not None
        news = trainer.receive(0 if ended else _TICK_SECONDS)
        for kind, data in news:
            _take(context, attempt, kind, data, uploader)
        if ended and not news:
            break
        heard = time.monotonic() if news else heard
        if time.monotonic() - heard > context.settings.stall_seconds:
            raise TimeoutError(f"the trainer gave no sign of life for {context.settings.stall_seconds:.0f} s")
        if attempt.fenced:
            raise Fenced(f"job {attempt.job.id} was taken back")
        waiting = attempt.reports or any(upload.done() for _, upload in attempt.uploads)
        if not waiting or _write_if_possible(context, attempt, written):
            written = time.monotonic()
        if (attempt.asked or context.stopping.is_set()) and not asked:
            asked = True
            trainer.tell("stop")
        if attempt.asked and not attempt.training:
            # Nothing is there to be saved yet, and loading a model can take long.
            trainer.kill()
            attempt.outcome = ("stopped", {})
    if attempt.outcome[0] == "crash":
        attempt.outcome = (
            "crash",
            {"why": f"its trainer process ended with exit code {trainer.exit_code}"},
        )


def _write_if_possible(context: Context, attempt: Attempt, written: float) -> bool:
    """Training goes on without the database for a while: nobody else can claim the job either."""
    try:
        reports.write(context, attempt)
    except DatabaseUnavailable:
        if time.monotonic() - written > _DATABASE_PATIENCE:
            raise
        logger.warning("database is away; training goes on")
        time.sleep(1)
        return False
    return True


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


def _publish(context: Context, attempt: Attempt, folder: Path, metrics: dict[str, float]) -> None:
    """Store the adapter once, then insert its row and end the job, as often as the database needs."""
    job = attempt.job
    fields = artifacts.store_adapter(context, job, folder, metrics, attempt.work)

    def succeed() -> None:
        with context.sessions.begin() as session:
            attempts.renew(
                session, job.id, job.fence, context.settings.lease_seconds, metrics=job.metrics | metrics
            )
            attempts.succeed(session, job.id, job.fence, Adapter(**fields))

    try:
        _patiently(succeed)
    except DatabaseUnavailable:
        raise  # nobody knows whether the row is there: files too many are cheap, files missing are not
    except Exception:
        with reading(context.sessions) as session:
            arrived = session.get(Adapter, fields["id"]) is not None
        if not arrived:  # the answer of an earlier commit can be lost
            context.storage.delete(Adapter(**fields).key)
            raise


def _end(context: Context, attempt: Attempt) -> None:
    """The end of an attempt that made no adapter: failed, cancelled, released or crashed."""
    job = attempt.job
    kind, data = attempt.outcome
    with context.sessions.begin() as session:
        if kind == "error":
            attempts.fail(
                session,
                job.id,
                job.fence,
                GraftError(data["code"], data["message"], hint=data["hint"]),
            )
        elif kind == "stopped" and attempt.asked is Asked.CANCEL:
            attempts.cancelled(session, job.id, job.fence)
        elif kind == "stopped":
            attempts.release(
                session,
                job.id,
                job.fence,
                "The worker shuts down; the job goes on from its last checkpoint.",
            )
        else:
            attempts.crash(
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
