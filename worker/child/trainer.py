"""The trainer: what a job's child process runs. Importing it imports the learning libraries."""

import ctypes
import dataclasses
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

# Models of these families are found by their configuration at run time; imported here they are
# loaded once in the fork server instead of once a job.
import transformers.models.llama.modeling_llama

from core import log
from core.errors import GraftError, OutOfMemory, StorageFull, is_disk_full
from core.ml import base_model
from core.ml.catalogue import BaseModel
from core.ml.export import files
from core.ml.export.run import Export
from core.ml.proof import certificate
from core.ml.quantization import Quantization
from core.ml.training import assembly, sft
from core.ml.training.loop import watchdog
from core.ml.training.loop.reporter import Report, alive
from core.ml.training.probe import measure
from core.ml.training.run import Run
from worker.child import launch

logger = logging.getLogger(__name__)

# What a report is in the log.
_LINES = {
    "phase": "Phase: {phase}.",
    "plan": "Plan: {total_steps} steps, {trained_tokens} trained tokens.",
    "model_loaded": "Base model loaded in {seconds:.1f} s.",
    "checkpoint": "Checkpoint of step {step}.",
    "samples": "Answers to the prompts at step {step}.",
    "note": "{message}",
}
_ALIVE_SECONDS = 5.0
# glibc's mallopt: which blocks get pages of their own, and when freed ones go back to the system.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class _StoppedError(Exception):
    """The worker asked to leave."""


def train(run: Run, job_id: str, report: Report, stop: Callable[[], bool]) -> None:
    """Train and report the end: `done`, `stopped`, `again` or `error`. Anything else is a crash."""
    if run.processes == 1:
        train_here(run, job_id, report, stop)
        return
    with _reporting(report, run.work, job_id):
        launch.train(run, job_id, report, stop)


def train_here(run: Run, job_id: str, report: Report, stop: Callable[[], bool]) -> None:
    """As `train`, in this very process, which may be one of several."""
    first = os.environ.get("RANK", "0") == "0"
    with _reporting(report, run.work, job_id):
        result = sft.train(run, _logged(report) if first else report, stop)
        if result.adapter is None:
            report("stopped")
        else:
            metrics = result.metrics | {"train_seconds": result.seconds}
            report("done", folder=str(result.adapter), metrics=metrics, step=result.step)


def prove(run: Run, folder: Path, facts: Mapping[str, Any], report: Report, stop: Callable[[], bool]) -> None:
    """Check and measure the adapter saved in `folder`, and report `proved`, `stopped` or `error`.

    `run` is the training's, its data files still there; `facts` as `core.ml.proof.certificate.prove` says.
    """
    _keep_freed_memory()
    told = 0.0

    def tick() -> None:
        nonlocal told
        if stop():
            raise _StoppedError
        if time.monotonic() - told > _ALIVE_SECONDS:
            told = time.monotonic()
            report("alive")

    with _reporting(report, run.work, facts.get("job_id")):
        try:
            proof = certificate.prove(run, folder, facts, tick, partial(alive, report, sft.LONG_SECONDS))
        except _StoppedError:
            report("stopped")
        else:
            report("proved", certificate=proof.certificate, metrics=proof.metrics)


def _keep_freed_memory() -> None:
    """Let the C library keep what large tensors free: fetching it anew, page by page, costs a third of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def export(run: Export, job_id: str, report: Report, stop: Callable[[], bool]) -> None:
    """Write an adapter in another form and report the end: `done`, `stopped` or `error`."""
    with _reporting(report, run.work, job_id):
        result = files.export(run, _logged(report), stop)
        if result.folder is None:
            report("stopped")
        else:
            report("done", folder=str(result.folder), report=result.report)


def probe(run: Run, report: Report, stop: Callable[[], bool]) -> None:  # noqa: ARG001 - a child's form
    """Take a few steps and report what was `measured`, or the `error` that a job would end with."""
    with _reporting(report):
        report("measured", **measure(run))


def prepare(
    model: BaseModel,
    processes: int,
    sharded: bool,
    report: Report,
    stop: Callable[[], bool],  # noqa: ARG001
) -> None:
    """Report the `device`, and bring the files of a base model, so that no job has to wait for them."""
    with _reporting(report):
        precision = dataclasses.replace(base_model.settle(Quantization()), sharded=sharded)
        device = assembly.device(precision, processes)
        report("device", name=base_model.device_name(), **dataclasses.asdict(device))
        base_model.prepare(model)


def _logged(report: Report) -> Report:
    """Reports that stand in the job's log, too; those of steps not all."""
    said = 0.0

    def told(kind: str, /, **data: Any) -> None:
        nonlocal said
        if kind in _LINES:
            logger.info(_LINES[kind].format(**data))
        elif kind == "metrics" and time.monotonic() - said > _ALIVE_SECONDS:
            said = time.monotonic()
            values = ", ".join(f"{name} {value:.4g}" for name, value in data["values"].items())
            logger.info("Step %d: %s.", data["step"], values)
        report(kind, **data)

    return told


@contextmanager
def _reporting(report: Report, work: Path | None = None, job_id: str | None = None) -> Iterator[None]:
    """Keep the job's log in `work`, and report the `error` that ends the work, whatever it is."""
    log.setup("INFO" if work is None else "WARNING")
    logging.captureWarnings(capture=True)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # of one library about another: nothing for who posted the job
    warnings.simplefilter("ignore", DeprecationWarning)
    transformers.logging.disable_default_handler()  # it speaks past the log
    transformers.logging.enable_propagation()
    log.job_id.set(job_id)
    with log.kept(work / log.FILE) if work else nullcontext(), _errors(report):
        yield


@contextmanager
def _errors(report: Report) -> Iterator[None]:
    try:
        yield
    except watchdog.Again as again:
        report("again", **again.as_report())
    except GraftError as error:
        _report(report, error)
    except BrokenPipeError:
        raise  # the worker or its log is gone: a crash, from which the job goes on
    except Exception as error:  # noqa: BLE001 - every end of a run is reported, with its cause
        logger.error("the work broke off\n%s", traceback.format_exc())  # noqa: TRY400
        if base_model.is_out_of_memory(error):
            _report(report, OutOfMemory())
            return
        if is_disk_full(error):
            _report(report, StorageFull("a checkpoint, the adapter or an export"))
            return
        message = f"The work broke off: {type(error).__name__}: {error}"
        hint = "GET /jobs/{id}/logs has the whole traceback."
        _report(report, GraftError("training_error", message, hint=hint))


def _report(report: Report, error: GraftError) -> None:
    logger.error("%s: %s", error.code, error.message)
    report("error", **error.as_dict(), param=error.param)
