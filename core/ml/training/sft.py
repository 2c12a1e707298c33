"""One QLoRA SFT run from top to bottom: data, model, adapter, training, evaluation, saved files.

Knows no job, database or queue: it takes a `Run`, reports through a callback and asks `stop` after
every step whether to leave.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers import TrainerState

from core.errors import GraftError
from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.training import assembly, plan, ranks
from core.ml.training.config import Spec
from core.ml.training.data import CHECKED_ROWS, Rows, checked_rows
from core.ml.training.files import checkpoints, saving
from core.ml.training.loop import guard, heap, samples, watchdog
from core.ml.training.loop.progress import Progress
from core.ml.training.loop.reporter import Report, Reporter, alive
from core.ml.training.loop.reservation import Reservation
from core.ml.training.loop.samples import Sampler
from core.ml.training.loop.trainer import Trainer
from core.ml.training.plan import Plan
from core.ml.training.run import Run
from core.ml.training.spec import memory

# What rows or a model may take to be read; beyond it the silence is a standstill.
LONG_SECONDS = 3600.0


@dataclass(frozen=True)
class Result:
    """`adapter` holds the finished files; None when `stop` ended the run before its end.

    `metrics`: `train_loss`, the mean of all steps; `eval_loss` and `base_eval_loss` on the validation rows;
    `check_loss` of the adapter on the first 16 of them, or of the training rows where there are none. These losses are means over the trained tokens of the rows, whatever the batch size. `step`: whose weights these are.
    `seconds` that all steps took, with evaluations and checkpoints, in all attempts.
    """

    adapter: Path | None
    metrics: dict[str, float]
    step: int = 0
    seconds: float = 0.0


def train(run: Run, report: Report, stop: Callable[[], bool]) -> Result:
    """Train one adapter; with `run.processes` every one of them calls this, and all come to the same result.

    Raises:
        GraftError: the data, the model or the spec cannot be trained with, or nothing is left to try against a loss
            that is no number or too little memory.
        Again: the run has to begin again, with changes.
    """
    if run.processes > 1:
        ranks.join()
    before = heap.taken()
    report("phase", phase="preparing")
    with alive(report):
        base_model.prepare(run.model)
    with alive(report, LONG_SECONDS):
        contract = contracts.load(run.model.path)
        context = catalogue.context(run.model)
        rows = checked_rows(run, contract, context=context)
    contract = replace(contract, rows="text" if rows.data.texts else "turns")
    precision = replace(base_model.settle(run.spec.quantization), sharded=run.sharded)
    shape = memory.shape_of(catalogue.configuration(run.model))
    planned = plan.made(run.spec, rows, assembly.device(precision, run.processes), shape, kept=run.kept)
    spec, total_steps = planned.spec, planned.total_steps
    if run.start is not None:
        saving.check_start(spec, run.start)
    _tell(report, run, planned, rows)

    report("phase", phase="loading_model")
    started = time.monotonic()
    with alive(report, LONG_SECONDS):
        model = assembly.loaded(run.model, precision, planned)
        first = _first_weights(run, spec, model)
    report("model_loaded", seconds=time.monotonic() - started)
    if ranks.agreed(stop()):
        return Result(None, {})

    progress = Progress(run, spec, report)
    sampler = Sampler(report, stop, contract, samples.prompts_of(spec, contract, rows, context, report))
    try:
        with alive(report, LONG_SECONDS):
            trainer = assembly.trainer_of(model, planned, precision, contract, rows, run.work / "checkpoints")
        trainer.watchdog = guard.Watchdog(
            report,
            progress,
            spec,
            run.recoveries,
            _line_of(rows),
            model.get_input_embeddings().num_embeddings,
        )
        for callback in (
            progress,
            # Before the first step is reported: the engine takes what is free then.
            Reservation(planned.memory_bytes),
            Reporter(report, stop, progress, partial(saving.describe, contract, run.model)),
            trainer.watchdog,
            sampler,
            heap.Heap(before, planned.memory_bytes),
        ):
            trainer.add_callback(callback)
        report("phase", phase="training")
        _run(trainer, run, progress, total_steps)
        if trainer.state.global_step < total_steps and progress.ended is None:
            if not ranks.agreed(stop()):
                at = f"{trainer.state.global_step} of {total_steps} steps"
                raise RuntimeError(f"the training ended after {at}, and nobody asked it to")
            return Result(None, {})
        metrics, step = _finish(trainer, model, spec, rows, report, progress, sampler)
    except (RuntimeError, MemoryError) as error:
        if not base_model.is_out_of_memory(error):
            raise
        raise watchdog.recovery(
            "out_of_memory", spec, run.recoveries, where="In training", from_start=not progress.resumable
        ) from error
    report("phase", phase="saving")
    adapter = run.work / "adapter"
    try:
        saving.save(model, contract, run.model, spec, adapter, first)
    except GraftError as error:
        raise (_too_short(error, spec, step) if progress.ended == "time_limit" else error) from error
    return Result(adapter, metrics, step, progress.seconds)


def _tell(report: Report, run: Run, planned: Plan, rows: Rows) -> None:
    """What was planned."""
    spec = planned.spec
    report(
        "plan",
        spec=spec.model_dump(),
        total_steps=planned.total_steps,
        weights_kept=planned.kept,
        steps_per_epoch=plan.steps_per_epoch(spec, plan.trained_rows(spec, rows)),
        memory_bytes=planned.memory_bytes,
        **plan.counts(rows),
    )
    if run.kept and not planned.kept:
        message = (
            "There is no room any more for the weights dequantised: the run goes on with other roundings."
        )
        report("note", type="weights_packed", level="warning", message=message, data={})


def _too_short(error: GraftError, spec: Spec, step: int) -> GraftError:
    """An adapter that changes nothing, where the time limit is the reason."""
    if error.code != "inert_adapter":
        return error
    return GraftError(
        error.code,
        f"The time limit of {spec.limits.max_seconds} s ended the training at step {step}, before it had changed anything.",
        status=422,
        hint="Raise limits.max_seconds.",
    )


def _first_weights(run: Run, spec: Spec, model: PeftModel) -> Path | None:
    """The folder of the weights that the adapter begins with, where lora_B is not zero in them."""
    if run.start is not None:
        saving.read(model, run.start, "The adapter to continue from", param="continue_from")
        return run.start
    if spec.lora.init != "pissa":
        return None
    saving.write(model, run.work / "first")
    ranks.barrier()
    return run.work / "first"


def _line_of(rows: Rows) -> Callable[[list[int]], int | None]:
    """Looked up row by row: it is asked about a few bad batches in a run, if ever."""
    data = rows.data
    return lambda ids: next(
        (data.lines[place] for place in rows.train if data.examples[place]["input_ids"] == ids), None
    )


def _run(trainer: Trainer, run: Run, progress: Progress, total_steps: int) -> None:
    """Train to the end, or until asked to stop; from a checkpoint where there is one."""
    if run.resume is not None:
        checkpoints.check(run.resume, sharded=run.sharded)
        state = TrainerState.load_from_json(str(run.resume / "trainer_state.json"))
        progress.restore(state)
        if state.global_step >= total_steps or progress.ended is not None:
            # All steps are done: the trainer, asked to go on, would do one more.
            saving.read(trainer.model, run.resume, f"The checkpoint of step {state.global_step}")
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))


def _finish(
    trainer: Trainer,
    model: PeftModel,
    spec: Spec,
    rows: Rows,
    report: Report,
    progress: Progress,
    sampler: Sampler,
) -> tuple[dict[str, float], int]:
    """Leave the best weights in the model, and measure them; their step."""
    report("phase", phase="evaluating")
    step = trainer.state.global_step
    if progress.best_step is not None and progress.best_folder is not None:
        if progress.best_step != step:
            saving.read(model, progress.best_folder, f"The best checkpoint, of step {progress.best_step},")
        step = progress.best_step
        message = f"The adapter is that of step {step}, whose validation loss {progress.best_loss:.4f} is the lowest."
        report(
            "note",
            type="best_kept",
            level="info",
            message=message,
            data={"step": step, "eval_loss": progress.best_loss},
        )
    # From the whole history: the trainer's own mean forgets the steps before a resume.
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {"train_loss": sum(losses) / max(len(losses), 1)}
    if rows.valid_count:
        valid = rows.valid_examples
        if progress.best_loss is None or progress.best_precision != progress.precision:
            metrics["eval_loss"] = trainer.loss_on(valid)
            report("metrics", step=step, values={"eval_loss": metrics["eval_loss"]}, progress=None)
        else:
            metrics["eval_loss"] = progress.best_loss
        if spec.lora.init != "pissa":  # it moved a part of the base model's weights into the adapter
            with model.disable_adapter():
                metrics["base_eval_loss"] = trainer.loss_on(valid)
    checked = (rows.valid_examples if rows.valid_count else rows.train_examples)[:CHECKED_ROWS]
    metrics["check_loss"] = trainer.loss_on(checked)
    sampler.tell(step, model)
    return metrics, step
