"""Trainer processes: started in a moment from a warm fork server, watched over a pipe.

The fork server imports the learning libraries once, when the worker starts, and never touches the
GPU; each job is a fork of it. This module itself imports none of them: it runs in the worker too.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_PR_SET_PDEATHSIG = 1
# What a trainer may know of its worker's environment: no database, storage or API credentials.
_SECRET = ("GRAFT_", "AWS_", "CELERY_")


def warm_up() -> None:
    """Start the fork server; it imports the libraries while the worker goes on."""
    # Before OpenMP loads: two processes on the same cores must not spin while they wait for each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Look for GPUs without opening them: what is opened before the fork is broken after it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    _CONTEXT.set_forkserver_preload(["worker.trainer"])
    forkserver.ensure_running()


def cool_down() -> None:
    """End the fork server; its own way out takes seconds."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Child:
    """A trainer at work. `receive` gives its reports; `ask_to_stop` ends it after the current step."""

    process: Any
    pipe: Connection

    def receive(self, timeout: float) -> list[tuple[str, dict[str, Any]]]:
        """The reports that are there, after waiting up to `timeout` seconds for the first."""
        wait([self.pipe, self.process.sentinel], timeout)
        reports = []
        try:
            while self.pipe.poll():
                reports.append(self.pipe.recv())
        except (EOFError, OSError):
            self.process.join(10)
        return reports

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode if not self.process.is_alive() else None

    def ask_to_stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("stop")

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def close(self) -> None:
        self.kill()
        self.pipe.close()


def start(function: str, *args: Any) -> Child:
    """Run `worker.trainer.<function>(*args, report, stop)` in a process of its own."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_main, args=(function, args, theirs), daemon=True)
    process.start()
    theirs.close()
    return Child(process, ours)


def _main(function: str, args: tuple[Any, ...], pipe: Connection) -> None:
    """The trainer's first steps: it must not outlive its worker, nor know its secrets."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The fork server ends when the last holder of this descriptor is gone, and we are its children.
    with contextlib.suppress(OSError, TypeError):
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in [name for name in os.environ if name.startswith(_SECRET)]:
        del os.environ[name]
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(pipe, stopping), daemon=True).start()
    lock = threading.Lock()

    def report(kind: str, /, **data: Any) -> None:
        with lock:
            pipe.send((kind, data))

    from worker import trainer  # noqa: PLC0415 - not in the worker, whose process imports this file

    getattr(trainer, function)(*args, report, stopping.is_set)


def _listen(pipe: Connection, stopping: threading.Event) -> None:
    try:
        while True:
            pipe.recv()
            stopping.set()
    except (EOFError, OSError):
        # The worker is gone. Whatever this process would still write belongs to nobody.
        os._exit(75)
