"""Questions to a worker: what would a run take on its device? Asked by an API process that waits."""

from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, select

from core.control.db import Session, now_epoch
from core.control.running import workers
from core.control.tables import Job, JobStatus, Probe, new_id

# Nobody waits longer for an answer.
PATIENCE_SECONDS = 120.0


def device_is_free(session: Session) -> bool:
    """Whether a worker most likely has nothing to do. It is asked then, and knows for certain."""
    queued = session.scalar(select(func.count()).where(Job.status == JobStatus.QUEUED)) or 0
    asked = session.scalar(select(func.count()).where(_waited_for())) or 0
    return workers.idle_slots(session) > queued + asked


def is_busy(session: Session, owner: str) -> bool:
    """Whether a worker runs a job: on the same device, neither would be as it is alone."""
    mine = select(func.count()).where(Job.status == JobStatus.RUNNING, Job.owner == owner)
    return bool(session.scalar(mine))


def ask(session: Session, *, model: str, dataset_id: str, spec: dict[str, Any]) -> str:
    """The id to wait with. Questions that nobody waits for any more are forgotten."""
    session.execute(delete(Probe).where(Probe.asked < now_epoch() - PATIENCE_SECONDS))
    probe = Probe(id=new_id("probe"), model=model, dataset_id=dataset_id, spec=spec, asked=now_epoch())
    session.add(probe)
    return probe.id


def open_question(session: Session, probe_id: str) -> tuple[Probe, float] | None:
    """The question and the seconds in which somebody waits for its answer; None after that."""
    left = Probe.asked + PATIENCE_SECONDS - now_epoch()
    row = session.execute(select(Probe, left).where(Probe.id == probe_id, _waited_for())).first()
    return (row[0], float(row[1])) if row else None


def answer(session: Session, probe_id: str, found: dict[str, Any]) -> None:
    if (probe := session.get(Probe, probe_id)) is not None:
        probe.answer = found


def answered(session: Session, probe_id: str) -> dict[str, Any] | None:
    probe = session.get(Probe, probe_id)
    return probe.answer if probe else None


def forget(session: Session, probe_id: str) -> None:
    session.execute(delete(Probe).where(Probe.id == probe_id))


def _waited_for() -> ColumnElement[bool]:
    return and_(Probe.answer.is_(None), Probe.asked > now_epoch() - PATIENCE_SECONDS)
