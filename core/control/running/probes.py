"""What would a run take? A question to a worker, asked by an API process that waits; or what earlier runs tell."""

from itertools import islice
from statistics import median
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, delete, func, select

from core.control.db import Session, now_epoch
from core.control.running import workers
from core.control.tables import Job, JobKind, JobMetric, JobStatus, Probe, new_id

# Nobody waits longer for an answer.
PATIENCE_SECONDS = 120.0
# So many earlier jobs are looked at for some alike, so many of them are taken, and so many steps of each.
_EARLIER, _ALIKE, _STEPS = 50, 5, 50


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


class Speed(NamedTuple):
    """Tokens per second: of the `steps` alone, and `overall`, with evaluations and checkpoints."""

    steps: float
    overall: float


def experience(session: Session, model: str, spec: dict[str, Any]) -> Speed | None:
    """The medians of the newest trainings of this model that was held and adapted in the same way; None where there
    are none. Whose jobs they were does not matter: a speed tells nothing of them."""
    alike = select(Job).where(
        Job.kind == JobKind.TRAIN, Job.status == JobStatus.SUCCEEDED, Job.model == model
    )
    jobs = session.scalars(alike.order_by(Job.finished_at.desc()).limit(_EARLIER))
    found = [
        _speed(session, job)
        for job in islice((job for job in jobs if _work(job.spec) == _work(spec)), _ALIKE)
    ]
    speeds = [speed for speed in found if speed is not None]
    return Speed(*map(median, zip(*speeds, strict=True))) if speeds else None


def _speed(session: Session, job: Job) -> Speed | None:
    rows = select(JobMetric.values).where(JobMetric.job_id == job.id).order_by(JobMetric.step.desc())
    paces = [
        values["tokens_per_second"]
        for values in session.scalars(rows.limit(_STEPS))
        if "tokens_per_second" in values
    ]
    seconds, tokens = job.metrics.get("train_seconds"), job.metrics.get("tokens")
    return Speed(median(paces), tokens / seconds) if paces and seconds and tokens else None


def _work(spec: dict[str, Any]) -> list[Any]:
    """What the time of a token depends on, beside the model. The row of an earlier version may lack fields: it is not
    alike then."""
    lora, training = spec.get("lora") or {}, spec.get("training") or {}
    names = ("packing", "gradient_checkpointing", "optimizer", "loss_on", "batch_size")
    return [
        spec.get("quantization"),
        *(lora.get(name) for name in ("r", "target_modules", "use_dora", "dropout")),
        *(training.get(name) for name in names),
    ]


def _waited_for() -> ColumnElement[bool]:
    return and_(Probe.answer.is_(None), Probe.asked > now_epoch() - PATIENCE_SECONDS)
