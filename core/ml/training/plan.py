"""From a spec and its rows to what will be done: nothing is left "auto". No torch."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from core.ml.training.config import Spec
from core.ml.training.data import Rows

# Line numbers that are named of each kind.
_LISTED = 100


@dataclass(frozen=True)
class DeviceChoices:
    """What the device decides of a spec."""

    compute_dtype: Literal["bfloat16", "float16", "float32"]
    gradient_checkpointing: bool


def total_steps(spec: Spec, rows: int) -> int:
    """Optimizer steps over so many training rows."""
    training = spec.training
    assert isinstance(training.batch_size, int)  # noqa: S101 - config.settle() came before
    batches = math.ceil(rows / training.batch_size)
    per_epoch = math.ceil(batches / (training.effective_batch_size // training.batch_size))
    return training.max_steps or math.ceil((training.epochs or 1) * per_epoch)


def resolved(spec: Spec, rows: Rows, choices: DeviceChoices | None = None) -> Spec:
    """The spec with what the rows decide, and with the choices of the device: without them those stay "auto"."""
    training, quantization = spec.training, spec.quantization
    changes: dict[str, Any] = {}
    if training.max_length == "auto":
        changes["max_length"] = rows.data.longest
    if training.loss_on == "auto":
        changes["loss_on"] = "all" if rows.data.texts else "assistant"
    if choices is not None:
        quantization = quantization.model_copy(update={"compute_dtype": choices.compute_dtype})
        if training.gradient_checkpointing == "auto":
            changes["gradient_checkpointing"] = choices.gradient_checkpointing
    every = spec.checkpoints.every_steps
    if every == "auto":
        every = min(max(total_steps(spec, len(rows.train)) // 5, 1), 50)
    return spec.model_copy(
        update={
            "quantization": quantization,
            "training": training.model_copy(update=changes),
            "checkpoints": spec.checkpoints.model_copy(update={"every_steps": every}),
        }
    )


def counts(rows: Rows) -> dict[str, Any]:
    """What is used and what is not, with the first line numbers."""
    return {
        "rows": len(rows.train),
        "validation_rows": rows.valid_count,
        "dropped": _counted(rows.data.dropped),
        "truncated": _counted(rows.data.truncated),
        "in_both": _counted(rows.in_both),
        "trained_tokens": rows.data.trained_tokens,
    }


def _counted(lines: list[int]) -> dict[str, Any]:
    return {"count": len(lines), "lines": lines[:_LISTED]}
