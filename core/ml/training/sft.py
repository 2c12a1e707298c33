"""One QLoRA SFT run from top to bottom: data, model, adapter, training, evaluation, saved files.

Knows no job, database or queue: it takes a `Run`, reports through a callback and asks `stop` after
every step whether to leave.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftModel
from transformers import TrainerState
from trl import SFTTrainer

from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.training import assembly, plan, saving
from core.ml.training.data import checked_rows
from core.ml.training.reporter import Report, Reporter
from core.ml.training.run import Run


@dataclass(frozen=True)
class Result:
    """`adapter` holds the finished files; None when `stop` ended the run before its end."""

    adapter: Path | None
    metrics: dict[str, float]


def train(run: Run, report: Report, stop: Callable[[], bool]) -> Result:
    """Train one adapter.

    Raises:
        GraftError: the data, the model or the spec cannot be trained with, or the loss is no number.
    """
    report("phase", phase="preparing")
    base_model.prepare(run.model)
    contract = contracts.load(run.model.path)
    rows = checked_rows(run, contract, context=catalogue.context(run.model))
    precision = base_model.settle(run.spec.quantization)
    spec = plan.resolved(run.spec, rows, assembly.device_choices(precision))
    total_steps = plan.total_steps(spec, len(rows.train))
    report("plan", spec=spec.model_dump(), total_steps=total_steps, **plan.counts(rows))

    report("phase", phase="loading_model")
    started = time.monotonic()
    model = assembly.with_adapter(base_model.load(run.model, precision), spec)
    report("model_loaded", seconds=time.monotonic() - started)
    if stop():
        return Result(None, {})

    trainer = assembly.trainer_of(model, spec, precision, contract, rows, run.work / "checkpoints")
    trainer.add_callback(Reporter(report, stop))
    report("phase", phase="training")
    _run(trainer, run.resume, total_steps)
    if trainer.state.global_step < total_steps:
        return Result(None, {})

    # From the whole history: the trainer's own mean forgets the steps before a resume.
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {"train_loss": sum(losses) / len(losses)}
    if rows.valid_count:
        report("phase", phase="evaluating")
        metrics |= _evaluate(trainer, model)
    report("phase", phase="saving")
    adapter = run.work / "adapter"
    saving.save(
        model, replace(contract, rows="text" if rows.data.texts else "turns"), run.model, spec, adapter
    )
    return Result(adapter, metrics)


def _run(trainer: SFTTrainer, resume: Path | None, total_steps: int) -> None:
    """Train to the end, or until asked to stop; from a checkpoint where there is one."""
    if resume is not None:
        state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
        if state.global_step >= total_steps:
            # All steps are done: the trainer, asked to go on, would do one more.
            trainer._load_from_checkpoint(str(resume))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def _evaluate(trainer: SFTTrainer, model: PeftModel) -> dict[str, float]:
    """The loss on the validation rows with the adapter and, on the same rows, without it."""
    done = trainer.state.log_history[-1] if trainer.state.log_history else {}
    if "eval_loss" in done and done["step"] == trainer.state.global_step:
        adapter = done  # the last step was one of those that are evaluated
    else:
        adapter = trainer.evaluate(metric_key_prefix="eval")
    with model.disable_adapter():
        base = trainer.evaluate(metric_key_prefix="base_eval")
    return {
        "eval_loss": float(adapter["eval_loss"]),
        "base_eval_loss": float(base["base_eval_loss"]),
    }
