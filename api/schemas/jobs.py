"""Jobs on the wire. The training part of a request is `core.ml.training.config.Spec`."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from api.schemas.common import Name, Request
from api.schemas.presets import JobPreset
from core.control import jobs
from core.control.db import Session
from core.control.tables import Checkpoint, Job, JobEvent, JobKind, JobStatus
from core.errors import BadRequest
from core.ml.training import config
from core.ml.training.config import Spec
from core.ml.training.spec import presets

# Names of metadata: what both databases can look up by.
LABEL = r"^[\w.:/ -]+$"


class Validation(Request):
    """Rows that are not trained: another data set, or a share of this one."""

    dataset_id: str | None = None
    fraction: float | None = Field(None, gt=0, le=0.5)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.dataset_id is None) == (self.fraction is None):
            raise ValueError("give dataset_id or fraction")
        return self


class JobCreate(Spec):
    """Only `dataset_id` is needed; everything else has a default, or comes from `preset`.

    `preset` is `name` (its newest version), `name@version` or `name@version:mode`, with the modes `fixed`, the
    default, and `faithful`. Each field that is given here takes the place of the preset's. `model` is by default
    that of the adapter to continue from, the preset's if it has one, or the service's.
    """

    dataset_id: str
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    preset: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = Field(
        None, examples=["default_qlora", "zephyr_7b_sft@1", "zephyr_7b_sft@1:faithful"]
    )
    name: Name | None = None
    validation: Validation | None = Field(None, validate_default=True)
    priority: int = Field(
        0, ge=-100, le=100, description="Of the jobs that wait, the one with the highest starts first."
    )
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64, pattern=LABEL)],
        Annotated[str, StringConstraints(max_length=512)],
    ] = Field({}, max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, said: Any) -> Any:
        """The preset's settings come in before anything is checked: what is checked is what will be run."""
        if not isinstance(said, dict):
            return said
        if said.get("continue_from") is not None and said.get("lora"):
            raise BadRequest(
                "invalid_request",
                "The adapter to continue from brings its own lora settings, so lora cannot be given too.",
                param="lora",
                hint="Leave lora out, or leave continue_from out to begin with a new adapter.",
            )
        choice = said.get("preset")
        return presets.under(presets.find(choice), said) if isinstance(choice, str) else said

    @field_validator("validation")
    @classmethod
    def _rows_to_evaluate_on(cls, value: Validation | None, info: ValidationInfo) -> Validation | None:
        evaluation = info.data.get("evaluation")
        if value is None and evaluation is not None and (asked := evaluation.needs_validation):
            raise ValueError(
                f"evaluation.{asked} has nothing to evaluate on; "
                'give rows that are not trained, {"fraction": 0.05} or {"dataset_id": …}'
            )
        return value

    def spec(self) -> Spec:
        """What the trainer reads, as it was asked for."""
        return Spec(**{name: getattr(self, name) for name in Spec.model_fields})

    def kept_spec(self, spec: Spec) -> dict[str, Any]:
        """What is kept in a row."""
        return config.settle(spec).model_dump() | {
            "validation": self.validation.model_dump() if self.validation else None
        }


class Progress(BaseModel):
    step: int
    total_steps: int | None
    percent: float
    tokens_per_second: float | None
    eta_seconds: float | None


class JobOut(BaseModel):
    """`recoveries`: the changes that the run made to its own spec to go on, each with its cause."""

    id: str
    object: Literal["job"] = "job"
    name: str
    status: JobStatus
    phase: str | None
    progress: Progress
    queue: dict[str, int] | None
    kind: JobKind
    priority: int
    model: str
    preset: JobPreset | None
    dataset_id: str | None
    validation: dict[str, Any] | None
    spec: dict[str, Any]
    metrics: dict[str, float]
    adapter_id: str | None
    error: dict[str, Any] | None
    attempt: int
    recoveries: list[dict[str, Any]]
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, session: Session, job: Job) -> "JobOut":
        return cls.page(session, [job])[0]

    @classmethod
    def page(cls, session: Session, rows: list[Job]) -> "list[JobOut]":
        positions = jobs.positions(session, rows)
        return [cls._of(row, positions.get(row.id)) for row in rows]

    @classmethod
    def _of(cls, job: Job, position: int | None) -> "JobOut":
        total = job.total_steps
        done = job.status == JobStatus.SUCCEEDED
        percent = 100.0 if done else round(100 * job.step / total, 1) if total else 0.0
        spec = {name: value for name, value in job.spec.items() if name != "validation"}
        return cls(
            id=job.id,
            name=job.name,
            status=job.status,
            phase=job.phase,
            progress=Progress(
                step=job.step,
                total_steps=total,
                percent=percent,
                tokens_per_second=job.tokens_per_second,
                eta_seconds=job.eta_seconds,
            ),
            queue=None if position is None else {"position": position},
            kind=job.kind,
            priority=job.priority,
            model=job.model,
            preset=JobPreset.of(job),
            dataset_id=job.dataset_id,
            validation=job.spec.get("validation"),
            spec=spec,
            metrics=job.metrics,
            adapter_id=job.adapter_id,
            error=job.error,
            attempt=job.attempt,
            recoveries=job.recoveries,
            metadata=job.labels,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
        )


class EventOut(BaseModel):
    id: int
    object: Literal["job.event"] = "job.event"
    created_at: datetime
    level: str
    type: str
    message: str
    data: dict[str, Any] | None

    @classmethod
    def of(cls, row: JobEvent) -> "EventOut":
        return cls.model_validate(row, from_attributes=True)


class CheckpointOut(BaseModel):
    object: Literal["job.checkpoint"] = "job.checkpoint"
    step: int
    bytes: int
    metrics: dict[str, Any]
    best: bool
    created_at: datetime

    @classmethod
    def of(cls, row: Checkpoint, *, best: bool) -> "CheckpointOut":
        size = sum(int(info["bytes"]) for info in row.files)
        return cls(step=row.step, bytes=size, metrics=row.metrics, best=best, created_at=row.created_at)
