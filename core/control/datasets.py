"""Data set rules and queries."""

from typing import Any, cast

from sqlalchemy import select

from core.control import db
from core.control.db import Session
from core.control.tables import FINISHED, Dataset, Job, new_id, utcnow
from core.errors import Conflict, NotFound
from core.ml.formats.chat.rows import Format
from core.ml.formats.files.rows import FileType, Limits
from core.ml.formats.validate import Reading
from core.settings import Settings

# How the file type of a packed file is kept.
_PACKED = ".gz"


def create(session: Session, project_id: str, **fields: Any) -> Dataset:
    """Insert a data set whose file lies in the storage already; `fields` are the table's columns."""
    dataset = Dataset(project_id=project_id, created_at=utcnow(), **fields)
    session.add(dataset)
    return dataset


def fresh_id() -> str:
    return new_id("ds")


def get(
    session: Session,
    project_id: str,
    dataset_id: str,
    *,
    param: str | None = None,
    to: db.Purpose | None = None,
) -> Dataset:
    """`to` holds the row until the transaction ends: whoever makes a job use it and whoever deletes it wait for each other.

    Raises:
        NotFound: `dataset_not_found`, for another project's data set too.
    """
    dataset = db.locked(session, Dataset, dataset_id, to) if to else session.get(Dataset, dataset_id)
    if dataset is None or dataset.project_id != project_id:
        raise NotFound(
            "dataset_not_found",
            f'There is no data set "{dataset_id[:60]}".',
            param=param,
            hint="GET /datasets lists those of your project.",
        )
    return dataset


def page(session: Session, project_id: str, *, limit: int, after: str | None) -> list[Dataset]:
    """Newest first; one more than `limit`, to tell whether there are more."""
    query = select(Dataset).where(Dataset.project_id == project_id)
    if after is not None:
        query = query.where(Dataset.id < after)
    return list(session.scalars(query.order_by(Dataset.id.desc()).limit(limit + 1)))


def delete(session: Session, project_id: str, dataset_id: str) -> Dataset:
    """Raises NotFound, or Conflict `dataset_in_use` while an unfinished job reads it."""
    dataset = get(session, project_id, dataset_id, to="change")
    users = session.scalars(select(Job).where(Job.project_id == project_id, Job.status.not_in(FINISHED)))
    for job in users:
        if dataset_id in (job.dataset_id, (job.spec.get("validation") or {}).get("dataset_id")):
            raise Conflict(
                "dataset_in_use",
                f"Job {job.id} is {job.status} and reads this data set.",
                hint="Wait until the job has ended, or cancel it.",
            )
    session.delete(dataset)
    return dataset


def limits(settings: Settings) -> Limits:
    return Limits(
        line_bytes=settings.line_max_bytes,
        unpacked_bytes=settings.unpacked_max_bytes,
        rows=settings.rows_max,
        columns=settings.columns_max,
        depth=settings.nesting_max,
    )


def kept_type(file_type: FileType, packed: bool) -> str:
    """The file type as the table keeps it, such as `jsonl.gz`."""
    return file_type + (_PACKED if packed else "")


def reading(dataset: Dataset, limits: Limits) -> Reading:
    """How the data set's file is read."""
    return Reading(
        cast(FileType, dataset.file_type.removesuffix(_PACKED)),
        dataset.file_type.endswith(_PACKED),
        cast(Format, dataset.format),
        dataset.mapping,
        limits,
    )
