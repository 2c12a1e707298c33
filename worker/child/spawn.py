"""Trainer processes: started in a moment from a warm fork server, watched over a pipe.

The fork server imports the learning libraries once, when the worker starts, and never touches the
GPU; each job is a fork of it. This module itself imports none of them: it runs in the worker too.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from worker.child.parent import end_with_parent

_CONTEXT = multiprocessing.get_context("forkserver")
_NICE = 10
# What a trainer may know of its worker's environment: no database, storage or API credentials.
_SECRET = ("GRAFT_", "AWS_", "CELERY_")


def warm_up() -> None:
    """Start the fork server; it imports the libraries while the worker goes on."""
    # Look for GPUs without opening them: what is opened before the fork is broken after it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    _CONTEXT.set_forkserver_preload(["worker.child.preload", "worker.child.trainer"])
    forkserver.ensure_running()


def cool_down() -> None:
    """End the fork server and its helper, and see them gone; their own way out takes seconds."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@dataclass
class Child:
    """A trainer at work. `news` gives its reports."""

    process: Any
    pipe: Connection
    lock: threading.Lock = field(default_factory=threading.Lock)

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

    def news(self, tick: float) -> Iterator[list[tuple[str, dict[str, Any]]]]:
        """Its reports, every `tick` seconds at least, until it has ended and all are read."""
        while True:
            ended = self.exit_code is not None
            reports = self.receive(0 if ended else tick)
            if ended and not reports:
                return
            yield reports

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode if not self.process.is_alive() else None

    def tell(self, word: Literal["stop", "beat"]) -> None:
        """Ask it to leave after its step, or show it that its worker still runs."""
        with self.lock, contextlib.suppress(OSError):
            self.pipe.send(word)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def close(self) -> None:
        self.kill()
        with self.lock:  # or a beat would go into whatever gets this descriptor next
            self.pipe.close()


def start(function: str, *args: Any, patience: float) -> Child:
    """Run `worker.child.trainer.<function>(*args, report, stop)` in a process of its own.

    It ends by itself when this process is gone, or silent for `patience` seconds.
    """
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_main, args=(function, args, theirs, patience), daemon=True)
    process.start()
    theirs.close()
    return Child(process, ours)


def _main(function: str, args: tuple[Any, ...], pipe: Connection, patience: float) -> None:
    """The trainer's first steps: it must not outlive its worker, nor know its secrets."""
    end_with_parent(signal.SIGKILL)
    # Where processes share cores, their threads spin while they wait for each other, and both crawl.
    # So one of them comes first: the answer somebody waits for, not the training.
    os.nice(_NICE)
    # The fork server ends when the last holder of this descriptor is gone, and we are its children.
    with contextlib.suppress(OSError, TypeError):
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The libraries' million objects stay for good: looking through them for garbage costs a third of
    # the model's loading time and copies the pages that are shared with the fork server.
    gc.freeze()
    for name in [name for name in os.environ if name.startswith(_SECRET)]:
        del os.environ[name]
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(pipe, stopping, patience), daemon=True).start()
    lock = threading.Lock()

    def report(kind: str, /, **data: Any) -> None:
        with lock:
            pipe.send((kind, data))

    from worker.child import trainer  # noqa: PLC0415 - not in the worker, whose process imports this file

    getattr(trainer, function)(*args, report, stopping.is_set)


def _listen(pipe: Connection, stopping: threading.Event, patience: float) -> None:
    try:
        while pipe.poll(patience):
            if pipe.recv() == "stop":
                stopping.set()
    except (EOFError, OSError):
        pass
    # The worker is gone, or stopped for so long that another one may have the job. Whatever this
    # process would still write belongs to nobody.
    os._exit(75)
