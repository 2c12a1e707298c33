"""What a run takes, measured: a few real steps on its own rows, on this device."""

import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.training import assembly, plan
from core.ml.training.data import Rows, checked_rows
from core.ml.training.files import checkpoints
from core.ml.training.loop import samples
from core.ml.training.loop.trainer import Trainer
from core.ml.training.run import Run
from core.ml.training.spec import memory

_USUAL_STEPS = 2
_EVALUATED_ROWS = 16


def measure(run: Run) -> dict[str, Any]:
    """Optimizer steps on the longest rows for the memory, then some on usual ones for the time, of a run in one process.

    {spec, total_steps, device, memory_needed_bytes, memory_present_bytes, seconds_per_step, load_seconds, training_seconds}: the
    memory is that of the GPU, or of the process on a CPU; the training is reckoned with its evaluations, their
    samples and its checkpoints, one of each measured. Nothing is kept.

    Raises:
        GraftError: as a job with this run would.
        torch.OutOfMemoryError: on a GPU.
    """
    before, present = _resident(), base_model.free_bytes()
    base_model.prepare(run.model)
    contract = contracts.load(run.model.path)
    context = catalogue.context(run.model)
    rows = checked_rows(run, contract, context=context)
    precision = base_model.settle(run.spec.quantization)
    planned = plan.made(
        run.spec, rows, assembly.device(precision), memory.shape_of(catalogue.configuration(run.model))
    )
    started = _now()
    model = assembly.loaded(run.model, precision, planned)
    load_seconds = _now() - started

    def trained(packs: Sequence[Sequence[int]], steps: int) -> tuple[Trainer, _Watch]:
        training = planned.spec.training.model_copy(update={"epochs": None, "max_steps": steps})
        few = replace(planned, spec=planned.spec.model_copy(update={"training": training}), total_steps=steps)
        places = [place for pack in packs for place in pack]
        some = replace(rows, train=places, held_back=[], valid=None, in_both=[])
        trainer = assembly.trainer_of(model, few, precision, contract, some, run.work / "probe")
        watch = _Watch()
        trainer.add_callback(watch)
        trainer.train()
        return trainer, watch

    # What is fed as one, the fullest first: rows, or with packing packs of them.
    fed = plan.fed(planned.spec, rows)
    fullest = sorted(fed, key=lambda pack: -sum(rows.data.lengths[place] for place in pack))
    effective = planned.spec.training.effective_batch_size
    # Two steps: the optimizer makes its state in the first, after the backward pass.
    trained(fullest[:effective], 2)
    needed = _peak() - before + memory.growth(planned.total_steps, cuda=torch.cuda.is_available())
    usual = fed[:: max(len(fed) // (_USUAL_STEPS * effective), 1)][: _USUAL_STEPS * effective]
    trainer, watch = trained(usual, _USUAL_STEPS)
    # With few rows, several times the same.
    read = next(log["num_tokens"] for log in reversed(trainer.state.log_history) if "num_tokens" in log)
    seconds_per_step = watch.seconds * plan.tokens_of_step(planned.spec, rows) / read
    evaluations, saves = plan.pauses(planned, rows)
    training_seconds = planned.total_steps * seconds_per_step + saves * watch.saving
    if evaluations:
        evaluating = _evaluating(trainer, rows)
        started = _now()
        # Before it has learnt to end its answers, so at most what those of the run take.
        asked = samples.prompts_of(planned.spec, contract, rows, context, lambda *_, **__: None)
        samples.answered(model, contract, asked)
        training_seconds += evaluations * (evaluating + _now() - started)
    return {
        "spec": planned.spec.model_dump(),
        "total_steps": planned.total_steps,
        "device": base_model.device_name(),
        "memory_needed_bytes": needed,
        "memory_present_bytes": present,
        "seconds_per_step": seconds_per_step,
        "load_seconds": load_seconds,
        "training_seconds": training_seconds,
    }


def _evaluating(trainer: Trainer, rows: Rows) -> float:
    """Seconds that the loss of all validation rows takes, from some of them."""
    some = rows.valid_examples[:: max(rows.valid_count // _EVALUATED_ROWS, 1)]
    started = _now()
    trainer.loss_on(some)
    seconds = _now() - started
    return seconds * plan.validation_tokens(rows) / sum(len(row["input_ids"]) for row in some)


class _Watch(TrainerCallback):
    """Seconds from the beginning to the end of every step, and of saving a checkpoint after the last."""

    def __init__(self) -> None:
        self.seconds = self.saving = self._began = self._ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended = _now()
        self.seconds += self._ended - self._began
        control.should_save = state.global_step == state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        checkpoints.seal(folder)
        self.saving = _now() - self._ended
        shutil.rmtree(folder)


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
