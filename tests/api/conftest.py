"""The whole API in this process: real database, real files, no worker and no engine."""

import json
import logging
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.deps import Services
from api.main import create_app
from core.control import projects
from core.control.db import Sessions, engine_of
from core.control.tables import Role
from core.settings import Settings
from core.storage import Storage
from tests import tiny
from tests.conftest import fresh_database

ADMIN_KEY = "gr_0123456789ab_an-admin-key-for-the-tests"
ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(1, 6)]


@dataclass(frozen=True)
class Api:
    """`client` carries the admin's key, `stranger` the key of another project, `nobody` none."""

    app: FastAPI
    client: TestClient
    stranger: TestClient
    nobody: TestClient
    project_id: str

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def sessions(self) -> Sessions:
        return self.services.sessions

    @property
    def storage(self) -> Storage:
        return self.services.storage

    def stored(self) -> list[str]:
        """Every file in the storage."""
        root = Path(self.services.settings.storage)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def upload(
        self, content: bytes | list[dict[str, Any]] = ROWS, filename: str = "rows.jsonl", **form: str
    ) -> Any:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        return self.client.post("/datasets", files={"file": (filename, content)}, data=form)

    def dataset_id(self) -> str:
        answer = self.upload()
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def routes(self) -> list[tuple[str, str]]:
        """(method, path) of every documented route."""
        paths: dict[str, dict[str, Any]] = self.app.openapi()["paths"]
        return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def refused(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of an answer, after a look at its shape, the same everywhere."""
    assert answer.status_code == status, answer.text[:500]
    request_id = answer.headers["x-request-id"]
    if answer.request.method == "HEAD":
        return {}
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert {"message", "type", "code", "param", "hint", "request_id"} <= set(error)
    assert set(error) <= {"message", "type", "code", "param", "hint", "request_id", "errors", "error_count"}
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    assert error["type"] == kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    assert error["request_id"] == request_id
    assert isinstance(error["message"], str)
    assert len(error["message"]) > 10
    assert re.fullmatch(r"[a-z0-9_]+", error["code"])
    if code is not None:
        assert error["code"] == code
    return error


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine on which every connection is refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def building(
    database_url: str, folder: Path, tiny_model: Path, closed_port: int
) -> Iterator[Callable[..., Api]]:
    """Builds an API over a fresh database; keywords are settings."""
    root = logging.getLogger()
    # What the app sets for its whole process must not outlive the test.
    before = root.handlers[:], root.level, tempfile.tempdir
    with ExitStack() as stack:

        def build(**changes: Any) -> Api:
            settings: dict[str, Any] = {
                "home": folder / "home",
                "database_url": database_url,
                "storage_url": str(folder / "storage"),
                "broker_url": f"redis://127.0.0.1:{closed_port}/0",
                "engine_url": f"http://127.0.0.1:{closed_port}",
                "admin_key": ADMIN_KEY,
                "models": {tiny.NAME: str(tiny_model)},
                "default_model": tiny.NAME,
                "allow_hub": False,
            }
            app = create_app(Settings(**(settings | changes)))
            nobody = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            sessions = app.state.services.sessions
            stack.callback(engine_of(sessions).dispose)
            with sessions.begin() as session:
                ours = projects.default_project(session).id
                theirs = projects.create_project(session, "theirs").id
                _, foreign = projects.create_key(session, theirs, "stranger", Role.MEMBER)
            return Api(app, _with_key(nobody, ADMIN_KEY), _with_key(nobody, foreign), nobody, ours)

        yield build
    root.handlers[:], root.level, tempfile.tempdir = before


@pytest.fixture
def make_api(
    database_url: str, tmp_path: Path, tiny_model: Path, closed_port: int
) -> Iterator[Callable[..., Api]]:
    with building(database_url, tmp_path, tiny_model, closed_port) as build:
        yield build


@pytest.fixture(scope="module")
def shared_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One API on SQLite for the many requests of a module that change nothing."""
    folder = tmp_path_factory.mktemp("shared")
    url = fresh_database(request, "sqlite", folder)
    with building(url, folder, request.getfixturevalue("tiny_model"), 9) as build:
        yield build()


def _with_key(running: TestClient, key: str) -> TestClient:
    """A client of the app that runs already, in the same event loop as a server has it."""
    headers = {"authorization": f"Bearer {key}"}
    client = TestClient(running.app, raise_server_exceptions=False, headers=headers)
    client.portal = running.portal
    return client


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api()


# For what does not depend on the database: HTTP, bodies, limits.
only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
