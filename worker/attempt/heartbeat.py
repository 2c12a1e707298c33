"""The heartbeat of a claimed job, whatever its worker is busy with."""

import contextvars
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from core.control.running import attempts
from core.errors import Fenced
from worker.attempt.reports import Attempt
from worker.context import Context

logger = logging.getLogger(__name__)


@contextmanager
def beating(context: Context, attempt: Attempt) -> Iterator[None]:
    """Renew the lease from a thread of its own: fetching, starting and storing can take long."""
    over = threading.Event()
    job, settings = attempt.job, context.settings

    def beat() -> None:
        while not over.wait(settings.heartbeat_seconds):
            try:
                with context.sessions.begin() as session:
                    attempt.asked = attempts.renew(session, job.id, job.fence, settings.lease_seconds)
            except Fenced:
                attempt.fenced = True
                return
            except Exception:
                # Most likely the database is away. Nobody else can claim the job either, so its
                # trainer may go on.
                logger.exception("the lease is not renewed")
            if attempt.child is not None:
                attempt.child.tell("beat")

    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(beat,), name="heartbeat", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
