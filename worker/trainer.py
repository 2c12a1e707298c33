"""The trainer: what a job's child process runs. Importing it imports the learning libraries."""

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Models of these families are found by their configuration at run time; imported here they are
# loaded once in the fork server instead of once a job.
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from core import log
from core.errors import GraftError, OutOfMemory, StorageFull, is_disk_full
from core.ml import base_model
from core.ml.catalogue import BaseModel
from core.ml.training import sft
from core.ml.training.probe import measure
from core.ml.training.reporter import Report
from core.ml.training.run import Run

logger = logging.getLogger(__name__)


def train(run: Run, job_id: str, report: Report, stop: Callable[[], bool]) -> None:
    """Train and report the end: `done`, `stopped` or `error`. Anything else is a crash."""
    log.setup()
    log.job_id.set(job_id)
    with _errors(report):
        result = sft.train(run, report, stop)
        if result.adapter is None:
            report("stopped")
        else:
            report("done", folder=str(result.adapter), metrics=result.metrics)


def probe(run: Run, report: Report, stop: Callable[[], bool]) -> None:  # noqa: ARG001 - a child's form
    """Take a few steps and report what was `measured`, or the `error` that a job would end with."""
    log.setup()
    with _errors(report):
        report("measured", **measure(run))


def prepare(model: BaseModel, report: Report, stop: Callable[[], bool]) -> None:  # noqa: ARG001 - a child's form
    """Bring the files of a base model, so that no job has to wait for them."""
    log.setup()
    with _errors(report):
        base_model.prepare(model)


@contextmanager
def _errors(report: Report) -> Iterator[None]:
    """Report the `error` that ends the work, whatever it is."""
    try:
        yield
    except GraftError as error:
        _report(report, error)
    except BrokenPipeError:
        raise  # the worker or its log is gone: a crash, from which the job goes on
    except torch.OutOfMemoryError:
        _report(report, OutOfMemory())
    except Exception as error:  # noqa: BLE001 - every end of a run is reported, with its cause
        logger.error("training broke off\n%s", traceback.format_exc())  # noqa: TRY400
        if is_disk_full(error):
            _report(report, StorageFull("a checkpoint or the adapter"))
            return
        message = f"Training broke off: {type(error).__name__}: {error}"
        hint = "The worker's log has the whole traceback under this job's id."
        _report(report, GraftError("training_error", message, hint=hint))


def _report(report: Report, error: GraftError) -> None:
    report("error", **error.as_dict(), param=error.param)
