"""Whole checkpoints only: the hash of every file is taken when it is made and compared before it is used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import GraftError
from core.hashes import FileInfo, describe

WEIGHTS = "adapter_model.safetensors"
# What a resumed run needs; one missing file would silently change the result. Of several processes each has its own
# random states, and those that share the model have other files of the optimizer.
_ALWAYS = (WEIGHTS, "scheduler.pt", "trainer_state.json")
_WHOLE = ("optimizer.pt",)
_SHARDED = ("pytorch_model_fsdp.bin", "optimizer.bin")
# Not needed to resume; training_args.bin is a pickle that can hold tokens and paths.
_DROPPED = ("training_args.bin", "README.md")


def seal(folder: Path, processes: int = 1, *, sharded: bool = False) -> list[FileInfo]:
    """The files of a finished checkpoint with their hashes, without those that are not needed."""
    for name in _DROPPED:
        (folder / name).unlink(missing_ok=True)
    files = describe(folder)
    missing = required(processes, sharded=sharded) - {info["path"] for info in files}
    if missing:
        raise RuntimeError(f"{folder.name} lacks {', '.join(sorted(missing))}")
    return files


def check(folder: Path, *, sharded: bool) -> None:
    """Refuse a checkpoint made with another sharding than this run's; by how many processes does not matter.

    Raises:
        GraftError: `checkpoint_of_other_sharding`.
    """
    missing = [name for name in (_SHARDED if sharded else _WHOLE) if not (folder / name).is_file()]
    if missing:
        raise GraftError(
            "checkpoint_of_other_sharding",
            f"The checkpoint was made with another GRAFT_TRAINER_SHARDING: it lacks {', '.join(missing)}.",
            status=409,
            hint="Start the worker with the setting of then and retry the job, or retry it with another seed: it then "
            "begins anew.",
        )


def required(processes: int = 1, *, sharded: bool = False) -> set[str]:
    """The names of the files without which a run would not go on as it was."""
    states = [f"rng_state_{index}.pth" for index in range(processes)] if processes > 1 else ["rng_state.pth"]
    return {*_ALWAYS, *states, *(_SHARDED if sharded else _WHOLE)}


def is_whole(folder: Path, files: Sequence[FileInfo | dict[str, Any]]) -> bool:
    """Whether `folder` holds exactly the bytes that were sealed. `files` comes from the database."""
    present = {info["path"]: info["sha256"] for info in describe(folder)}
    return present == {info["path"]: info["sha256"] for info in files}
