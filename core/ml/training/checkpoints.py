"""Whole checkpoints only: sealed with the hash of every file, verified before they are used."""

import json
import os
from pathlib import Path
from typing import Any

from core.hashes import FileInfo, describe

MANIFEST = "manifest.json"
# What a resumed run needs besides the adapter; one missing file would silently change the result.
REQUIRED = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
# Not needed to resume; training_args.bin is a pickle that can hold tokens and paths.
_DROPPED = (
    "training_args.bin",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def seal(folder: Path, step: int) -> list[FileInfo]:
    """Flush a finished checkpoint folder to the disk and return its files with their hashes."""
    for name in (*_DROPPED, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    files = describe(folder)
    missing = set(REQUIRED) - {info["path"] for info in files}
    if missing:
        raise RuntimeError(f"checkpoint {step} lacks {', '.join(sorted(missing))}")
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2))
    for info in [*files, {"path": MANIFEST}]:
        _fsync(folder / str(info["path"]))
    _fsync(folder)
    return files


def is_whole(folder: Path, files: list[dict[str, Any]]) -> bool:
    """Whether `folder` holds exactly the bytes that were sealed. `files` comes from the database."""
    present = {info["path"]: info["sha256"] for info in describe(folder) if info["path"] != MANIFEST}
    return present == {info["path"]: info["sha256"] for info in files}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
