"""Copies of adapters from a bucket: those that were used last stay on this machine."""

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ulid import ULID

from core.errors import StorageFull, is_disk_full
from core.storage import Storage

# Of what is being brought or removed: it is no copy.
_PART = ".part"
# Held where a copy appears, is used or disappears, not while files are brought: whole folders come and go at once.
_changing = threading.Lock()


def use(folder: Path) -> bool:
    """Whether this copy is here; then it was used now."""
    with _changing:
        try:
            os.utime(folder)
        except FileNotFoundError:
            return False
        return True


def get(storage: Storage, key: str, files: Sequence[str], folder: Path, most: int, seconds: float) -> Path:
    """`folder` with these files of `key`, which never change. Of all copies beside it those stay that were used in the
    last `seconds`, in which an answer may read them, and the `most` that were used last.

    Raises:
        NotFound: `file_missing`.
        StorageFull: no room left.
    """
    if use(folder):
        return folder
    part = _part_of(folder)
    try:
        for file in files:
            storage.get(f"{key}/{file}", part / file)
        with _changing:
            if not folder.is_dir():  # else another request was faster
                part.rename(folder)
            os.utime(folder)
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull(str(folder)) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _drop(folder.parent, most, time.time() - seconds)
    return folder


def _drop(beside: Path, most: int, before: float) -> None:
    with _changing:
        used = {one: one.stat().st_mtime for one in beside.iterdir() if one.suffix != _PART}
        old = [one for one in sorted(used, key=used.__getitem__)[:-most] if used[one] < before]
        parts = [one.rename(_part_of(one)) for one in old]
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)


def _part_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.{ULID()}{_PART}")
