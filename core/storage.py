"""Files and folders under keys, in a directory or an S3 bucket. Keys are made here, never by clients."""

import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from core.errors import NotFound, StorageFull, is_disk_full


class Storage:
    """put, get, open, folders, delete. `url` is a folder or `s3://bucket/prefix`."""

    def __init__(self, url: str, *, s3_endpoint_url: str | None = None) -> None:
        self.url = url
        self._s3_endpoint_url = s3_endpoint_url

    @cached_property
    def _fs_root(self) -> tuple[Any, str]:
        options: dict[str, Any] = {"use_listings_cache": False} if "://" in self.url else {"auto_mkdir": True}
        if self.url.startswith("s3://") and self._s3_endpoint_url:
            options["endpoint_url"] = self._s3_endpoint_url
        fs, root = fsspec.core.url_to_fs(self.url, **options)
        return fs, root.rstrip("/")

    @property
    def fs(self) -> Any:
        return self._fs_root[0]

    def path(self, key: str) -> str:
        return posixpath.join(self._fs_root[1], key)

    def local(self, key: str) -> Path | None:
        """The path of `key` on this machine, or None where the storage is a bucket."""
        return None if "://" in self.url else Path(self.path(key))

    def put(self, source: Path, key: str) -> None:
        """Store one file. It is whole under its key or not there at all.

        The source must not be changed afterwards: in a folder on its own disk it is linked, not copied.

        Raises:
            StorageFull: no room left.
        """
        target = self.path(key)
        # A bucket shows an object only when its upload is complete; a folder needs the rename.
        part = target if self.local(key) is None else f"{target}.part"
        try:
            if part == target or not _linked(source, Path(part)):
                self.fs.put_file(str(source), part)
            if part != target:
                _sync(Path(part))
                Path(part).replace(target)
                Path(part).unlink(missing_ok=True)  # renaming does nothing between two names of one file
                _sync(Path(target).parent)
        except Exception as error:
            if is_disk_full(error):
                self.delete(f"{key}.part")
                raise StorageFull(key) from error
            raise

    def put_folder(self, folder: Path, key: str, files: Iterable[str]) -> None:
        """Store the named files of a folder under `key/`; on failure nothing of it stays."""
        try:
            for name in files:
                self.put(folder / name, f"{key}/{name}")
        except Exception:
            self.delete(key)
            raise

    def get(self, key: str, target: Path) -> None:
        """Raises NotFound `file_missing`, as `open` and `size` do."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _found(key):
            self.fs.get_file(self.path(key), str(target))

    def open(self, key: str) -> IO[bytes]:
        """A seekable stream of the file's bytes."""
        with _found(key):
            return cast(IO[bytes], self.fs.open(self.path(key), "rb"))

    def size(self, key: str) -> int:
        with _found(key):
            return int(self.fs.size(self.path(key)))

    def folders(self, key: str) -> list[str]:
        """The names of the folders directly under `key`; none where nothing lies there."""
        try:
            found = self.fs.ls(self.path(key), detail=True)
        except FileNotFoundError:
            return []
        return [posixpath.basename(info["name"]) for info in found if info["type"] == "directory"]

    def delete(self, key: str) -> None:
        """Delete a file or folder; what is not there is deleted already."""
        try:
            self.fs.rm(self.path(key), recursive=True)
        except FileNotFoundError:
            return

    def check(self) -> None:
        """Raise when the storage cannot be reached."""
        if (root := self.local("")) is not None:
            root.mkdir(parents=True, exist_ok=True)
        else:
            self.fs.ls(self._fs_root[1].split("/", 1)[0])


@contextmanager
def _found(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("file_missing", f"{key} is not in the storage any more.") from error


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name, which takes no time and no room; False where that cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a part left over from a crash may be another file's second name
    try:
        target.hardlink_to(source)
    except OSError:  # another disk, or a file system without links
        return False
    return True


def _sync(path: Path) -> None:
    """A row must never name a file that a power cut can still take."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
