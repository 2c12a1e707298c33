"""A worker's context without a worker process."""

import threading
from pathlib import Path

import pytest

from core.control.db import Sessions
from core.ml.catalogue import Catalogue
from core.settings import Settings
from core.storage import Storage
from tests import tiny
from tests.control import rows
from worker.context import Context


@pytest.fixture
def project_id(sessions: Sessions) -> str:
    return rows.project(sessions)


@pytest.fixture
def context(sessions: Sessions, tmp_path: Path, tiny_model: Path) -> Context:
    settings = Settings(home=tmp_path / "home")
    storage = Storage(settings.storage)
    return Context(
        settings,
        sessions,
        storage,
        Catalogue(tmp_path, {tiny.NAME: str(tiny_model)}),
        "worker_1",
        threading.Event(),
    )
