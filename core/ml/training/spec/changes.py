"""Changes to the spec of a job that ran already: merged field by field, and what they do to its checkpoints. No torch."""

from typing import Any

from pydantic import ValidationError

from core.errors import BadRequest
from core.ml.training import config
from core.ml.training.config import Spec, Training
from core.ml.training.spec import support

Json = dict[str, Any]

# A checkpoint made with another value of these does not fit: other base weights under the adapter, another
# adapter, another state of the optimizer, or other rows and another place among them. Everything else only
# decides how the run goes on from there.
_FOUNDATIONS = (
    "seed",
    "continue_from",
    "quantization.bits",
    "quantization.type",
    "quantization.double_quant",
    "lora.r",
    "lora.alpha",
    "lora.target_modules",
    "lora.use_rslora",
    "lora.use_dora",
    "lora.init",
    "training.effective_batch_size",
    "training.optimizer",
    "training.max_length",
    "training.overlength",
    "training.loss_on",
    "training.packing",
)
_LENGTHS = ("epochs", "max_steps")
_COMPUTED = ("batch_size", "gradient_checkpointing")


def merged(kept: Json, changes: Json) -> Json:
    """A job's kept spec with `changes` in it, valid again and with nothing left "auto" that needs no data.

    Raises:
        BadRequest: `invalid_request`, the changes do not go with the rest of the spec; what `support.check` refuses.
    """
    validation = kept.get("validation")
    spec = _joined({name: value for name, value in kept.items() if name != "validation"}, changes)
    training = changes.get("training") or {}
    for given, other in (_LENGTHS, _LENGTHS[::-1]):
        # One length of the run takes the place of the other.
        if training.get(given) is not None and other not in training:
            spec["training"] = spec["training"] | {other: None}
    try:
        whole = config.settle(Spec.model_validate(spec))
        support.check(whole)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        raise BadRequest(
            "invalid_request",
            f'The field "{field}" with these changes: {what}.',
            param=field,
            hint='What was "auto" has the value by now that the first attempt settled (see the job\'s spec): '
            'give that field too, or "auto" again.',
        ) from error
    _refuse_what_cannot_be(whole, changes, validation)
    return whole.model_dump() | {"validation": validation}


def _refuse_what_cannot_be(spec: Spec, changes: Json, validation: Any) -> None:
    if "evaluation" in changes and validation is None and (asked := spec.evaluation.needs_validation):
        raise BadRequest(
            "invalid_request",
            f"evaluation.{asked} has nothing to evaluate on: the job has no validation rows.",
            param=f"evaluation.{asked}",
            hint="Post a new job with validation.",
        )
    if "lora" in changes and spec.continue_from is not None:
        raise BadRequest(
            "invalid_request",
            "The adapter to continue from brings its own lora settings, so lora cannot be changed.",
            param="lora",
        )


def changed(before: Json, after: Json) -> Json:
    """The fields that differ, by their dotted names, with their new values."""
    old, new = _flat(before), _flat(after)
    return {name: value for name, value in new.items() if name not in old or old[name] != value}


def preset_diff(diff: Json, before: Json, after: Json) -> Json:
    """What a job changed of its preset, {field: {preset, yours}}, once its spec was changed as well."""
    old, found = _flat(before), dict(diff)
    for name, value in changed(before, after).items():
        its = found.pop(name, {"preset": old.get(name)})["preset"]
        if value != its:
            found[name] = {"preset": its, "yours": value}
    return found


def holds(kept: Json, changes: Json) -> bool:
    """Whether the spec has these values already; an "auto" is whatever it became."""
    spec = _flat(merged(kept, {})) if changes else {}
    return all(value in ("auto", spec.get(name)) for name, value in _flat(changes).items())


def unfit(before: Json, after: Json, step: int, epoch: int | None) -> list[str]:
    """The changed fields for which a checkpoint of `step` is of no use; none: the run can go on from it.

    `epoch`: the steps of one, where that is known. A checkpoint beyond the new end was trained for longer than is asked
    for; at the end no step is left that other settings could change.
    """
    different = changed(before, after)
    found = [name for name in different if name in _FOUNDATIONS]
    lengths = [name for length in _LENGTHS if different.get(name := f"training.{length}") is not None]
    training = Training.model_validate(after["training"])
    total = None if training.max_steps is None and epoch is None else config.steps(training, epoch or 0)
    if lengths and (total is None or total < step):
        found += lengths
    elif total == step:
        deciding = {f"training.{name}" for name in decides(after["training"])} | {"lora.dropout"}
        found += [name for name in different if name in deciding and name not in found]
    return found


def decides(training: Json) -> Json:
    """What of a spec's `training` decides what its steps come to: not how they are computed, nor how many there are."""
    return {name: value for name, value in training.items() if name not in (*_LENGTHS, *_COMPUTED)}


def _joined(spec: Json, changes: Json) -> Json:
    both = dict(spec)
    for name, value in changes.items():
        inner = both.get(name)
        both[name] = _joined(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return both


def _flat(spec: Json, prefix: str = "") -> Json:
    found: Json = {}
    for name, value in spec.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
