"""What the trainer does, told as reports: metrics, checkpoints, the first step. And when to leave."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from transformers import TrainerCallback

from core.ml.training import ranks
from core.ml.training.files import checkpoints
from core.ml.training.loop.progress import Progress

# A long evaluation is no standstill.
_ALIVE_SECONDS = 10.0
_NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "mean_token_accuracy": "token_accuracy",
    "epoch": "epoch",
}


class Report(Protocol):
    """Where a run tells what happens: report("metrics", step=3, values={…})."""

    def __call__(self, kind: str, /, **data: Any) -> None: ...


@contextmanager
def alive(report: Report, seconds: float = math.inf) -> Iterator[None]:
    """Show that the work goes on while a library does something long in silence, such as a download; for so many seconds at
    most."""
    over, until = threading.Event(), time.monotonic() + seconds

    def tell() -> None:
        while not over.wait(_ALIVE_SECONDS) and time.monotonic() < until:
            report("alive")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Reporter(TrainerCallback):
    """Turns what the trainer does into reports, seals checkpoints, and leaves when asked to."""

    def __init__(
        self,
        report: Report,
        stop: Callable[[], bool],
        progress: Progress,
        describe: Callable[[Path], None],
    ) -> None:
        """`describe` completes a checkpoint's folder, so that its adapter can be talked to."""
        self.report, self.stop, self.progress, self.describe = report, stop, progress, describe
        self.alive = 0.0
        self.began = time.monotonic()
        self.first_step = -1
        self.tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step
        self.tokens_before = self.progress.tokens

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first_step + 1:
            self.report("first_step", step=state.global_step)
        if ranks.agreed(self.stop()):
            control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.alive > _ALIVE_SECONDS:
            self.alive = time.monotonic()
            self.report("alive")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "eval_loss" in logs:
            names = {"eval_loss": "eval_loss", "eval_runtime": "eval_seconds", "eval_tokens": "eval_tokens"}
            values = _finite({ours: float(logs[theirs]) for theirs, ours in names.items()})
            self.report("metrics", step=state.global_step, values=values, progress=None)
        if "learning_rate" not in logs:
            return  # not the log of a step
        # The library counts the tokens of this attempt alone.
        tokens = self.tokens_before + int(logs["num_tokens"])
        seconds = max(time.monotonic() - self.began, 1e-9)
        values = {ours: float(logs[theirs]) for theirs, ours in _NAMES.items() if theirs in logs}
        values |= {
            "tokens": float(tokens),
            "tokens_per_second": round((tokens - self.progress.tokens) / seconds, 1),
            "memory_bytes": float(memory_bytes()),
        }
        self.progress.tokens = tokens
        self.report(
            "metrics",
            step=state.global_step,
            values=_finite(values),
            progress={
                "tokens_per_second": values["tokens_per_second"],
                "eta_seconds": round(self._eta(state.global_step, state.max_steps), 1),
            },
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        ranks.barrier()  # each writes its random states there
        if ranks.is_first():
            self.describe(folder)
            files = checkpoints.seal(folder, ranks.count(), sharded=self.progress.run.sharded)
            self.report("checkpoint", step=state.global_step, folder=str(folder), files=files)

    def _eta(self, step: int, steps: int) -> float:
        """Seconds of training that are left, if they go on as those of all attempts so far: with their evaluations
        and checkpoints."""
        left = self.progress.seconds / step * (steps - step)
        limit = self.progress.spec.limits.max_seconds
        return left if limit is None else min(left, max(limit - self.progress.seconds, 0.0))


def memory_bytes() -> int:
    """The most that was taken of the GPU so far, or what this process takes of the machine's memory now."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
