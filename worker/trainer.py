"""The trainer: what a job's child process runs. Importing it imports the learning libraries."""

import logging
import traceback
from collections.abc import Callable

# Models of these families are found by their configuration at run time; imported here they are
# loaded once in the fork server instead of once a job.
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from core import log
from core.errors import GraftError, StorageFull, is_disk_full
from core.ml import base_model
from core.ml.catalogue import BaseModel
from core.ml.training import probe as measure
from core.ml.training import sft
from core.ml.training.reporter import Report
from core.ml.training.run import Run

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = {
    "code": "out_of_memory",
    "message": "The device has too little memory for this job.",
    "hint": "Use a smaller training.batch_size, training.max_length or lora.r, or a smaller base model.",
}


def train(run: Run, job_id: str, report: Report, stop: Callable[[], bool]) -> None:
    """Train and report the end: `done`, `stopped` or `error`. Anything else is a crash."""
    log.setup()
    log.job_id.set(job_id)
    try:
        result = sft.train(run, report, stop)
    except GraftError as error:
        report("error", **error.as_dict())
    except BrokenPipeError:
        raise  # the worker or its log is gone: a crash, from which the job goes on
    except torch.OutOfMemoryError:
        report("error", **_OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 - every end of a run is reported, with its cause
        logger.error("training broke off\n%s", traceback.format_exc())  # noqa: TRY400
        if is_disk_full(error):
            report("error", **StorageFull("a checkpoint or the adapter").as_dict())
        else:
            report(
                "error",
                code="training_error",
                message=f"Training broke off: {type(error).__name__}: {error}",
                hint="The worker's log has the whole traceback under this job's id.",
            )
    else:
        if result.adapter is None:
            report("stopped")
        else:
            report("done", folder=str(result.adapter), metrics=result.metrics)


def probe(run: Run, report: Report, stop: Callable[[], bool]) -> None:  # noqa: ARG001 - a child's form
    """Take a few steps and report `measured`, or the `error` that a job would end with."""
    log.setup()
    try:
        report("measured", **measure.measure(run))
    except GraftError as error:
        report("error", **error.as_dict())
    except torch.OutOfMemoryError:
        report("error", **_OUT_OF_MEMORY)


def prepare(model: BaseModel, report: Report, stop: Callable[[], bool]) -> None:  # noqa: ARG001 - a child's form
    """Bring the files of a base model, so that no job has to wait for them."""
    log.setup()
    try:
        base_model.prepare(model)
    except GraftError as error:
        report("error", **error.as_dict())
