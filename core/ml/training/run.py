"""What one training run is given. No torch: the worker makes it, the trainer reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core.ml.catalogue import BaseModel
from core.ml.formats.validate import Reading
from core.ml.training.config import Spec


@dataclass(frozen=True)
class Source:
    """A data set file on this machine."""

    path: Path
    reading: Reading


@dataclass(frozen=True)
class Trained:
    """What an adapter was trained on: the sha256 of a data set's file, and the fingerprint of the rows of it that were
    held back (`split.fingerprint`); None: none, or nobody knows which."""

    dataset: str
    held_back: str | None


@dataclass(frozen=True)
class Run:
    """`work` is an empty folder of this run; `resume` a checkpoint folder known to be whole, `best` the one with the
    lowest validation loss so far; `start` is the folder of the adapter to continue from, and `earlier` what that was
    trained on. `recoveries` are the changes that earlier attempts made to the spec to go on, oldest first: {step, cause,
    changes}. `kept`: whether the 4-bit weights lay in memory dequantised in earlier attempts; None in the first. So many
    `processes` share every optimizer step; with "fsdp" they share the model too."""

    model: BaseModel
    spec: Spec
    train: Source
    valid: Source | None
    fraction: float | None
    work: Path
    resume: Path | None = None
    best: Path | None = None
    start: Path | None = None
    earlier: tuple[Trained, ...] = ()
    recoveries: tuple[dict[str, Any], ...] = ()
    kept: bool | None = None
    processes: int = 1
    sharding: Literal["ddp", "fsdp"] = "ddp"

    @property
    def sharded(self) -> bool:
        return self.processes > 1 and self.sharding == "fsdp"
