"""What an adapter is worth: losses and answers of base and adapter on the same rows, and a verdict in words.

Better or worse is told by the first score that fits the data, and by the loss where answers are free text, of which
ROUGE sees only the words: better when the whole 95 % interval of the difference lies on that side of nothing.

Memorised: of what the adapter gained over its base on rows that it was trained on (32 of them, from the first to
the last), more than half is missing on the validation rows, and more than 0.1 of loss. Not asked where no row was
trained more than once: in one pass over rows that are all different, from an adapter that is new.
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from peft import PeftModel

from core.ml import catalogue
from core.ml.inference import greedy
from core.ml.inference.greedy import Answer, Tick
from core.ml.prompts import Contract
from core.ml.proof import questions
from core.ml.proof.measure import Losses, losses, mean
from core.ml.proof.questions import Question
from core.ml.scores import metrics as scores
from core.ml.scores.metrics import Scored
from core.ml.training import plan
from core.ml.training.config import Spec
from core.ml.training.data import CHECKED_ROWS, LabelledIds, Rows
from core.ml.training.run import Run

STOPS = 0.8
# Rows that were trained whose loss is compared with that of the others.
_TRAINED = 32
_LOST = 0.5
_LEAST = 0.1
# Tokens of an answer beyond the expected ones, and at most.
_SPARE = 8
_MOST_NEW = 512
# Tokens of all answers of a side, which take most of a proof's time; so many questions are asked all the same.
_MOST_TOKENS = 8_192
# Of fewer rows no interval tells anything.
_FEWEST_ROWS = 5
_FEWEST = 8

Better = Literal["better", "no better", "worse"]


@dataclass(frozen=True)
class Side:
    """Base or adapter: its losses on the first rows, and on rows that were trained; its answers."""

    losses: Losses
    trained: Losses | None
    answers: list[Answer]


@dataclass(frozen=True)
class Evaluation:
    """`kept` are the places of validation rows in the losses that prove something; `passes` over the training rows;
    `unscored`: metrics of the spec that say nothing of any row."""

    base: Side
    adapter: Side
    kept: list[int]
    passes: float
    scores: list[Scored]
    valid: int
    unscored: Sequence[str] = ()

    @property
    def check_loss(self) -> float:
        """The adapter's loss on the rows that training measured it on."""
        return self.adapter.losses.of(slice(CHECKED_ROWS)).mean

    @property
    def eval_loss(self) -> float | None:
        """The adapter's loss on all validation rows, where it was measured on all."""
        return self.adapter.losses.mean if 0 < self.valid <= len(self.adapter.losses.sums) else None

    @property
    def stop_rate(self) -> float | None:
        found = [answer.finish_reason == "stop" for answer in self.adapter.answers]
        return sum(found) / len(found) if found else None

    @cached_property
    def loss(self) -> Scored | None:
        """The loss of base and adapter on the same rows; the interval by resampling of rows."""
        if not self.kept:
            return None
        base, adapter = (side.losses.of(self.kept).rows for side in (self.base, self.adapter))
        return scores.paired("loss", base, adapter, statistic=mean)

    def as_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "rows": len(self.kept),
            "base": _measured(self.base.losses, self.kept),
            "adapter": _measured(self.adapter.losses, self.kept),
            "loss": self.loss.as_dict() if self.loss else None,
            "scores": {scored.name: scored.as_dict() for scored in self.scores},
            "stop_rate": self.stop_rate,
            "answers": len(self.adapter.answers),
            "training_rows": None,
            "verdict": verdict(self),
        }
        if self.base.trained is not None and self.adapter.trained is not None:
            made["training_rows"] = {
                "rows": len(self.base.trained.sums),
                "base": self.base.trained.mean,
                "adapter": self.adapter.trained.mean,
                "passes": self.passes,
            }
        return made


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 80.0))


def _measured(losses: Losses, kept: list[int]) -> dict[str, float] | None:
    if not kept:
        return None
    loss = losses.of(kept).mean
    return {"loss": loss, "perplexity": perplexity(loss)}


def evaluate(
    model: PeftModel,
    contract: Contract,
    run: Run,
    spec: Spec,
    rows: Rows,
    tick: Tick,
    *,
    step: int | None = None,
) -> Evaluation:
    """Measure base and adapter. `spec` is the resolved one; `tick` is called all the while, and may raise. `step` is
    the one whose weights these are; None: the last that was planned."""
    places = range(max(spec.evaluation.rows, CHECKED_ROWS))
    lines, examples = _first(rows, len(places))
    kept = _kept(rows, lines[: spec.evaluation.rows])
    if kept:
        asked = questions.validation(run, rows, contract, [lines[place] for place in kept])
        seen = dict(zip(lines, examples, strict=True))
    else:
        asked = questions.training(run, rows, contract, CHECKED_ROWS)
        seen = {rows.data.lines[place]: rows.data.examples[place] for place in rows.train[:CHECKED_ROWS]}
    fitting, limit = _fitting(seen, asked, catalogue.context(run.model))
    trained_rows = plan.trained_rows(spec, rows)
    steps = plan.total_steps(spec, trained_rows) if step is None else step
    passes = steps / plan.steps_per_epoch(spec, trained_rows)
    again = _seen_again(rows) if passes <= 1 and spec.continue_from is None else rows.train
    trained = _spread(rows, again, min(len(kept), _TRAINED))

    def side(*, base: bool) -> Side:
        # Without validation rows there is nothing to compare answers on.
        prompts = [question.ids for question in fitting.values()] if kept or not base else []
        with model.disable_adapter() if base else nullcontext():
            return Side(
                losses(model, examples, tick),
                losses(model, trained, tick) if trained else None,
                greedy.answers(model, contract, prompts, limit, tick),
            )

    base, adapter = side(base=True), side(base=False)
    rows_asked = [question.row for question in fitting.values()]
    assert spec.evaluation.metrics != "auto"
    metrics = spec.evaluation.metrics if kept else []
    texts = [[answer.text for answer in side.answers] for side in (base, adapter)]
    scored, unscored = [], []
    for metric in metrics:
        found = scores.compare(metric, rows_asked, *texts) if rows_asked else []
        scored += found
        unscored += [] if found else [metric]
        tick()
    return Evaluation(base, adapter, kept, passes, scored, rows.valid_count, unscored)


def _first(rows: Rows, count: int) -> tuple[list[int], list[LabelledIds]]:
    """Lines and tokens of the first validation rows, or training rows where there are none."""
    if rows.valid is not None:
        return list(rows.valid.lines[:count]), rows.valid.examples[:count]
    places = (rows.held_back or rows.train)[:count]
    return [rows.data.lines[place] for place in places], [rows.data.examples[place] for place in places]


def _kept(rows: Rows, lines: list[int]) -> list[int]:
    """Places of the first validation rows, without those that are trained too."""
    shared = set(rows.in_both)
    return [place for place, line in enumerate(lines) if line not in shared] if rows.valid_count else []


def _seen_again(rows: Rows) -> list[int]:
    """Places of the training rows that stand in the data more than once."""
    times = Counter(rows.data.keys[place] for place in rows.train)
    return [place for place in rows.train if times[rows.data.keys[place]] > 1]


def _spread(rows: Rows, places: Sequence[int], count: int) -> list[LabelledIds]:
    """So many of these rows, from the first to the last."""
    picked = np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)
    return [rows.data.examples[places[int(place)]] for place in picked]


def _fitting(
    examples: dict[int, LabelledIds], asked: dict[int, Question], context: int
) -> tuple[dict[int, Question], int]:
    """The questions that their row begins with and that leave room for an answer, as many as there is time for; and
    the tokens that one may have."""
    if not asked:
        return {}, 0
    limit = _most_new([question.length for question in asked.values()])
    fitting = [
        (line, question)
        for line, question in asked.items()
        if examples[line]["input_ids"][: len(question.ids)] == question.ids
        and len(question.ids) + limit <= context
    ]
    return dict(fitting[: max(_FEWEST, _MOST_TOKENS // limit)]), limit


def _most_new(lengths: Sequence[int]) -> int:
    """Tokens that an answer may have: some more than the longest expected one, or half as many again as nearly all."""
    ordered = sorted(lengths)
    usual = int(1.5 * ordered[int(0.95 * (len(ordered) - 1))])
    return min(min(usual, ordered[-1]) + _SPARE, _MOST_NEW)


def verdict(found: Evaluation) -> dict[str, Any]:
    """{better, stops, memorised, words}; None where nothing can be said."""
    better, words = _better(found)
    stops = None if found.stop_rate is None else found.stop_rate >= STOPS
    if found.stop_rate is not None:
        whose = "its answers" if found.kept else "its answers to training prompts"
        does = "stops by itself" if stops else "does not stop reliably: it ends by itself"
        words += f" It {does} in {found.stop_rate:.0%} of {whose}."
    memorised, more = _memorised(found)
    return {"better": better, "stops": stops, "memorised": memorised, "words": words + more}


def _better(found: Evaluation) -> tuple[Better | None, str]:
    loss = found.loss
    if loss is None and len(found.base.losses.sums) >= _FEWEST_ROWS:
        # What was trained can only make it look better.
        base, adapter = found.base.losses.rows, found.adapter.losses.rows
        trained = scores.paired("loss", base, adapter, statistic=mean)
        if trained.interval[0] > 0:
            return (
                "worse",
                f"Even on rows that it was trained on it is worse than its base model: {_told(trained)}.",
            )
    if loss is None and found.valid:
        return (
            None,
            "All validation rows are trained, too, or were before, so nobody can tell whether it is better than its base "
            "model, and no answer was scored.",
        )
    if loss is None:
        return None, "Without validation rows nobody can tell whether it is better than its base model."
    if len(found.kept) < _FEWEST_ROWS:
        return None, "So few validation rows cannot tell whether it is better than its base model."
    telling = next((scored for scored in found.scores if scored.name != "rouge_l"), None)
    if telling is None or telling.rows < _FEWEST_ROWS or found.scores[0].name == "rouge_l":
        low, high = -loss.interval[1], -loss.interval[0]
    else:
        low, high = telling.interval
    better: Better = "better" if low > 0 else "worse" if high < 0 else "no better"
    is_what = {"better": "better than", "worse": "worse than", "no better": "no better for certain than"}[
        better
    ]
    told = [_told(scored) for scored in (*found.scores, loss)]
    return (
        better,
        f"On {len(found.kept)} validation rows the adapter is {is_what} its base model: {'; '.join(told)}.",
    )


def _told(scored: Scored) -> str:
    low, high = scored.interval
    return (
        f"{scored.name} {scored.base:.3f} → {scored.adapter:.3f} "
        f"({scored.difference:+.3f}, between {low:+.3f} and {high:+.3f})"
    )


def _memorised(found: Evaluation) -> tuple[bool | None, str]:
    base, adapter = found.base, found.adapter
    if not found.kept:
        return None, ""
    if base.trained is None or adapter.trained is None:
        return False, " It saw no row more than once, so it learnt none by heart."
    seen = base.trained.mean - adapter.trained.mean
    unseen = base.losses.of(found.kept).mean - adapter.losses.of(found.kept).mean
    memorised = seen - unseen > max(_LOST * seen, _LEAST)
    words = "It learnt its rows by heart" if memorised else "It did not learn its rows by heart"
    return memorised, f" {words}: its loss fell by {seen:.3f} on trained rows and by {unseen:.3f} on others."
