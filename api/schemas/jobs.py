"""Jobs on the wire. The training part of a request is `core.ml.training.config.Spec`."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StringConstraints, model_validator

from api.schemas.common import Request
from core.control.tables import Checkpoint, Job, JobEvent, JobStatus
from core.ml.training import config
from core.ml.training.config import Spec

# Names of metadata: what both databases can look up by.
LABEL = r"^[\w.:/ -]+$"
Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]*$")]


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
    """Only `dataset_id` is needed."""

    dataset_id: str
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    name: Name | None = None
    validation: Validation | None = None
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64, pattern=LABEL)],
        Annotated[str, StringConstraints(max_length=512)],
    ] = Field({}, max_length=16)

    def settled(self) -> Spec:
        """What the trainer reads, as far as it needs neither data nor device."""
        return config.settle(Spec(**{name: getattr(self, name) for name in Spec.model_fields}))

    def kept_spec(self) -> dict[str, Any]:
        """What is kept in a row."""
        return self.settled().model_dump() | {
            "validation": self.validation.model_dump() if self.validation else None
        }


class Progress(BaseModel):
    step: int
    total_steps: int | None
    percent: float
    tokens_per_second: float | None
    eta_seconds: float | None


class JobOut(BaseModel):
    id: str
    object: Literal["job"] = "job"
    name: str
    status: JobStatus
    phase: str | None
    progress: Progress
    queue: dict[str, int] | None
    model: str
    dataset_id: str | None
    validation: dict[str, Any] | None
    spec: dict[str, Any]
    metrics: dict[str, float]
    adapter_id: str | None
    error: dict[str, Any] | None
    attempt: int
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job, position: int | None = None) -> "JobOut":
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
            model=job.model,
            dataset_id=job.dataset_id,
            validation=job.spec.get("validation"),
            spec=spec,
            metrics=job.metrics,
            adapter_id=job.adapter_id,
            error=job.error,
            attempt=job.attempt,
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
    created_at: datetime

    @classmethod
    def of(cls, row: Checkpoint) -> "CheckpointOut":
        size = sum(int(info["bytes"]) for info in row.files)
        return cls(step=row.step, bytes=size, metrics=row.metrics, created_at=row.created_at)
