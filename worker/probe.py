"""What a run would take on this machine's device: a few real steps in a trainer process, then thrown away."""

import logging
import shutil
import time
from typing import Any

from core.control import probes
from core.errors import GraftError
from core.ml.training.run import Run
from worker import artifacts, child
from worker.context import Context

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.5
_SILENCE_SECONDS = 60


def run(context: Context, probe_id: str) -> None:
    """Measure, and write the answer; returns at once when nobody waits for it any more."""
    with context.sessions.begin() as session:
        asked = probes.open_question(session, probe_id)
        if asked is None:
            return
        session.expunge(asked)
    work = context.settings.scratch / probe_id
    work.mkdir(parents=True)
    try:
        found = _measured(context, artifacts.fetch_run(context, asked, work))
    except GraftError as error:
        found = {"error": error.as_dict()}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    with context.sessions.begin() as session:
        probes.answer(session, probe_id, found)


def _measured(context: Context, run: Run) -> dict[str, Any]:
    """What the trainer process says: {measured}, or {error} when it cannot."""
    trainer = child.start("probe", run, patience=_SILENCE_SECONDS)
    until = time.monotonic() + probes.PATIENCE_SECONDS
    found: dict[str, Any] = {}
    try:
        while True:
            ended = trainer.exit_code is not None
            news = trainer.receive(0 if ended else _TICK_SECONDS)
            found |= {kind: data for kind, data in news if kind in ("measured", "error")}
            if ended and not news:
                break
            if time.monotonic() > until or context.stopping.is_set():
                return {"unknown": "The probe took too long."}
            trainer.tell("beat")
        return found or {"unknown": f"The probe's process ended with exit code {trainer.exit_code}."}
    finally:
        trainer.close()
