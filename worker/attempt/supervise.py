"""A child process of a job from start to end: its reports, the lease, and what is asked of it meanwhile."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from core.control.db import DatabaseUnavailable, Session, reading
from core.control.running import attempts
from core.control.tables import Adapter, Export, Job
from core.errors import Fenced
from worker import device
from worker.attempt import artifacts, reports
from worker.attempt.reports import Attempt
from worker.child import spawn
from worker.context import Context

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_LOG_SECONDS = 10.0
# A database that is away does not end a training; one that stays away does.
_DATABASE_PATIENCE = 600.0
# How a child's work ends; everything else it reports happens on the way.
_ENDS = ("done", "proved", "stopped", "again", "error")

Outcome = tuple[str, dict[str, Any]]


def see_through(context: Context, attempt: Attempt, function: str, *args: Any) -> Outcome:
    """Run `worker.child.trainer.<function>(*args, report, stop)` in a process of its own, and take its outcome.

    It is ("crash", {why, exit_code}) when the process ends without a word or gives no sign of life for too long, and
    ("stopped", {}) when it was asked to leave. All else that it reported is written by then.

    Raises:
        Fenced: the job belongs to a newer claim.
        StorageFull: a checkpoint could not be stored.
    """
    attempt.outcome, attempt.training = ("crash", {}), False
    with ThreadPoolExecutor(1, thread_name_prefix="upload") as uploader:
        with device.needed(context, leave=lambda: bool(attempt.asked) or attempt.fenced) as attempt.settled:
            process = spawn.start(function, *args, patience=context.settings.lease_seconds)
            attempt.child = process
            try:
                _until_end(context, attempt, process, uploader)
            finally:
                process.close()
        wait([upload for _, upload in attempt.uploads])
    artifacts.store_log(context, attempt.job, attempt.work)
    patiently(lambda: reports.write(context, attempt))
    return attempt.outcome


def patiently(write: Callable[[], None]) -> None:
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


def insert(
    context: Context,
    job: Job,
    make: Callable[[], Adapter | Export],
    tell: Callable[[Session], None],
) -> None:
    """Insert the row of files that are stored, write what else there is to `tell`, and end the job: one transaction,
    as often as the database needs. Where the row does not arrive its files go."""

    def succeed() -> None:
        with context.sessions.begin() as session:
            tell(session)
            attempts.succeed(session, job.id, job.fence, make())

    try:
        patiently(succeed)
    except DatabaseUnavailable:
        raise  # nobody knows whether the row is there: files too many are cheap, files missing are not
    except Exception:
        made = make()
        with reading(context.sessions) as session:
            arrived = session.get(type(made), made.id) is not None
        if not arrived:  # the answer of an earlier commit can be lost
            context.storage.delete(made.key)
            raise


def _until_end(
    context: Context, attempt: Attempt, process: spawn.Child, uploader: ThreadPoolExecutor
) -> None:
    written = heard = logged = time.monotonic()
    told = False
    log: Future[None] | None = None
    for news in process.news(_TICK_SECONDS):
        # One at a time: behind a checkpoint that takes minutes, each would store the same file.
        if time.monotonic() - logged > _LOG_SECONDS and (log is None or log.done()):
            logged = time.monotonic()
            log = uploader.submit(artifacts.store_log, context, attempt.job, attempt.work)
        for kind, data in news:
            _take(context, attempt, kind, data, uploader)
        heard = time.monotonic() if news else heard
        if time.monotonic() - heard > context.settings.stall_seconds:
            why = f"its trainer gave no sign of life for {context.settings.stall_seconds:.0f} s"
            attempt.outcome = ("crash", {"why": why})
            return
        if attempt.fenced:
            raise Fenced(f"job {attempt.job.id} was taken back")
        waiting = attempt.reports or any(upload.done() for _, upload in attempt.uploads)
        if not waiting or _write_if_possible(context, attempt, written):
            written = time.monotonic()
        if (attempt.asked or context.stopping.is_set()) and not told:
            told = True
            _stop(attempt, process)
    if attempt.outcome[0] == "crash":
        code = process.exit_code
        attempt.outcome = (
            "crash",
            {"why": f"its trainer process ended with exit code {code}", "exit_code": code},
        )


def _stop(attempt: Attempt, process: spawn.Child) -> None:
    """Let a training save and leave. Otherwise nothing is there to be saved, and loading a model can take long."""
    if attempt.training:
        process.tell("stop")
    elif attempt.outcome[0] == "crash":
        process.kill()
        attempt.outcome = ("stopped", {})


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
    data = _cleaned(data)
    if kind in _ENDS:
        attempt.outcome = (kind, data)
    elif kind == "checkpoint":
        attempt.uploads.append(
            (data, uploader.submit(artifacts.store_checkpoint, context, attempt.job, data))
        )
    else:
        if kind == "first_step":
            attempt.settled()
        attempt.training = attempt.training or (kind, data.get("phase")) == ("phase", "training")
        attempt.reports.append((kind, data))


def _cleaned(said: Any) -> Any:
    """What a child says without what Postgres takes in no row: numbers that are not finite, and U+0000 in texts."""
    if isinstance(said, str):
        return said.replace("\0", "\ufffd")
    if isinstance(said, dict):
        return {name: _cleaned(value) for name, value in said.items() if not _infinite(value)}
    if isinstance(said, list | tuple):
        return [None if _infinite(value) else _cleaned(value) for value in said]
    return said


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
