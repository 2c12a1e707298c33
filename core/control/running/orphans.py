"""Folders of the storage that belong to no row: their process died between file and row, or could not delete them."""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select
from ulid import ULID

from core.control.db import Session
from core.control.tables import Adapter, Checkpoint, Dataset, Export, Job, JobKind, JobStatus, Project, utcnow

# Files come before their row: of what is younger, somebody may still be at work on the row.
_AGE = timedelta(days=1)
_AT_ONCE = 500
# What a job left is looked for so long after its end: a listing for every job there ever was takes a bucket hours.
_LATELY = timedelta(days=7)


def worked_on(session: Session) -> list[str]:
    """The folders in which jobs that are not over, or not for long, may have left something."""
    lately = or_(Job.finished_at.is_(None), Job.finished_at > utcnow() - _LATELY)
    found = set()
    for job_id, kind, spec in session.execute(select(Job.id, Job.kind, Job.spec).where(lately)):
        if kind == JobKind.EXPORT:
            found.add(f"adapters/{spec['export']['adapter_id']}/exports")
        else:
            found.add(f"jobs/{job_id}/checkpoints")
    return sorted(found)


def among(session: Session, folder: str, names: Sequence[str]) -> list[str]:
    """Those of `names`, which were found in `folder` before, that belong to nobody. What else lies there is not ours."""
    match folder.split("/"):
        case ["datasets"]:
            return _without_row(session, Dataset.id, "ds", names)
        case ["jobs"]:
            return _without_row(session, Job.id, "job", names)
        case ["adapters"]:
            return _without_row(session, Adapter.id, "ad", names)
        case ["adapters", id_, "exports"] if _made("ad", id_) and session.get(Adapter, id_):
            return _without_row(session, Export.id, "exp", names)
        case ["jobs", id_, "checkpoints"] if _made("job", id_) and (job := session.get(Job, id_)):
            return _unreachable(session, job, folder, names)
    return []


def _without_row(session: Session, column: Any, prefix: str, names: Iterable[str]) -> list[str]:
    # What is older than the database was made with another one: this one may be the wrong one, or new and empty.
    begun = session.scalar(select(func.min(Project.created_at)))
    if begun is None:
        return []
    until = utcnow() - _AGE
    old = [name for name in names if (made := _made(prefix, name)) and begun <= made < until]
    there: set[str] = set()
    for start in range(0, len(old), _AT_ONCE):
        there.update(session.scalars(select(column).where(column.in_(old[start : start + _AT_ONCE]))))
    return [name for name in old if name not in there]


def _made(prefix: str, name: str) -> datetime | None:
    """When an id was made, which stands in it; None for what is no id."""
    text = name.removeprefix(f"{prefix}_")
    try:
        ulid = ULID.from_str(text)
        return ulid.datetime if name == f"{prefix}_{ulid}" else None
    except ValueError:
        return None


def _unreachable(session: Session, job: Job, folder: str, names: Iterable[str]) -> list[str]:
    """Checkpoints that no row names and none ever will: a row is written with the fence of the claim that runs, which is
    in their name, `fence-step`."""
    kept = set(session.scalars(select(Checkpoint.key).where(Checkpoint.job_id == job.id)))
    over = job.fence - 1 if job.status == JobStatus.RUNNING else job.fence
    matches = (re.fullmatch("([0-9]+)-[0-9]+", name) for name in names)
    old = [match[0] for match in matches if match and int(match[1]) <= over]
    return [name for name in old if f"{folder}/{name}" not in kept]
