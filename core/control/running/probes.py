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
# So many earlier jobs are looked at for some alike, so many of them are taken, and of each the pace of so
# many steps.
_EARLIER, _ALIKE = 50, 5
_STEPS = 50
# So far a step's tokens may be from those asked for.
_NEAR = 0.25


def device_is_free(session: Session) -> bool:
    """Whether a worker most likely has nothing to do. It is asked then, and knows for certain."""
    queued = session.scalar(select(func.count()).where(Job.status == JobStatus.QUEUED)) or 0
    asked = session.scalar(select(func.count()).where(_waited_for())) or 0
    return workers.idle_slots(session) > queued + asked


def is_busy(session: Session, owner: str) -> bool:
    """Whether a worker runs a job: on the same device, neither would be as it is alone."""
    mine = select(func.count()).where(Job.status == JobStatus.RUNNING, Job.owner == owner)
    return bool(session.scalar(mine))


def is_idle(session: Session, owner: str) -> bool:
    """Whether a worker has nothing on its device: no job, and no probe, which any open question may be."""
    asked = session.scalar(select(func.count()).where(_waited_for())) or 0
    return not asked and not is_busy(session, owner)


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


class Pace(NamedTuple):
    """Tokens per second of `steps` and of an `evaluation`; seconds of a `pause`: what an evaluation brings beside, its
    samples and the checkpoints until the next; without evaluations, what a step brings."""

    steps: float
    evaluation: float
    pause: float


def experience(session: Session, model: str, spec: dict[str, Any], tokens: float) -> Pace | None:
    """How fast the newest trainings alike were: of this model, held and adapted in the same way, with about so many
    `tokens` in a step. None where there are none. Whose jobs they were does not matter: a pace tells nothing of them.
    """
    alike = select(Job).where(
        Job.kind == JobKind.TRAIN, Job.status == JobStatus.SUCCEEDED, Job.model == model
    )
    jobs = session.scalars(alike.order_by(Job.finished_at.desc()).limit(_EARLIER))
    found = islice((job for job in jobs if _work(job.spec) == _work(spec) and _is_near(job, tokens)), _ALIKE)
    paces = [_pace(session, job) for job in found]
    return Pace(*map(median, zip(*paces, strict=True))) if paces else None


def _is_near(job: Job, tokens: float) -> bool:
    """A step has costs of its own beside those of its tokens: only one of about the same size tells of another."""
    read = job.metrics.get("tokens", 0) / max(job.step, 1)
    return "train_seconds" in job.metrics and abs(read - tokens) <= _NEAR * tokens


def _pace(session: Session, job: Job) -> Pace:
    rows = select(JobMetric.values).where(JobMetric.job_id == job.id)
    latest = session.scalars(rows.order_by(JobMetric.step.desc()).limit(_STEPS))
    steps = median(row["tokens_per_second"] for row in latest if "tokens_per_second" in row)
    seconds_of = JobMetric.values["eval_seconds"].as_float()
    evaluated = list(session.scalars(rows.where(seconds_of > 0)))
    seconds = sum(row["eval_seconds"] for row in evaluated)
    rest = job.metrics["train_seconds"] - job.metrics["tokens"] / steps - seconds
    # Forward alone is half of a step where the weights learn nothing themselves.
    evaluation = sum(row["eval_tokens"] for row in evaluated) / seconds if seconds else 2 * steps
    return Pace(steps, evaluation, max(rest, 0.0) / (len(evaluated) or job.step))


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
