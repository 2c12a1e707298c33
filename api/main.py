"""The API process: `create_app` opens what it needs and hangs up the routes."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from api import errors
from api.deps import Services
from api.engine.client import Engine
from api.middleware import RequestId
from api.openai import chat, completions
from api.openai import models as openai_models
from api.requests import LimitBody
from api.routes import (
    adapters,
    control,
    conversations,
    datasets,
    docs,
    exports,
    generate,
    health,
    jobs,
    keys,
    models,
    preflight,
    presets,
    preview,
)
from core import log
from core.control import db, projects, queue
from core.control.tables import Role
from core.ml.catalogue import Catalogue
from core.settings import Settings, load
from core.storage import Storage

# No upload takes longer.
_UPLOAD_SECONDS = 3600


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; without settings they come from the environment."""
    settings = settings or load()
    log.setup(settings.log_level)
    services = Services(
        settings=settings,
        sessions=db.connect(settings.database),
        storage=Storage(settings.storage, s3_endpoint_url=settings.s3_endpoint_url),
        sender=queue.Sender(queue.create(settings)),
        engine=Engine(
            settings.engine_url,
            settings.engine_key.get_secret_value() if settings.engine_key else None,
            settings.engine_answer_seconds,
        ),
        catalogue=Catalogue(settings.models_folder, settings.models, settings.allow_hub),
    )
    app = FastAPI(
        title="Graft",
        description="Fine-tune language models on your own machines.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.services = services
    errors.install(app)
    app.add_middleware(LimitBody, upload_max_bytes=settings.upload_max_bytes)
    app.add_middleware(RequestId)
    for module in (
        datasets,
        preview,
        conversations,
        preflight,
        jobs,
        control,
        adapters,
        exports,
        generate,
        models,
        presets,
        chat,
        completions,
        openai_models,
        keys,
        docs,
        health,
    ):
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    _empty_uploads(services.settings.uploads)
    # The multipart parser spools large files with tempfile, which knows no other way to be told.
    tempfile.tempdir = str(services.settings.uploads)
    _first_admin(services)
    yield
    services.sender.close()
    await services.engine.close()


def _empty_uploads(folder: Path) -> None:
    """Have the folder, without what a killed process left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if time.time() - left.stat().st_mtime > _UPLOAD_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _first_admin(services: Services) -> None:
    """Enter the admin key of the settings, where the database has no admin key yet."""
    if services.settings.admin_key is None:
        return
    key = services.settings.admin_key.get_secret_value()
    with (
        contextlib.suppress(db.AlreadyThere),
        services.sessions.begin() as session,
    ):  # another process was first
        if not projects.has_admin(session):
            project = projects.default_project(session)
            projects.create_key(session, project.id, "first admin key", Role.ADMIN, key=key)
