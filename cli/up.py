"""`graft up`: migrations, then broker, API, worker and inference server as one supervised tree.

Supervisor keeps the processes running and ends them; this module writes its configuration, prints
what a user needs, and passes signals on.
"""

import contextlib
import ctypes
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import typer

from cli import tree
from core import settings as settings_module
from core.settings import Settings
from graft_client.client import ApiError, Client, UnreachableError
from migrations.upgrade import upgrade

_READY_SECONDS = 120
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ORPHAN_SECONDS = 20


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
        environment, programs = tree.plan(settings, key)
        config = settings.home / "run" / "supervisord.conf"
        config.write_text(tree.configuration(settings, programs))
        _supervise(settings, config, environment, key, is_new)


def _supervise(settings: Settings, config: Path, environment: dict[str, str], key: str, is_new: bool) -> None:
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    # Processes that lose their parent, as when supervisor is killed, become children of this one.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # A session of its own: Ctrl-C reaches this process alone, which then ends the tree in order.
    running = subprocess.Popen(  # noqa: S603 - our own interpreter; no thread runs yet
        [*tree.PYTHON, "supervisor.supervisord", "-n", "-c", str(config)],
        env=environment,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - no thread runs yet
        stdout=subprocess.DEVNULL,
    )
    started = time.monotonic()
    announced = False
    try:
        while running.poll() is None and not asked.wait(0.2):
            _reap(running.pid)
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
        if running.poll() is None:
            typer.echo("Stopping …")
            running.terminate()
        running.wait()
        _end_orphans()
    if not asked.is_set():
        typer.echo(f"The service ended by itself; the logs are in {settings.home / 'logs'}.", err=True)
        raise typer.Exit(1)
    typer.echo("Stopped.")


def _announce(settings: Settings, key: str, is_new: bool, seconds: float) -> None:
    url = address(settings)
    with Client(url, key) as client:
        try:
            accepted = bool(client.models())
        except (ApiError, UnreachableError):
            accepted = False
    if accepted and is_new:
        typer.echo(f"Admin API key, shown this once: {key}\nIt is kept in {settings.home / 'admin.key'}.")
    if not accepted:
        # The database had an admin before this file was made, so its key was never entered.
        if is_new:
            (settings.home / "admin.key").unlink()
        typer.echo("The database has an admin key already, and it is not in this home folder.", err=True)
    typer.echo(f"Graft is up at {url} after {seconds:.1f} s. Ctrl-C stops it.")


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


def _reap(own: int) -> None:
    """Take note of the ends of orphans, which came to this process."""
    for pid in _children():
        if pid != own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    me = str(os.getpid())
    return [int(pid) for pid in (Path("/proc/self/task") / me / "children").read_text().split()]


def _end_orphans() -> None:
    """End what supervisor left behind when it did not end by itself."""
    for number, seconds in ((signal.SIGTERM, _ORPHAN_SECONDS), (signal.SIGKILL, _ORPHAN_SECONDS)):
        deadline = time.monotonic() + seconds
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while time.monotonic() < deadline:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.1)
            except ChildProcessError:
                return


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
