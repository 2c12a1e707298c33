"""The sweep: jobs whose worker is gone go back to the queue, messages that were missed are sent, files of nobody go.

It runs in two threads of every worker, the second for the files, since listing a bucket can take long; the process
that holds the lease row does the work.
"""

import contextlib
import logging
import shutil
import threading
import time

from celery import Celery

from core.control import queue
from core.control.db import DatabaseUnavailable, Session, reading
from core.control.running import attempts, orphans, probes, workers
from core.control.tables import FINISHED, Job
from core.ml import memory
from worker.context import Context

logger = logging.getLogger(__name__)

_DUTY, _ORPHANS_DUTY = "sweep", "orphans"
_ORPHANS_SECONDS = 3600.0


def start(context: Context, app: Celery) -> None:
    threading.Thread(target=_loop, args=(context, app), name="sweep", daemon=True).start()
    threading.Thread(target=_orphans_loop, args=(context,), name="orphans", daemon=True).start()


def _loop(context: Context, app: Celery) -> None:
    settings = context.settings
    # After a start or a silence of the database, leases may be old only because nobody could renew
    # them: look at them again after one lease.
    patient_until = time.monotonic() + settings.lease_seconds
    while not context.stopping.wait(settings.sweep_seconds):
        started = time.monotonic()
        try:
            sweep(context, app, trust_leases=started > patient_until)
            slow = time.monotonic() - started > settings.lease_seconds / 2
        except DatabaseUnavailable:
            logger.warning("sweep: database is away")
            slow = True
        except Exception:
            logger.exception("sweep failed")
            slow = False
        if slow:
            patient_until = time.monotonic() + settings.lease_seconds


def _orphans_loop(context: Context) -> None:
    # Not at once: whoever started with the wrong database has an hour to see it.
    while not context.stopping.wait(_ORPHANS_SECONDS):
        try:
            with context.sessions.begin() as session:
                mine = workers.take_duty(session, _ORPHANS_DUTY, context.owner, _ORPHANS_SECONDS)
            if mine:
                remove_orphans(context)
        except Exception:
            logger.exception("files of nobody are not removed")


def remove_orphans(context: Context) -> None:
    """Remove what was stored and has no row, because its process died before it could write or delete."""
    for folder in ("datasets", "jobs", "adapters"):
        _remove_orphans(context, folder)
    with reading(context.sessions) as session:
        worked_on = orphans.worked_on(session)
    for folder in worked_on:
        _remove_orphans(context, folder)


def _remove_orphans(context: Context, folder: str) -> None:
    # The files before the rows: a row that comes in between is seen.
    if not (names := context.storage.folders(folder)):
        return
    with reading(context.sessions) as session:
        left = orphans.among(session, folder, names)
    for key in (f"{folder}/{name}" for name in left):
        try:
            context.storage.delete(key)
        except Exception:
            logger.exception("files without a row are not removed", extra={"key": key})
        else:
            logger.info("removed files without a row", extra={"key": key})


def sweep(context: Context, app: Celery, *, trust_leases: bool) -> None:
    """One round. Without `trust_leases` only jobs of workers known to be dead are taken back."""
    settings = context.settings
    with context.sessions.begin() as session:
        _measure_memory(context, session)
        workers.beat(session, context.owner, settings.worker_slots, context.device or None)
        mine = workers.take_duty(session, _DUTY, context.owner, settings.sweep_seconds * 3)
    if mine:
        _take_back(context, trust_leases)
        _send_waiting(context, app)
    _clear_scratch(context)


def _measure_memory(context: Context, session: Session) -> None:
    """Have the device tell what memory a job finds: a CPU's as it is now, unless work of our own takes some of it.

    A GPU's stays the number of the start: only a process with a context on it sees its memory.
    """
    if context.device.get("cuda") is not False or not probes.is_idle(session, context.owner):
        return
    context.device["free_bytes"] = memory.free_bytes() // context.settings.trainer_processes


def _take_back(context: Context, trust_leases: bool) -> None:
    with context.sessions.begin() as session:
        dead = workers.dead_here(session)
        for job in attempts.lost(session, dead):
            if job.owner not in dead and not trust_leases:
                continue
            attempts.crash(
                session,
                job.id,
                job.fence,
                "its worker was lost",
                code="worker_lost",
                max_crashes=context.settings.max_crashes,
            )
            logger.warning("took a job back from a lost worker", extra={"job_id": job.id, "owner": job.owner})
        workers.forget(session, dead)


def _send_waiting(context: Context, app: Celery) -> None:
    with reading(context.sessions) as session:
        waiting = attempts.unsent(session, workers.idle_slots(session))
    for job_id in waiting:
        if not queue.send(app, job_id):
            break
        with context.sessions.begin() as session:
            attempts.mark_sent(session, job_id)


def _clear_scratch(context: Context) -> None:
    """Remove work folders of jobs and probes that no worker runs any more."""
    if not context.settings.scratch.is_dir():
        return
    for folder in context.settings.scratch.iterdir():
        with reading(context.sessions) as session:
            job = session.get(Job, folder.name)
            over = job is None or job.status in FINISHED or job.owner is None
        keep = (
            2 * probes.PATIENCE_SECONDS
            if folder.name.startswith("probe_")
            else context.settings.lease_seconds
        )
        with contextlib.suppress(FileNotFoundError):  # its job ended in this moment
            if over and time.time() - folder.stat().st_mtime > keep:
                shutil.rmtree(folder, ignore_errors=True)
