"""Presets on the wire."""

from typing import Any, Literal

from pydantic import BaseModel

from core.control.tables import Job, JobStatus
from core.ml.training.spec import presets
from core.ml.training.spec.presets import Band, Data, Mode, ModeName, Preset


class PresetOut(BaseModel):
    """Each mode has its `spec` and `validation`, which are fields of a job, the `mapping` its data is uploaded with
    if it has one, and its `warnings`. What a spec leaves out is the default of the field."""

    id: str
    object: Literal["preset"] = "preset"
    name: str
    version: int
    summary: str
    source: str
    model: str | None
    data: Data | None
    published: str | None
    band: Band | None
    modes: dict[ModeName, Mode]

    @classmethod
    def of(cls, preset: Preset) -> "PresetOut":
        said = {name: getattr(preset, name) for name in Preset.model_fields if name in cls.model_fields}
        modes: dict[ModeName, Mode] = {"fixed": preset.fixed, "faithful": preset.faithful}
        return cls(id=f"{preset.name}@{preset.version}", modes=modes, **said)


class Difference(BaseModel):
    preset: Any
    yours: Any


class BandResult(BaseModel):
    """Where a result lies against the published ones; the words say why, where it cannot be compared."""

    metric: str
    value: float | None
    low: float
    high: float
    where: Literal["inside", "below", "above", "not comparable"]
    words: str


class JobPreset(BaseModel):
    """The preset of a job: `diff` is what the request changed of it, by the fields' names; `result` is there once
    the job has succeeded, if the preset has a band."""

    name: str
    mode: ModeName
    diff: dict[str, Difference]
    warnings: list[str]
    band: Band | None
    result: BandResult | None = None

    @classmethod
    def of(cls, job: Job) -> "JobPreset | None":
        if job.preset is None:
            return None
        made = cls.model_validate(job.preset)
        if job.status == JobStatus.SUCCEEDED:
            result = presets.against_band(
                job.preset["band"],
                model=job.model,
                same_data=job.preset["same_data"],
                loss_on=job.spec["training"]["loss_on"],
                metrics=job.metrics,
            )
            made.result = BandResult(**result) if result else None
        return made
