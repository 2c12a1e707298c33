"""What a run remembers over its attempts, and what follows from it: the best step, and stops before the last one."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from core.ml.training import ranks
from core.ml.training.config import Spec
from core.ml.training.files.checkpoints import WEIGHTS
from core.ml.training.run import Run
from core.ml.training.spec import changes

_KEPT = (
    "seconds", "tokens", "skipped", "best_loss", "best_step", "best_precision", "waited", "ended", "training"
)  # fmt: skip


class Progress(TrainerCallback, ExportableState):
    """Lies in the trainer's state of every checkpoint, so that a resumed run decides as an undisturbed one.

    `seconds` of training and `tokens` seen, of all attempts; batches `skipped`; the lowest validation loss, its
    step and the precision it was measured in; how many evaluations have `waited` for a better one; `ended`: why before the
    last step, if it did; with which settings of the `training` all that came about.
    `suspicious` says that the weights may be bad, `resumable` that there is a checkpoint to go back to.
    """

    def __init__(self, run: Run, spec: Spec, report: Callable[..., None]) -> None:
        self.run, self.spec, self.report = run, spec, report
        self.seconds = 0.0
        self.tokens = self.skipped = self.waited = 0
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.precision = spec.quantization.compute_dtype
        self.best_precision: str | None = None
        self.ended: str | None = None
        self.training = changes.decides(spec.training.model_dump())
        self.suspicious = False
        self.resumable = run.resume is not None
        self._since: float | None = None

    def state(self) -> dict[str, Any]:
        self._count()
        return {"args": {}, "attributes": {name: getattr(self, name) for name in _KEPT}}

    def restore(self, state: Any) -> None:
        """Go on from the state of a checkpoint; what ended that run counts only where it still does."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        asked = self.training
        self.__dict__.update(kept["attributes"])
        if self.training != asked:  # what was waited for in vain may come with other settings
            self.training, self.waited = asked, 0
        limit, stopping = self.spec.limits.max_seconds, self.spec.evaluation.early_stopping
        if self.ended == "time_limit" and (limit is None or self.seconds < limit):
            self.ended = None
        if self.ended == "early_stop" and (stopping is None or self.waited < stopping.patience):
            self.ended = None
        if self.best_step is not None and self.best_folder is None:
            self.best_loss = self.best_step = (
                None  # its files are gone: the next evaluation is the best again
            )

    @property
    def best_folder(self) -> Path | None:
        """Where the weights of the best step lie."""
        here = self.run.work / "best"
        if (here / WEIGHTS).is_file():
            return here
        kept = [folder for folder in (self.run.resume, self.run.best) if folder is not None]
        return next((folder for folder in kept if _step_of(folder) == self.best_step), None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore(state)
        # A checkpoint brings the intervals that it was made with.
        state.compute_steps(args, state.max_steps)
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count()
        limit = self.spec.limits.max_seconds
        if limit is None or state.global_step >= state.max_steps or not ranks.agreed(self.seconds >= limit):
            return
        self.ended = "time_limit"
        control.should_training_stop = control.should_save = True
        control.should_evaluate = args.eval_strategy != "no"
        message = f"The time limit of {limit} s of training is reached at step {state.global_step}."
        self._note("time_limit", message, {"step": state.global_step, "seconds": round(self.seconds, 1)})

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        loss, step = metrics["eval_loss"], state.global_step
        stopping = self.spec.evaluation.early_stopping
        lowest = math.inf if self.best_loss is None else self.best_loss
        self.waited = 0 if loss < lowest - (stopping.min_delta if stopping else 0) else self.waited + 1
        if loss < lowest and not self.suspicious:
            self.best_loss, self.best_step, self.best_precision = loss, step, self.precision
            control.should_save = True
        if stopping is None or self.waited < stopping.patience or step >= state.max_steps:
            return
        self.ended = self.ended or "early_stop"
        control.should_training_stop = True
        control.should_save = control.should_save or not self.suspicious
        than = f" by more than {stopping.min_delta:g}" if stopping.min_delta else ""
        times = "1 evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        message = f"Stopped early at step {step}: no better validation loss{than} in {times}."
        self._note("early_stop", message, {"step": step, "best_step": self.best_step})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resumable = True
        if state.global_step == self.best_step and ranks.is_first():
            # A copy, since the checkpoint goes to the storage.
            (self.run.work / "best").mkdir(exist_ok=True)
            shutil.copyfile(
                Path(args.output_dir) / f"checkpoint-{state.global_step}" / WEIGHTS,
                self.run.work / "best" / WEIGHTS,
            )

    def _count(self) -> None:
        if self._since is not None:
            now = time.monotonic()
            self.seconds += now - self._since
            self._since = now

    def _note(self, kind: str, message: str, data: dict[str, Any]) -> None:
        self.report("note", type=kind, level="info", message=message, data=data)


def _step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder; None where it does not say."""
    try:
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
