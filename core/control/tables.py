"""The tables and their enums. A row of `jobs` is the job; a message is only its id."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import Integer
from ulid import ULID

from core.control.db import UTCDateTime

Json = dict[str, Any]
# SQLite counts up only in a column of type INTEGER.
Counter = BigInteger().with_variant(Integer(), "sqlite")
Document = JSON().with_variant(JSONB(), "postgresql")


def new_id(prefix: str) -> str:
    """A sortable id such as `job_01J…`."""
    return f"{prefix}_{ULID()}"


def utcnow() -> datetime:
    return datetime.now(UTC)


class Table(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UTCDateTime(),
        Json: Document,
        list[Json]: Document,
        list[str]: Document,
    }


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobKind(StrEnum):
    TRAIN = "train"
    EXPORT = "export"


class Asked(StrEnum):
    """What a client asked of a running job."""

    CANCEL = "cancel"
    PAUSE = "pause"


FINISHED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class Role(StrEnum):
    ADMIN = "admin"
    MEMBER = "member"


class Project(Table):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)


class ApiKey(Table):
    """`id` stands in the key itself; of the secret only its hash is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    role: Mapped[Role]
    digest: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Dataset(Table):
    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    filename: Mapped[str]
    file_type: Mapped[str]
    format: Mapped[str]
    mapping: Mapped[Json | None]
    columns: Mapped[list[str]]
    rows: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    report: Mapped[Json]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)

    @property
    def key(self) -> str:
        return f"datasets/{self.id}/data"

    @property
    def is_text(self) -> bool:
        """Whether its rows are plain texts without turns."""
        return self.mapping is not None and "text" in self.mapping and "layout" not in self.mapping


class Job(Table):
    """`fence` goes up by one with every claim; each write of a worker names the fence it holds.

    `recoveries` are the changes that the run made to its own spec to go on: {step, cause, changes}.
    `preset` is {name, mode, diff, band}: what the caller's settings changed of it.
    `checkpoint_spec` is the spec that its checkpoints were made with, while a retry with another one, which they do not fit,
    has not yet come so far that it can take their place.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_queue", "status", "priority", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    kind: Mapped[JobKind] = mapped_column(default=JobKind.TRAIN)
    priority: Mapped[int] = mapped_column(default=0)
    name: Mapped[str]
    status: Mapped[JobStatus]
    phase: Mapped[str | None]
    model: Mapped[str]
    dataset_id: Mapped[str | None]
    preset: Mapped[Json | None]
    spec: Mapped[Json]
    checkpoint_spec: Mapped[Json | None]
    recoveries: Mapped[list[Json]] = mapped_column(default=list)
    labels: Mapped[Json]
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    tokens_per_second: Mapped[float | None]
    eta_seconds: Mapped[float | None]
    metrics: Mapped[Json]
    adapter_id: Mapped[str | None]
    error: Mapped[Json | None]
    attempt: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    not_before: Mapped[float | None]
    sent_at: Mapped[float | None]
    asked: Mapped[Asked | None]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobEvent(Table):
    __tablename__ = "job_events"
    id: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[Json | None]


class JobMetric(Table):
    """The values of one step. A step done again after a crash replaces its first values."""

    __tablename__ = "job_metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[Json]


class Checkpoint(Table):
    """The row is the commit: a checkpoint without one does not exist. `files` are its hashes."""

    __tablename__ = "checkpoints"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]
    files: Mapped[list[Json]]
    metrics: Mapped[Json]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)


class Adapter(Table):
    __tablename__ = "adapters"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    job_id: Mapped[str | None]
    name: Mapped[str]
    base_model: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    files: Mapped[list[Json]]
    metrics: Mapped[Json]
    certificate: Mapped[Json | None]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)

    @property
    def key(self) -> str:
        return f"adapters/{self.id}"

    @property
    def engine_name(self) -> str:
        """The adapter's name at the engine: it changes whenever the content does."""
        return f"{self.id}@{self.sha256[:12]}"


class Export(Table):
    """An adapter in another form, made by a job: merged weights or GGUF. `report` tells how near it is to the adapter."""

    __tablename__ = "exports"
    id: Mapped[str] = mapped_column(primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[str]
    format: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    files: Mapped[list[Json]]
    report: Mapped[Json]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)

    @property
    def key(self) -> str:
        return f"adapters/{self.adapter_id}/exports/{self.id}"

    @property
    def archive(self) -> str:
        """The key of its one zip."""
        return f"{self.key}/export.zip"


class Probe(Table):
    """A question to a worker: what a run would take on its device. Whoever asked waits for the answer."""

    __tablename__ = "probes"
    id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    dataset_id: Mapped[str]
    spec: Mapped[Json]
    asked: Mapped[float]
    answer: Mapped[Json | None]


class Worker(Table):
    """A worker process: where it runs, how many jobs it may take, when it was last heard of, and its `device` as
    `core.ml.training.plan.Device` has it, with its name; null until the worker has looked."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(primary_key=True)
    place: Mapped[str]
    pid: Mapped[int]
    pid_started: Mapped[str]
    slots: Mapped[int]
    seen: Mapped[float]
    device: Mapped[Json | None]


class Lease(Table):
    """Who may do a duty that only one process does at a time."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    until: Mapped[float]


class IdempotencyKey(Table):
    __tablename__ = "idempotency_keys"
    __table_args__ = (UniqueConstraint("project_id", "key"),)
    id: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str]
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
