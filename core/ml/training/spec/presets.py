"""Published fine-tuning runs as the starting point of a job: small data files beside this one. No torch.

A job names one as `zephyr_7b_sft` (its newest version), `zephyr_7b_sft@1`, or `zephyr_7b_sft@1:faithful`. Mode
`fixed`, which is meant where none is named, mends the faults of the published run; `faithful` keeps those that can
be kept. A published version never changes: what differs is a new version.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import Field

from core.errors import BadRequest, nearest
from core.ml.quantization import Part
from core.ml.training.config import Spec
from core.ml.training.spec import changes

ModeName = Literal["fixed", "faithful"]
_CHOICE = re.compile(r"(\w+?)(?:@(\d{1,4}))?(?::(\w+))?", re.ASCII)
# Of each of these, one takes the place of the other.
_EITHER = {"epochs": "max_steps", "max_steps": "epochs", "fraction": "dataset_id", "dataset_id": "fraction"}
_EVALUATED = ("every_steps", "early_stopping", "metrics")


class Band(Part):
    """Where the results of published runs lie. It holds for the preset's data, these base models, and a loss on the
    same tokens. `what` says what was measured."""

    metric: str
    low: float
    high: float
    models: list[str]
    loss_on: Literal["assistant", "completion", "all"] | None
    what: str


class Data(Part):
    """What was trained: the published name, how many rows (the whole set or a part that was used), how they read."""

    name: str
    rows: list[int]
    prompt: str


class Mode(Part):
    """`spec` and `validation` are fields of a job, `mapping` one of a data set's upload."""

    spec: dict[str, Any]
    validation: dict[str, Any] | None = None
    mapping: dict[str, Any] | None = None
    warnings: list[str] = Field([])


class Preset(Part):
    """`published` are the figures of the source as text; `band` is null where no job's result compares with them.
    Without a `model` of its own it is meant for any."""

    name: str
    version: int = Field(ge=1)
    summary: str
    source: str
    model: str | None
    data: Data | None
    published: str | None
    band: Band | None
    fixed: Mode
    faithful: Mode


@dataclass(frozen=True)
class Chosen:
    """A preset in one of its modes."""

    preset: Preset
    mode: ModeName

    @property
    def name(self) -> str:
        return f"{self.preset.name}@{self.preset.version}"

    @property
    def settings(self) -> Mode:
        return self.preset.fixed if self.mode == "fixed" else self.preset.faithful


@cache
def known() -> tuple[Preset, ...]:
    """Every version of every preset, by name, the newest first."""
    files = resources.files("core.ml.training.spec").joinpath("presets").iterdir()
    found = [_read(json.loads(file.read_text("utf-8"))) for file in files if file.name.endswith(".json")]
    return tuple(sorted(found, key=lambda preset: (preset.name, -preset.version)))


def find(choice: str) -> Chosen:
    """The preset of a name such as `guanaco_7b`, `guanaco_7b@1` or `guanaco_7b@1:faithful`.

    Raises:
        BadRequest: `unknown_preset`, with the nearest known name.
    """
    parts = _CHOICE.fullmatch(choice)
    name, version, mode = parts.groups() if parts else (choice, None, None)
    versions = [preset for preset in known() if preset.name == name]
    if not versions:
        near = nearest(name, {preset.name for preset in known()})
        raise _unknown(f'There is no preset "{name[:60]}"' + (f'; did you mean "{near}"?' if near else "."))
    fitting = [preset for preset in versions if version is None or preset.version == int(version)]
    if not fitting:
        there = ", ".join(f"{name}@{preset.version}" for preset in versions)
        raise _unknown(f"There is no version {version} of the preset {name}; there is {there}.")
    if mode not in (None, "fixed", "faithful"):
        raise _unknown(f'The preset {name} has no mode "{mode[:60]}"; its modes are fixed and faithful.')
    return Chosen(fitting[0], "faithful" if mode == "faithful" else "fixed")


def under(chosen: Chosen, said: dict[str, Any]) -> dict[str, Any]:
    """A job's request as it is meant: `said`, and the preset's settings where it says nothing.

    An adapter to continue from brings the LoRA settings, and a run without validation rows is not evaluated: the
    preset does not ask for what cannot be.
    """
    asked: dict[str, Any] = dict(chosen.settings.spec)
    if said.get("continue_from") is not None:
        asked.pop("lora", None)
    validation = said.get("validation", chosen.settings.validation)
    if validation is None and "evaluation" in asked:
        asked["evaluation"] = {
            name: value for name, value in asked["evaluation"].items() if name not in _EVALUATED
        }
    return _over(asked | {"validation": chosen.settings.validation}, said)


def record(
    chosen: Chosen, *, model: str, spec: Spec, validation: dict[str, Any] | None, same_data: bool
) -> dict[str, Any]:
    """What a job keeps of its preset: {name, mode, diff, warnings, band, same_data}.

    `spec` is the job's, not settled yet: what follows from a setting is no difference of its own.
    """
    settings, preset = chosen.settings, chosen.preset
    its = Spec.model_validate(settings.spec).model_dump() | _validation(settings.validation)
    mine = spec.model_dump() | _validation(validation)
    if preset.model is not None:
        its, mine = its | {"model": preset.model}, mine | {"model": model}
    theirs, yours = changes.changed(mine, its), changes.changed(its, mine)
    diff = {name: {"preset": theirs.get(name), "yours": yours.get(name)} for name in theirs | yours}
    return {
        "name": chosen.name,
        "mode": chosen.mode,
        "diff": {name: both for name, both in diff.items() if both["preset"] != both["yours"]},
        "warnings": settings.warnings,
        "band": preset.band.model_dump() if preset.band else None,
        "same_data": same_data,
    }


def is_its_data(preset: Preset, *, names: list[str], rows: int) -> bool:
    """Whether a data set is the preset's: as many rows, and its own or its file's name holds the published one."""
    if preset.data is None:
        return False
    published = _letters(preset.data.name.rsplit("/")[-1])
    return rows in preset.data.rows and any(published in _letters(name) for name in names)


def against_band(
    band: dict[str, Any] | None,
    *,
    model: str,
    same_data: bool,
    loss_on: str | None,
    metrics: dict[str, float],
) -> dict[str, Any] | None:
    """Where a finished job lies against the band: {metric, value, low, high, where, words}; None without a band.

    `where` is inside, below, above, or not comparable, and then the words say why.
    """
    if band is None:
        return None
    reference = Band.model_validate(band)
    value = metrics.get(reference.metric)
    reasons = []
    if model not in reference.models:
        reasons.append(f"the base model is {model}, not {' or '.join(reference.models)}")
    if not same_data:
        reasons.append("the data set is not the preset's by its name and number of rows")
    if reference.loss_on not in (None, loss_on):
        reasons.append(f"training.loss_on is {loss_on}, not {reference.loss_on}")
    if value is None:
        reasons.append(f"the job has no {reference.metric}")
    found: dict[str, Any] = {
        "metric": reference.metric,
        "value": value,
        "low": reference.low,
        "high": reference.high,
    }
    if reasons or value is None:
        words = f"Not comparable with the reference ({reference.what}): {'; '.join(reasons)}."
        return found | {"where": "not comparable", "words": words}
    where = "below" if value < reference.low else "above" if value > reference.high else "inside"
    words = (
        f"{reference.metric} {value:.4g} is {where} the reference band of {reference.low} to {reference.high}"
    )
    return found | {"where": where, "words": f"{words} ({reference.what})."}


def _read(file: dict[str, Any]) -> Preset:
    """A preset from its file, where `faithful` has only what differs from `fixed`."""
    return Preset.model_validate(file | {"faithful": _over(file["fixed"], file["faithful"])})


def _over(under_: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    replaced = {_EITHER[name] for name, value in said.items() if name in _EITHER and value is not None}
    made = {name: value for name, value in under_.items() if name not in replaced}
    for name, value in said.items():
        inner = made.get(name)
        made[name] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return made


def _validation(said: dict[str, Any] | None) -> dict[str, Any]:
    return {"validation": {"dataset_id": None, "fraction": None} | (said or {})}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _unknown(message: str) -> BadRequest:
    names = ", ".join(dict.fromkeys(preset.name for preset in known()))
    hint = f"Presets: {names}. GET /presets shows them."
    return BadRequest("unknown_preset", message, param="preset", hint=hint)
