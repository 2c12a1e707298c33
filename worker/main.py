"""Celery entry point: `celery -A worker.main worker`. Registers the tasks, opens what it needs."""

import logging
import os
import threading
from typing import Any

from celery import signals

from core import log, settings
from core.control import db, queue
from core.control.running import workers
from core.errors import GraftError
from core.ml import catalogue
from core.ml.catalogue import Catalogue
from core.storage import Storage
from worker import jobs, maintenance, probe
from worker.child import spawn
from worker.context import Context

logger = logging.getLogger(__name__)

config = settings.load()
app = queue.create(config)
_open: list[Context] = []


@app.task(name=queue.TRAIN)
def train_job(_job_id: str) -> None:
    """The message wakes this worker; the job is the first of the queue, whichever is named."""
    if (again := jobs.run(_open[0])) is not None:
        queue.send(app, again)


@app.task(name=queue.PROBE)
def probe_run(probe_id: str) -> None:
    probe.run(_open[0], probe_id)


@signals.setup_logging.connect
def _logging(**_: Any) -> None:
    log.setup(config.log_level)


@signals.worker_init.connect
def _start(**_: Any) -> None:
    try:
        context = _create_context()
    except Exception:
        # Celery would log this and go on as a worker that can do nothing.
        logger.exception("worker cannot start")
        os._exit(1)
    _open.append(context)
    spawn.warm_up()
    threading.Thread(target=_prepare, args=(context,), name="prepare", daemon=True).start()
    maintenance.start(context, app)


def _create_context() -> Context:
    sessions = db.connect(config.database)
    with sessions.begin() as session:
        owner = workers.register(session, config.worker_slots)
    return Context(
        settings=config,
        sessions=sessions,
        storage=Storage(config.storage, s3_endpoint_url=config.s3_endpoint_url),
        catalogue=Catalogue(config.models_folder, config.models, config.allow_hub),
        owner=owner,
        stopping=threading.Event(),
    )


def _prepare(context: Context) -> None:
    """Look at the device and bring the default model's files, in a child process: the worker is up already."""
    try:
        default = catalogue.find(context.catalogue, config.default_model)
    except GraftError as error:
        logger.error("GRAFT_DEFAULT_MODEL names no model", extra={"error": error.as_dict()})  # noqa: TRY400
        return
    sharded = config.trainer_processes > 1 and config.trainer_sharding == "fsdp"
    process = spawn.start("prepare", default, config.trainer_processes, sharded, patience=60)
    try:
        for news in process.news(1):
            for kind, data in news:
                if kind == "device":
                    context.device.update(data)  # the next beat writes it, when the database is there
                elif kind == "error":
                    logger.warning("the default base model is not ready", extra={"error": data})
            process.tell("beat")
    finally:
        process.close()


@signals.worker_shutting_down.connect
def _stop(**_: Any) -> None:
    """Running trainers save and leave; Celery waits for their tasks."""
    for context in _open:
        context.stopping.set()


@signals.worker_shutdown.connect
def _close(**_: Any) -> None:
    for context in _open:
        try:
            with context.sessions.begin() as session:
                workers.leave(session, context.owner)
        except db.DatabaseUnavailable:
            logger.warning("could not sign off")
    spawn.cool_down()
