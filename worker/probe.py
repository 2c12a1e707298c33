"""What a run would take on this machine's device: a few real steps in a trainer process, then thrown away."""

import logging
import shutil
import signal
import threading
import time
from typing import Any

from core.control.db import reading
from core.control.running import probes
from core.control.tables import Probe
from core.errors import GraftError, OutOfMemory
from core.ml.training.run import Run
from worker import device
from worker.attempt import artifacts
from worker.child import spawn
from worker.context import Context

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.5
_SILENCE_SECONDS = 60
_BUSY = {"unknown": "No worker is free."}
_LEAVING = {"unknown": "The worker shuts down."}
_TOGETHER = {"unknown": "The worker trains in several processes at once, which is not measured beforehand."}
_TOO_LARGE = {
    "unknown": "It takes more memory than there is. A job would go on with half the rows at a time, as often as there are "
    "any to halve, and fail then."
}
# Two runs at once would be measured on half a device each.
_alone = threading.Lock()


def run(context: Context, probe_id: str) -> None:
    """Measure, and write the answer; returns at once when nobody waits for it any more."""
    with reading(context.sessions) as session:
        question = probes.open_question(session, probe_id)
        busy = probes.is_busy(session, context.owner)
    if question is None:
        return
    if context.settings.trainer_processes > 1:
        found = _TOGETHER
    elif context.stopping.is_set():
        found = _LEAVING
    elif busy or not _alone.acquire(blocking=False):
        found = _BUSY
    else:
        try:
            found = _found(context, *question)
        finally:
            _alone.release()
    with context.sessions.begin() as session:
        probes.answer(session, probe_id, found)


def _found(context: Context, asked: Probe, seconds: float) -> dict[str, Any]:
    """The answer: {measured}, or the {error} that a job would end with, or why both are {unknown}."""
    until = time.monotonic() + seconds
    work = context.settings.scratch / asked.id
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a worker that died over the same question
        work.mkdir(parents=True)
        run = artifacts.fetch_run(context, asked, work)
        with device.needed(context, until - time.monotonic()):
            return _measured(context, run, until)
    except GraftError as error:
        return {"error": error.as_dict() | {"param": error.param}}
    except Exception as error:
        logger.exception("the probe broke off in the worker")
        return {"unknown": f"The worker met {type(error).__name__}."}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measured(context: Context, run: Run, until: float) -> dict[str, Any]:
    trainer = spawn.start("probe", run, patience=_SILENCE_SECONDS)
    found: dict[str, Any] = {}
    try:
        for news in trainer.news(_TICK_SECONDS):
            found |= {kind: data for kind, data in news if kind in ("measured", "error")}
            if context.stopping.is_set():
                return _LEAVING
            if time.monotonic() > until:
                return {"unknown": "The probe took too long."}
            trainer.tell("beat")
    finally:
        trainer.close()
    if not found and trainer.exit_code == -signal.SIGKILL:
        return _TOO_LARGE  # the system ends what takes too much
    if found.get("error", {}).get("code") == OutOfMemory().code:
        return _TOO_LARGE
    return found or {"unknown": f"The probe's process ended with exit code {trainer.exit_code}."}
