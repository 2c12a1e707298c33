"""A run's memory on a GPU that it shares with an engine."""

from contextlib import suppress
from typing import Any

import torch
from transformers import TrainerCallback


class Reservation(TrainerCallback):
    """Has torch take, after the first step, all the memory that the run was planned to need, and keep it.

    The first step's rows may have been short ones: what the longest need would be the engine's by then.
    """

    def __init__(self, planned: int | None) -> None:
        self.missing = planned if torch.cuda.is_available() else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.missing is None:
            return
        missing, self.missing = self.missing - torch.cuda.memory_reserved(), None
        if missing > 0:
            with suppress(torch.OutOfMemoryError):
                torch.empty(missing, dtype=torch.uint8, device="cuda")
