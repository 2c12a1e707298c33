"""From a spec and its rows to what will be done: nothing is left "auto". No torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from core.errors import BadRequest
from core.ml.scores import choice
from core.ml.training import config
from core.ml.training.config import Evaluation, Spec, Training
from core.ml.training.data import Rows
from core.ml.training.spec import memory, support
from core.ml.training.spec.memory import Shape
from core.ml.training.speed import packing

# Line numbers that are named of each kind.
_LISTED = 100
_EVALUATIONS = 4
_MOST_EVALUATIONS = 40
# A micro-batch of so many rows, or of more while it has no more tokens than this, keeps a device busy.
_MOST_ROWS = 8
_MANY_TOKENS = 4096
# A smaller one without gradient checkpointing is slower than a larger one with it.
_FEW_TOKENS = 1024
# Of the free memory; the rest is for what the reckoning does not know.
_SHARE = 0.8


@dataclass(frozen=True)
class Device:
    """What a run is planned for; `packing`: whether rows can be packed without cost or contamination.

    Each of the `processes` has `free_bytes` for itself; `sharded`: each holds a part of the model.
    """

    compute_dtype: Literal["bfloat16", "float16", "float32"]
    cuda: bool
    free_bytes: int
    packing: bool = False
    processes: int = 1
    sharded: bool = False


@dataclass(frozen=True)
class Plan:
    """A spec without "auto". `kept`: the 4-bit weights lie in memory dequantised. `memory_bytes`: what the run takes
    at its peak; None for a model whose shape is not known."""

    spec: Spec
    total_steps: int
    kept: bool = False
    memory_bytes: int | None = None


def made(spec: Spec, rows: Rows, device: Device, shape: Shape | None, *, kept: bool | None = None) -> Plan:
    """What will be done with these rows of a model of this shape on this device. `kept` as an earlier attempt had it:
    other products round differently, and the run would not go on as it began; given up only where there is no room for it.

    Raises:
        BadRequest: `batch_not_divisible`, and what `support` says that cannot be done.
    """
    if device.sharded:
        support.check_sharded(spec)
    chosen = _on_device(spec, device)
    batch, kept, checkpointing, size = _layout(chosen, rows, device, shape, kept)
    changes: dict[str, Any] = {"batch_size": batch}
    if spec.training.gradient_checkpointing == "auto":
        changes["gradient_checkpointing"] = checkpointing
    chosen = chosen.model_copy(update={"training": chosen.training.model_copy(update=changes)})
    chosen = resolved(chosen, rows)
    return Plan(chosen, total_steps(chosen, trained_rows(chosen, rows)), kept, size)


def _on_device(spec: Spec, device: Device) -> Spec:
    quantization = spec.quantization.model_copy(update={"compute_dtype": device.compute_dtype})
    packed = device.packing if spec.training.packing == "auto" else spec.training.packing
    optimizer = support.optimizer(spec, cuda=device.cuda, sharded=device.sharded)
    training = spec.training.model_copy(update={"packing": packed, "optimizer": optimizer})
    return spec.model_copy(update={"quantization": quantization, "training": training})


def _layout(
    spec: Spec, rows: Rows, device: Device, shape: Shape | None, kept: bool | None
) -> tuple[int, bool, bool, int | None]:
    """Rows of a micro-batch, whether the weights are kept dequantised, whether activations are computed again, and
    the bytes that takes: the fastest that fits, or the smallest."""
    lengths = sorted((rows.data.lengths[place] for place in rows.train), reverse=True)
    packed = spec.training.packing is True
    if packed:
        lengths = [_limit(spec, rows)]
    ratio = rows.data.trained_tokens / max(sum(rows.data.lengths), 1)
    found: tuple[int, bool, bool, int] | None = None
    share = _share(spec.training, device.processes)
    steps = total_steps(spec, trained_rows(spec, rows))
    keeping = [True, False] if spec.quantization.bits == 4 and not device.cuda else [False]
    keeping = keeping if kept is None else [kept]
    for batch, keep, checkpointing in _layouts(spec.training, share, lengths[0], keeping):
        if shape is None:
            return batch, False, checkpointing, None
        # On a GPU rows are padded to the longest.
        read = [lengths[0]] * batch if device.cuda or packed else lengths[:batch]
        trained = int(sum(read) * ratio)
        size = memory.needed(
            shape,
            spec,
            read,
            trained,
            cuda=device.cuda,
            kept=keep,
            checkpointing=checkpointing,
            parts=device.processes if device.sharded else 1,
            steps=steps,
        )
        found = (batch, keep, checkpointing, size)
        if size <= _SHARE * device.free_bytes:
            break
    assert found is not None
    if kept and found[3] > device.free_bytes:
        # Other roundings are better than an end for want of memory.
        return _layout(spec, rows, device, shape, kept=False)
    return found


def _share(training: Training, processes: int) -> int:
    """Rows of an optimizer step that each process takes."""
    effective, batch = training.effective_batch_size, training.batch_size
    share, rest = divmod(effective, processes)
    if rest or (batch != "auto" and share % batch):
        parts = f"{processes} processes" + ("" if batch == "auto" else f" with batch_size {batch} each")
        raise BadRequest(
            "batch_not_divisible",
            f"effective_batch_size {effective} cannot be divided among {parts}.",
            param="training.effective_batch_size" if rest else "training.batch_size",
            hint=f"Set training.effective_batch_size to a multiple of {processes}"
            + ("." if batch == "auto" else f' times {batch}, or training.batch_size to "auto".'),
        )
    return share


def _layouts(
    training: Training, share: int, longest: int, keeping: list[bool]
) -> Iterator[tuple[int, bool, bool]]:
    """From the fastest to the smallest, of `share` rows at most."""
    most = max(_MOST_ROWS, _MANY_TOKENS // max(longest, 1))
    batches = (
        [n for n in range(min(most, share), 0, -1) if share % n == 0]
        if training.batch_size == "auto"
        else [training.batch_size]
    )
    large = [n for n in batches if n * longest >= _FEW_TOKENS] or batches[:1]
    asked = training.gradient_checkpointing
    if asked is not True:
        yield from ((n, kept, False) for kept, n in product(keeping, large))
    if asked is not False:
        yield from ((n, kept, True) for kept, n in product(keeping, batches))
    else:
        yield from ((n, keeping[-1], False) for n in batches)


def fed(spec: Spec, rows: Rows) -> list[list[int]]:
    """Places of the training rows that are fed as one: with packing several."""
    if spec.training.packing is not True:
        return [[place] for place in rows.train]
    packs = packing.packs([rows.data.lengths[place] for place in rows.train], _limit(spec, rows))
    return [[rows.train[i] for i in pack] for pack in packs]


def trained_rows(spec: Spec, rows: Rows) -> int:
    """Rows as they are fed."""
    return len(fed(spec, rows)) if spec.training.packing is True else len(rows.train)


def tokens_of_step(spec: Spec, rows: Rows) -> float:
    """That an optimizer step reads, in the mean: the last of an epoch may read fewer."""
    read = sum(rows.data.lengths[place] for place in rows.train)
    return read / steps_per_epoch(spec, trained_rows(spec, rows))


def _limit(spec: Spec, rows: Rows) -> int:
    """Tokens of a row, several packed in one or not."""
    limit = spec.training.max_length
    return _longest(rows) if limit == "auto" else limit


def _longest(rows: Rows) -> int:
    """Of both sides: read with it again, by an attempt that goes on, they must come out the same."""
    return max(rows.data.longest, rows.valid.longest if rows.valid else 0)


def total_steps(spec: Spec, rows: int) -> int:
    """Optimizer steps over so many training rows."""
    return config.steps(spec.training, steps_per_epoch(spec, rows))


def steps_per_epoch(spec: Spec, rows: int) -> int:
    """Optimizer steps of one pass over so many training rows, as they are fed."""
    return math.ceil(rows / spec.training.effective_batch_size)


def validation_tokens(rows: Rows) -> int:
    """That an evaluation reads."""
    if rows.valid is not None:
        return sum(rows.valid.lengths)
    return sum(rows.data.lengths[place] for place in rows.held_back)


def pauses(planned: Plan, rows: Rows) -> tuple[int, int]:
    """Evaluations of a run, and its checkpoints if every evaluation is the best so far."""

    def at(every: int | str | None) -> set[int]:
        steps = planned.total_steps
        return {*range(every, steps + 1, every), steps} if isinstance(every, int) else set()

    evaluated = at(planned.spec.evaluation.every_steps) if rows.valid_count else set()
    return len(evaluated), len(evaluated | at(planned.spec.checkpoints.every_steps))


def resolved(spec: Spec, rows: Rows) -> Spec:
    """The spec with what the rows decide; what the device decides stays as it is.

    Raises:
        BadRequest: what `support` says that cannot be done.
    """
    support.check(spec)
    training = spec.training
    changes: dict[str, Any] = {}
    if training.max_length == "auto":
        changes["max_length"] = _longest(rows)
    if training.loss_on == "auto":
        changes["loss_on"] = "all" if rows.data.texts else "assistant"
    spec = spec.model_copy(update={"training": training.model_copy(update=changes)})
    count = trained_rows(spec, rows)
    every = spec.checkpoints.every_steps
    if every == "auto":
        every = min(max(total_steps(spec, count) // 5, 1), 50)
    checkpoints = spec.checkpoints.model_copy(update={"every_steps": every})
    return spec.model_copy(update={"evaluation": _evaluation(spec, rows, count), "checkpoints": checkpoints})


def _evaluation(spec: Spec, rows: Rows, count: int) -> Evaluation:
    """When it is evaluated, and by which metrics; `count` are the training rows as they are fed."""
    asked = spec.evaluation
    every, metrics = asked.every_steps, asked.metrics
    if every == "auto":
        every = _evaluation_interval(spec, count) if rows.valid_count else None
    if metrics == "auto":
        metrics = choice.chosen(rows.data.answers) if rows.valid_count else []
    return asked.model_copy(update={"every_steps": every, "metrics": metrics})


def _evaluation_interval(spec: Spec, rows: int) -> int:
    """Steps between evaluations: four of them in an epoch or in the run, and not many more in any run."""
    total = total_steps(spec, rows)
    return max(min(steps_per_epoch(spec, rows), total) // _EVALUATIONS, total // _MOST_EVALUATIONS, 1)


def counts(rows: Rows) -> dict[str, Any]:
    """What is used and what is not, with the first line numbers."""
    return {
        "rows": len(rows.train),
        "validation_rows": rows.valid_count,
        "dropped": _counted(rows.data.dropped),
        "truncated": _counted(rows.data.truncated),
        "validation_dropped": _counted(rows.valid.dropped if rows.valid else []),
        "validation_truncated": _counted(rows.valid.truncated if rows.valid else []),
        "in_both": _counted(rows.in_both),
        "trained_tokens": sum(rows.data.trained[place] for place in rows.train),
    }


def _counted(lines: list[int]) -> dict[str, Any]:
    return {"count": len(lines), "lines": lines[:_LISTED]}
