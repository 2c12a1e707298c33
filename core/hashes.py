"""What lies in a folder, with sizes and hashes: how files prove that they are whole."""

import hashlib
from pathlib import Path
from typing import TypedDict


class FileInfo(TypedDict):
    path: str
    bytes: int
    sha256: str


def key64(content: bytes) -> int:
    """64 bits: enough that of many millions no two are the same."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def describe(folder: Path) -> list[FileInfo]:
    """Every file below `folder`, sorted by its path."""
    return [
        FileInfo(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
