"""Questions to a worker: what would a run take on its device? Asked by an API process that waits."""

from typing import Any

from sqlalchemy import delete, func, select

from core.control import workers
from core.control.db import Session, now_epoch
from core.control.tables import Job, JobStatus, Probe, new_id

# Nobody waits longer for an answer.
PATIENCE_SECONDS = 120.0
_OPEN = (Probe.answer.is_(None), Probe.asked > now_epoch() - PATIENCE_SECONDS)


def device_is_free(session: Session) -> bool:
    """Whether a worker has nothing to do, and neither a job nor another question waits for one."""
    queued = session.scalar(select(func.count()).where(Job.status == JobStatus.QUEUED)) or 0
    asked = session.scalar(select(func.count()).where(*_OPEN)) or 0
    return workers.idle_slots(session) > queued + asked


def ask(session: Session, project_id: str, *, model: str, dataset_id: str, spec: dict[str, Any]) -> str:
    """The id to wait with. Questions that nobody waits for any more are forgotten."""
    now = session.scalars(select(now_epoch())).one()
    session.execute(delete(Probe).where(Probe.asked < now - PATIENCE_SECONDS))
    probe = Probe(
        id=new_id("probe"), project_id=project_id, model=model, dataset_id=dataset_id, spec=spec, asked=now
    )
    session.add(probe)
    return probe.id


def open_question(session: Session, probe_id: str) -> Probe | None:
    """The question, while somebody waits for its answer."""
    return session.scalars(select(Probe).where(Probe.id == probe_id, *_OPEN)).first()


def answer(session: Session, probe_id: str, found: dict[str, Any]) -> None:
    if (probe := session.get(Probe, probe_id)) is not None:
        probe.answer = found


def answered(session: Session, probe_id: str) -> dict[str, Any] | None:
    probe = session.get(Probe, probe_id)
    return probe.answer if probe else None


def forget(session: Session, probe_id: str) -> None:
    session.execute(delete(Probe).where(Probe.id == probe_id))
