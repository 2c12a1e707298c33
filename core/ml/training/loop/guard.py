"""The watchdog at its place in the training: every step is judged before the optimizer takes it."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback

from core.errors import GraftError
from core.ml.training import ranks
from core.ml.training.config import Spec
from core.ml.training.loop import watchdog
from core.ml.training.loop.progress import Progress
from core.ml.training.loop.reporter import Report


def documents(batch: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of a batch's rows, without padding; of packed rows each document by itself."""
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        return [row[mask.bool()].tolist() for row, mask in zip(ids, batch["attention_mask"], strict=True)]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [ids[0, begin:end].tolist() for begin, end in pairwise([*starts, ids.shape[1]])]


class Watchdog(TrainerCallback):
    """Judges every step of a `Trainer`. `line_of` finds the line of a row by its token ids; `vocabulary`: how many tokens
    the model chooses from."""

    def __init__(
        self,
        report: Report,
        progress: Progress,
        spec: Spec,
        recoveries: Sequence[Mapping[str, Any]],
        line_of: Callable[[list[int]], int | None],
        vocabulary: int,
    ) -> None:
        self.report, self.progress, self.spec = report, progress, spec
        self.recoveries, self.line_of = recoveries, line_of
        self.guessing = math.log(vocabulary)
        self.told_untrained = False

    def skips(self, step: int, batches: Sequence[Any], loss: float, grad_norm: float, *, fp16: bool) -> bool:
        """Whether the optimizer must leave this step out; tells so, and gives up after some.

        `batches` are this rank's, `loss` and `grad_norm` those of all ranks, which come to the same answer.

        Raises:
            Again, GraftError: too many steps were skipped.
        """
        if not ranks.agreed(any(bool((batch["labels"][..., 1:] >= 0).any()) for batch in batches)):
            if not self.told_untrained:
                self._note(step, "has no trained tokens: it is skipped, and so are others like it", batches)
            self.told_untrained = True
            return True
        if not watchdog.bad_step(loss, grad_norm, fp16=fp16):
            return False
        self.progress.suspicious = True
        if self.progress.skipped >= watchdog.MOST_SKIPPED:
            raise self._recovery("not_finite", step)
        self.progress.skipped += 1
        told = f"was skipped: {watchdog.WORDS['not_finite']} (loss {loss}, gradient norm {grad_norm})"
        self._note(step, told, batches)
        return True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "learning_rate" not in logs:
            return  # not the log of a step
        if "loss" in logs:
            found = watchdog.suspicion(watchdog.recent(state.log_history), self.guessing)
            if found and found[1] >= watchdog.RUNNING:
                raise self._recovery(found[0], state.global_step)
            self.progress.suspicious = found is not None
        if self.progress.suspicious:
            control.should_save = False  # the last checkpoint stays one that can be gone back to

    def _note(self, step: int, told: str, batches: Sequence[Any]) -> None:
        found = [self.line_of(row) for batch in batches for row in documents(batch)]
        lines = sorted(set(ranks.joined([line for line in found if line is not None])))
        shown = f" Lines of its rows: {', '.join(map(str, lines))}." if lines else ""
        self.report(
            "note",
            type="watchdog",
            level="warning",
            message=f"The batch of step {step} {told}.{shown}",
            data={"step": step, "lines": lines},
        )

    def _recovery(self, cause: watchdog.Cause, step: int) -> watchdog.Again | GraftError:
        return watchdog.recovery(
            cause,
            self.spec,
            self.recoveries,
            where=f"At step {step}",
            from_start=not self.progress.resumable,
            skipped=self.progress.skipped,
        )
