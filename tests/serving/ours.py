"""The inference server as a process of its own, with one base model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests import tiny


class Ours:
    """As `graft up` runs it, and starts it again when it dies."""

    def __init__(self, home: Path, base: Path, storage: Path, **settings: str) -> None:
        """`settings` by the names of the environment, in which 16 bits are held otherwise."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
        self.environment = clean | {
            "GRAFT_HOME": str(home),
            "GRAFT_STORAGE_URL": str(storage),
            "GRAFT_MODELS": json.dumps({tiny.NAME: str(base)}),
            "GRAFT_ENGINE_BITS": "16",
            **settings,
        }
        self.start()

    def start(self) -> None:
        words = ["-m", "uvicorn", "--factory", "worker.inference.main:create_app", "--log-level", "warning"]
        command = [sys.executable, *words, "--port", str(self.port), "--timeout-graceful-shutdown", "5"]
        self.process = subprocess.Popen(command, env=self.environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise TimeoutError("the engine did not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> None:
        self.kill()
