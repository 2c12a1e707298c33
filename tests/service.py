"""A whole service as processes, as a user starts it: `graft up` in a folder of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from graft_client.client import Client

GRAFT = Path(sys.executable).parent / "graft"
# Faults are noticed in seconds instead of minutes.
QUICK = {"GRAFT_LEASE_SECONDS": "6", "GRAFT_HEARTBEAT_SECONDS": "1", "GRAFT_SWEEP_SECONDS": "0.5"}


class Service:
    """`start` waits until every part answers; `stop` is what Ctrl-C does."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
        self.environment = clean | environment
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> "Service":
        self.output = (self.home.parent / f"{self.home.name}.out").open("w+")
        self.process = subprocess.Popen(
            [str(GRAFT), "up", "--home", str(self.home), "--port", str(self.port)],
            env=self.environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"graft up ended: {self.said()}")
            if (self.home / "admin.key").is_file() and self.client().ready():
                return self
            time.sleep(0.2)
        raise TimeoutError(f"not ready: {self.logs()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def client(self) -> Client:
        return Client(self.url, self.key, timeout=120)

    @property
    def key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    def said(self) -> str:
        self.output.flush()
        return Path(self.output.name).read_text()

    def logs(self) -> str:
        return "\n".join(
            f"== {file.name}\n{file.read_text()[-3000:]}" for file in (self.home / "logs").glob("*.log")
        )

    def pids(self, *words: str) -> list[int]:
        """Ids of this service's processes whose command line holds all the words."""
        return [
            pid
            for pid, line in processes().items()
            if _environment(pid).get("GRAFT_HOME") == str(self.home) and all(word in line for word in words)
        ]


def processes() -> dict[int, str]:
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in raw.split("\0") if "=" in item)


def wait_until(true: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)
