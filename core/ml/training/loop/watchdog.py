"""What goes wrong in a training, seen early, and what is tried against it, rung by rung. Never a silent change.

Divergence: skip the batch; then back to the last good checkpoint with half the learning rate; then the same in
float32. Out of memory: half the batch with the same effective batch; then gradient checkpointing. Then the run
fails. No torch: the worker asks it too, where the system killed a trainer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from statistics import median
from typing import Any, Literal

from core.errors import GraftError, OutOfMemory
from core.ml.training.config import Spec

Cause = Literal["not_finite", "exploding", "zero_loss", "zero_gradient", "out_of_memory"]
Log = Mapping[str, float]
Changes = dict[str, Any]

MOST_SKIPPED = 3
# So many logs running are no chance.
RUNNING = 5
# A loss so many times the usual one and so many nats above it is no noise, and above the largest of the first ones no
# relapse. Of 200 steps of noise without a trend (lognormal, sigma 0.7) that ends one run in 300, sigma 0.5 none.
_TIMES = 3.0
_NATS = 1.0
_FEWEST = 5
_FIRST = 10
_WINDOW = 50
_REMEMBERED = 100

WORDS: dict[Cause, str] = {
    "not_finite": "the loss or the gradient is no finite number",
    "exploding": f"the loss is more than {_TIMES:.0f} times what it was, or worse than guessing",
    "zero_loss": "the loss is exactly zero although the predictions are wrong, so it is not computed rightly",
    "zero_gradient": "the gradient has been exactly zero from the beginning, so nothing is learnt",
    "out_of_memory": "the device has too little memory",
}


class Again(Exception):
    """The run cannot go on as it is, and begins again with `changes` of its spec.

    It goes on from its last checkpoint; with `from_start` there is none yet.
    """

    def __init__(self, cause: Cause, message: str, changes: Changes, *, from_start: bool) -> None:
        super().__init__(message)
        self.cause, self.message, self.changes, self.from_start = cause, message, changes, from_start

    def as_report(self) -> dict[str, Any]:
        return {
            "cause": self.cause,
            "message": self.message,
            "changes": self.changes,
            "from_start": self.from_start,
        }


def bad_step(loss: float, grad_norm: float, *, fp16: bool) -> bool:
    """Whether a step would spoil the weights. Float16's gradient scaler looks for its scale with infinite gradients
    and skips those steps itself."""
    return not (math.isfinite(loss) and (fp16 or math.isfinite(grad_norm)))


def suspicion(logs: Sequence[Log], guessing: float = math.inf) -> tuple[Cause, int] | None:
    """What the last of a run's logs {loss, grad_norm, mean_token_accuracy} look like, and for how many running.

    A loss of zero with every token right is none: the rows are known by heart. `guessing`: the loss of a model that takes
    every token for as likely, the logarithm of their number.
    """
    if not logs:
        return None
    if all(log["grad_norm"] == 0 and log["loss"] != 0 for log in logs):
        return "zero_gradient", len(logs)
    zeros = _last(logs, lambda log: log["loss"] == 0 and log["mean_token_accuracy"] < 1)
    if zeros:
        return "zero_loss", zeros
    high = _high([log["loss"] for log in logs], guessing)
    return ("exploding", high) if high else None


def recent(history: Sequence[Log]) -> list[Log]:
    """The logs of the first steps and of the last ones."""
    before = islice(history, max(len(history) - _REMEMBERED, 0))
    first = islice((log for log in before if "loss" in log), _FIRST)
    return [*first, *(log for log in history[-_REMEMBERED:] if "loss" in log)]


def _last(logs: Sequence[Log], like: Callable[[Log], bool]) -> int:
    return next((n for n, log in enumerate(reversed(logs)) if not like(log)), len(logs))


def _high(losses: Sequence[float], guessing: float) -> int:
    """How many of the last losses stand far above the median of those before them that did not; or, before that is known,
    are worse than guessing where the first one was better."""
    calm: list[float] = []
    running = 0
    for loss in losses:
        usual = median(calm[-_WINDOW:]) if len(calm) >= _FEWEST else math.inf
        worst = loss > guessing + _NATS and losses[0] < guessing
        if worst or (loss > max(_TIMES * usual, usual + _NATS) and loss > max(calm[:_FIRST])):
            running += 1
        else:
            running = 0
            calm.append(loss)
    return running


def next_rung(recoveries: Sequence[Mapping[str, Any]], cause: Cause, spec: Spec) -> Changes | None:
    """The changes of a resolved spec that come next; None when nothing is left to try.

    `recoveries` are the earlier ones of the job: {cause, changes, …}.
    """
    if cause == "out_of_memory":
        return _less_memory(spec)
    tried = [done for done in recoveries if done["cause"] != "out_of_memory"]
    if not tried:
        return {"training": {"learning_rate": spec.training.learning_rate / 2}}
    if spec.quantization.compute_dtype != "float32" and len(tried) == 1:
        return {"quantization": {"compute_dtype": "float32"}}
    return None


def _less_memory(spec: Spec) -> Changes | None:
    training = spec.training
    if training.batch_size == "auto":  # it died before it was planned: nothing is known of what it takes
        return None
    if training.batch_size > 1:
        # A divisor of what fitted divides every process's share of the step, too.
        smaller = range(1, training.batch_size // 2 + 1)
        size = max(n for n in smaller if training.batch_size % n == 0)
        return {"training": {"batch_size": size}}
    if training.gradient_checkpointing is True:
        return None
    return {"training": {"gradient_checkpointing": True}}


def recovery(
    cause: Cause,
    spec: Spec,
    recoveries: Sequence[Mapping[str, Any]],
    *,
    where: str,
    from_start: bool,
    skipped: int = 0,
) -> Again | GraftError:
    """What to raise: the next rung, or the failure that says what was tried."""
    changes = next_rung(recoveries, cause, spec)
    if changes is not None:
        back = "from the beginning" if from_start else "from the last checkpoint"
        message = f"{where} {WORDS[cause]}: on {back} with {_named(changes)}."
        return Again(cause, message, changes, from_start=from_start)
    tried = [_named(done["changes"]) for done in recoveries]
    if skipped:
        tried.insert(0, f"{skipped} batches skipped")
    message = f"{where} {WORDS[cause]}" + (f", after {', '.join(tried)}" if tried else "")
    if cause == "out_of_memory":
        return OutOfMemory(message + ".")
    return GraftError(
        "training_diverged",
        message + ": the run cannot go on.",
        status=422,
        hint="Lower training.learning_rate, or look for broken rows with the preview.",
    )


def _named(changes: Changes) -> str:
    return ", ".join(
        f"{part}.{name} {value}" for part, fields in changes.items() for name, value in fields.items()
    )
