"""What a run takes, measured: a few real steps on its own rows, on this device."""

import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.training import assembly, plan
from core.ml.training.data import checked_rows
from core.ml.training.run import Run
from core.ml.training.spec import memory

_USUAL_STEPS = 2


def measure(run: Run) -> dict[str, Any]:
    """Optimizer steps on the longest rows for the memory, then some on usual ones for the time.

    {spec, device, memory_needed_bytes, memory_present_bytes, seconds_per_step, load_seconds}: the memory is that
    of the GPU, or of the process on a CPU. Nothing is kept.

    Raises:
        GraftError: as a job with this run would.
        torch.OutOfMemoryError: on a GPU.
    """
    before, present = _resident(), base_model.free_bytes()
    base_model.prepare(run.model)
    contract = contracts.load(run.model.path)
    rows = checked_rows(run, contract, context=catalogue.context(run.model))
    precision = base_model.settle(run.spec.quantization)
    device = replace(assembly.device(precision, run.processes), sharded=run.sharded)
    planned = plan.made(run.spec, rows, device, memory.shape_of(catalogue.configuration(run.model)))
    started = time.monotonic()
    model = assembly.loaded(run.model, precision, planned)
    load_seconds = time.monotonic() - started

    def seconds_per_step(places: Sequence[int], steps: int) -> float:
        training = planned.spec.training.model_copy(
            update={"epochs": None, "max_steps": steps, "effective_batch_size": effective}
        )
        few = replace(planned, spec=planned.spec.model_copy(update={"training": training}), total_steps=steps)
        some = replace(rows, train=places, held_back=[], valid=None, in_both=[])
        trainer = assembly.trainer_of(model, few, precision, contract, some, run.work / "probe")
        watch = _Watch()
        trainer.add_callback(watch)
        trainer.train()
        return watch.seconds / steps

    # Of several processes the others do their share at the same time.
    effective = planned.spec.training.effective_batch_size // run.processes
    longest = sorted(rows.train, key=lambda place: -rows.data.lengths[place])
    # Two steps: the optimizer makes its state in the first, after the backward pass.
    seconds_per_step(longest[:effective], 2)
    needed = _peak() - before
    usual = rows.train[:: max(len(rows.train) // (_USUAL_STEPS * effective), 1)][: _USUAL_STEPS * effective]
    return {
        "spec": planned.spec.model_dump(),
        "device": base_model.device_name(),
        "memory_needed_bytes": needed,
        "memory_present_bytes": present,
        "seconds_per_step": seconds_per_step(usual, _USUAL_STEPS),
        "load_seconds": load_seconds,
    }


class _Watch(TrainerCallback):
    """Seconds from the beginning to the end of every step; no checkpoint is saved."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += _now() - self._began
        control.should_save = False


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def _resident() -> int:
    """Bytes that this process, a fork, shares with its parent from the start."""
    return 0 if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def _peak() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
