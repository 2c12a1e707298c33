"""What the trainer does, told as reports: metrics, checkpoints, the first step. And when to leave."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from core.errors import GraftError
from core.ml.training import checkpoints

# A long evaluation is no standstill.
_ALIVE_SECONDS = 10.0


class Report(Protocol):
    """Where a run tells what happens: report("metrics", step=3, values={…})."""

    def __call__(self, kind: str, /, **data: Any) -> None: ...


class Reporter(TrainerCallback):
    """Turns what the trainer does into reports, seals checkpoints, and leaves when asked to."""

    def __init__(self, report: Report, stop: Callable[[], bool]) -> None:
        self.report, self.stop = report, stop
        self.tokens = self.alive = 0.0
        self.started = self.last = time.monotonic()
        self.first_step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.last = time.monotonic()
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first_step + 1:
            self.report("first_step", step=state.global_step)
        if self.stop():
            control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.alive > _ALIVE_SECONDS:
            self.alive = time.monotonic()
            self.report("alive")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "eval_loss" in logs:
            self.report(
                "metrics",
                step=state.global_step,
                values={"eval_loss": float(logs["eval_loss"])},
                progress=None,
            )
        if "loss" not in logs:
            return
        loss, grad_norm = float(logs["loss"]), float(logs["grad_norm"])
        # With float16 the gradient scaler looks for its scale: it skips steps that overflow.
        if not (math.isfinite(loss) and (args.fp16 or math.isfinite(grad_norm))):
            raise GraftError(
                "training_diverged",
                f"At step {state.global_step} the loss is {loss} and the gradient norm {grad_norm}: the run cannot go on.",
                status=422,
                hint="Lower training.learning_rate, or look for broken rows with the preview.",
            )
        now, tokens = time.monotonic(), float(logs["num_tokens"])
        per_step = (now - self.started) / (state.global_step - self.first_step)
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(logs["learning_rate"]),
            "token_accuracy": float(logs["mean_token_accuracy"]),
            "tokens": tokens,
            "tokens_per_second": round((tokens - self.tokens) / max(now - self.last, 1e-9), 1),
            "epoch": float(logs["epoch"]),
        }
        self.report(
            "metrics",
            step=state.global_step,
            values=values,
            progress={
                "tokens_per_second": values["tokens_per_second"],
                "eta_seconds": round(per_step * (state.max_steps - state.global_step), 1),
            },
        )
        self.tokens, self.last = tokens, now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = checkpoints.seal(folder)
        self.report("checkpoint", step=state.global_step, folder=str(folder), files=files)
