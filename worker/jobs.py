"""One job from claim to end, whatever its kind: lease, work folder, and the end of an attempt that made nothing."""

import contextlib
import logging
import shutil
import signal
from collections.abc import Sequence
from typing import Any

from core import log
from core.control.db import DatabaseUnavailable, Session
from core.control.running import attempts
from core.control.tables import Job, JobKind
from core.errors import Fenced, GraftError, StorageFull, is_disk_full
from core.ml.training.config import Spec
from core.ml.training.loop import watchdog
from worker import export, train
from worker.attempt import artifacts
from worker.attempt.heartbeat import beating
from worker.attempt.reports import Attempt
from worker.attempt.supervise import Outcome, patiently
from worker.context import Context

logger = logging.getLogger(__name__)

# So much of what an error says stands in the job's events.
_TOLD = 300
# What makes the thing that a job is about; False: `attempt.outcome` tells what came instead.
_MAKES = {JobKind.TRAIN: train.make, JobKind.EXPORT: export.make}


def run(context: Context) -> str | None:
    """Claim the first job of the queue and see it through; its id, when it waits in the queue again.

    A message wakes a worker, it does not choose the job: what was sent first may not be what comes first.
    """
    if context.stopping.is_set():
        return None
    with context.sessions.begin() as session:
        job = attempts.claim_next(session, context.owner, context.settings.lease_seconds)
    if job is None:
        return None
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
    return job.id if attempt.outcome[0] in ("again", "stopped") and not context.stopping.is_set() else None


def _attempt(context: Context, attempt: Attempt) -> None:
    """Run the attempt and write its end, whatever that is."""
    job, work = attempt.job, attempt.work
    with contextlib.ExitStack() as stack:
        try:
            shutil.rmtree(work.parent, ignore_errors=True)  # what earlier attempts left when they broke off
            work.mkdir(parents=True)
            stack.enter_context(log.kept(work / log.FILE, job.id))
            logger.info("Attempt %d begins.", job.attempt)
            if _MAKES[job.kind](context, attempt):
                return
        except GraftError as error:
            logger.error("%s: %s", error.code, error.message)  # noqa: TRY400 - it is one line, for whoever posted the job
            attempt.outcome = ("error", error.as_dict())
        except (Fenced, *DatabaseUnavailable):
            raise
        except Exception as error:
            logger.exception("the attempt broke off in the worker")
            attempt.outcome = _broken(error)
        artifacts.store_log(context, job, work)  # before the end: a job that ended can be deleted
    dropped: list[str] = []
    patiently(lambda: dropped.extend(end(context, attempt)))
    for key in dropped:
        context.storage.delete(key)


def _broken(error: Exception) -> Outcome:
    """What an error in the worker makes of an attempt."""
    if is_disk_full(error):
        return "error", StorageFull("the job's work folder").as_dict()
    told = f": {error}"[:_TOLD].rstrip(" :.").replace("\0", "\ufffd")
    return "crash", {"why": f"the worker met {type(error).__name__}{told}"}


def end(context: Context, attempt: Attempt) -> Sequence[str]:
    """Write the end of an attempt that made nothing; the keys of files that belong to nobody any more.

    It failed, was stopped, changed its spec, or broke off.
    """
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
        elif kind == "stopped":
            attempts.release(session, job.id, job.fence, _why_released(context))
        elif kind == "again":
            return attempts.recover(session, job.id, job.fence, **data)
        else:
            _broke_off(session, context, attempt, data)
    return []


def _why_released(context: Context) -> str:
    if context.stopping.is_set():
        return "The worker shuts down; the job goes on from its last checkpoint."
    return "The pause was taken back after the job had stopped; it goes on from its last checkpoint."


def _broke_off(session: Session, context: Context, attempt: Attempt, data: dict[str, Any]) -> None:
    job, exit_code = attempt.job, data.get("exit_code")
    if changes := _less_memory(session, attempt, exit_code):
        message = (
            "The system killed the trainer twice at the same step, most likely for want of memory; "
            "the job goes on with less of it."
        )
        attempts.recover(
            session,
            job.id,
            job.fence,
            cause="out_of_memory",
            message=message,
            changes=changes,
            from_start=False,
        )
        return
    attempts.crash(
        session,
        job.id,
        job.fence,
        data["why"],
        code="worker_crash_loop",
        max_crashes=context.settings.max_crashes,
        exit_code=exit_code,
    )


def _less_memory(session: Session, attempt: Attempt, exit_code: int | None) -> dict[str, Any] | None:
    """What to change when the system, short of memory, ends the trainer again and again at one place.

    Nothing where it was not training: no change of its spec makes loading or proving smaller.
    """
    if exit_code != -signal.SIGKILL or not attempt.training:
        return None
    job = session.get_one(Job, attempt.job.id, populate_existing=True)
    if not attempts.killed_before(session, job, exit_code):
        return None
    spec = {name: value for name, value in job.spec.items() if name != "validation"}
    return watchdog.next_rung(tuple(job.recoveries), "out_of_memory", Spec.model_validate(spec))
