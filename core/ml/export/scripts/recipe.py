"""What a script for another tool is written from. No torch."""

from dataclasses import dataclass
from typing import Literal

from core.ml.training.config import Spec

Tool = Literal["trl", "axolotl", "llamafactory"]

# What the data, and validation rows of their own, are called beside the script.
DATA_FILE, VALID_FILE = "data.jsonl", "valid.jsonl"


@dataclass(frozen=True)
class Data:
    """The job's data set: its id, the name of its file (None: it is deleted), and whether its rows are plain texts."""

    dataset_id: str
    filename: str | None
    is_text: bool


@dataclass(frozen=True)
class Plan:
    """A job's spec with nothing left open, and its validation: a share of the rows, or a data set of its own."""

    job_id: str
    model: str
    spec: Spec
    fraction: float | None
    valid_id: str | None
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
