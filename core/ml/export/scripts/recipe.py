"""What a script for another tool is written from. No torch."""

from dataclasses import dataclass
from typing import Any

from core.ml.training.config import Spec


@dataclass(frozen=True)
class Data:
    """The job's data set: the name of its file, how that is read, and its format."""

    filename: str
    file_type: str
    format: str
    mapping: dict[str, Any] | None

    @property
    def is_text(self) -> bool:
        """Whether its rows are plain texts without turns."""
        return self.format == "text" or "text" in (self.mapping or {})


@dataclass(frozen=True)
class Plan:
    """A job's spec with nothing left open, and its validation."""

    job_id: str
    model: str
    spec: Spec
    fraction: float | None
    second_set: bool
    batch_size: int
    max_length: int
    optimizer: str
    dtype: str
    packing: bool
    checkpointing: bool
    eval_steps: int | None
    save_steps: int | None

    @property
    def accumulation(self) -> int:
        return self.spec.training.effective_batch_size // self.batch_size
