"""Copies of adapters from a bucket: those that were asked for last stay on this machine."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ulid import ULID

from core.errors import StorageFull, is_disk_full
from core.storage import Storage


def get(storage: Storage, key: str, files: Sequence[str], folder: Path, most: int) -> Path:
    """`folder` with these files of `key`, which never change; of all folders beside it the `most` newest stay.

    Raises:
        NotFound: `file_missing`.
        StorageFull: no room left.
    """
    if folder.is_dir():
        os.utime(folder)
        return folder
    part = folder.with_name(f"{folder.name}.{ULID()}.part")
    try:
        for file in files:
            storage.get(f"{key}/{file}", part / file)
        part.rename(folder)
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull(str(folder)) from error
        if not folder.is_dir():  # else another request was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in sorted(folder.parent.iterdir(), key=_used_at)[:-most]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another request removed it
        return 0.0
