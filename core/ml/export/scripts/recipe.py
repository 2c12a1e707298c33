"""What a script for another tool is written from. No torch."""

from dataclasses import dataclass
from typing import Any, Literal

from core.ml.training.config import Spec

Tool = Literal["trl", "axolotl", "llamafactory"]


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

    @property
    def is_list(self) -> bool:
        """Whether its rows may hold lists of messages, which may have weights and calls of tools."""
        if self.mapping is not None:
            return isinstance(self.mapping.get("messages"), str)
        return self.format in ("messages", "sharegpt", "prompt_completion")


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

    @property
    def warmup_steps(self) -> int | None:
        """Whole steps, as many as Graft takes; None where the rows decide how many steps there are."""
        training = self.spec.training
        if training.max_steps is None:
            return None
        return int(training.max_steps * training.warmup_ratio)
