"""The device of a machine, shared by training and answering.

Both see the same home folder. Whoever is about to take memory for a training says so by a lock on one file, and the
engine by a lock on another that it holds a model. The system takes locks back from a process that ends, however it ends.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from worker.context import Context

_LOOK_SECONDS = 0.05


def needed(
    context: Context, patience: float | None = None, leave: Callable[[], bool] = lambda: False
) -> AbstractContextManager[Callable[[], None]]:
    """`taking`, for as long as an answer may take, unless this worker is known to have no GPU: a CPU's memory is enough for
    both."""
    if context.device.get("cuda") is False:
        return nullcontext(lambda: None)
    longest = context.settings.engine_answer_seconds if patience is None else patience
    return taking(context.settings.home, longest, lambda: context.stopping.is_set() or leave())


@contextmanager
def taking(
    home: Path, patience: float, leave: Callable[[], bool] = lambda: False
) -> Iterator[Callable[[], None]]:
    """Have the engine of this machine give its memory back, and keep it from coming back, until the result is called:
    when all the memory is taken that will be. An engine finishes the answers it has begun: it is waited for for
    `patience` seconds, or until somebody has to `leave`."""
    lock = _Lock(home / "device" / "taking")
    lock.hold()
    try:
        until = time.monotonic() + patience
        while _taken(home / "device" / "answering") and time.monotonic() < until and not leave():
            time.sleep(_LOOK_SECONDS)
        yield lock.give_back
    finally:
        lock.give_back()


class Shared:
    """The engine's side."""

    def __init__(self, home: Path) -> None:
        self._taking = home / "device" / "taking"
        self._answering = _Lock(home / "device" / "answering")

    def wanted(self) -> bool:
        """Whether somebody needs the memory now."""
        return _taken(self._taking)

    def hold(self) -> None:
        self._answering.hold()

    def give_back(self) -> None:
        self._answering.give_back()


class _Lock:
    """One of any number of holders of a file; they only keep out those who ask whether there is one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None

    def hold(self) -> None:
        if self._descriptor is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def give_back(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _taken(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
