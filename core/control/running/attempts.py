"""The attempts of a job: what workers and the sweep write. With `jobs` the only writer of a status.

    create ──> queued ── claim ──> running ── succeed ──> succeeded
               ^ ^ │ │              │ │ │
               │ │ │ │              │ │ └───── fail ────> failed ────┐
               │ │ │ │              │ │                              ├── retry ──> queued
               │ │ │ └─── cancel ───│─┴──── cancel ─────> cancelled ─┘
               │ │ │                │                      ^
               │ │ └─── pause ──┐   │ pause                │
               │ │              v   v                      │
               │ └─── resume ─ paused ──── cancel ─────────┘
               │
               └── release, recover, crash: out of running, the last two so often and no more

A running job is only asked to pause or to cancel (`jobs`): its trainer finishes the step, saves and leaves,
and `release` reads what is asked for by then. Who asks and who answers hold the row's lock, so a pause that
is taken back in that moment finds the job running (it is queued again) or paused (it is queued again).
A cancel wins over a pause.

Every write of a worker goes through `_held`, which names the fence of its claim: a worker that lost
its lease raises `Fenced` and changes nothing. Leases are compared by the database's clock alone.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, or_, select

from core.control.db import Session, now_epoch, update_one
from core.control.running import events
from core.control.tables import Adapter, Asked, Export, Job, JobStatus, utcnow
from core.errors import Fenced, GraftError
from core.ml.training.spec import changes as spec_changes

# Seconds until a crashed job may start again: at once, then longer and longer.
_BACKOFF = (0, 10, 30, 60, 120)
# A message unanswered for so long may be lost, and is sent again.
_SEND_AGAIN = 30.0
# So often a run may change its own spec to go on.
_RECOVERIES = 8
_OVER: dict[str, Any] = {
    "phase": None,
    "eta_seconds": None,
    "owner": None,
    "lease_until": None,
    "asked": None,
}


def claim_next(session: Session, owner: str, lease_seconds: float) -> Job | None:
    """Take the first due job of the queue: the highest priority, then the oldest. None: nothing is due."""
    while (job_id := session.scalars(_due(select(Job.id)).limit(1)).first()) is not None:
        # Not locked by the query: what another worker takes meanwhile is found taken here, and the next is tried.
        if job := claim(session, job_id, owner, lease_seconds):
            return job
    return None


def claim(session: Session, job_id: str, owner: str, lease_seconds: float) -> Job | None:
    """Take a queued job, or None when somebody else has it or it is not due."""
    due = or_(Job.not_before.is_(None), Job.not_before <= now_epoch())
    taken = update_one(
        session,
        Job,
        [Job.id == job_id, Job.status == JobStatus.QUEUED, due],
        status=JobStatus.RUNNING,
        phase="preparing",
        fence=Job.fence + 1,
        attempt=Job.attempt + 1,
        owner=owner,
        lease_until=now_epoch() + lease_seconds,
        error=None,
    )
    if not taken:
        return None
    job = session.get_one(Job, job_id, populate_existing=True)
    job.started_at = job.started_at or utcnow()
    events.add(session, job_id, "started", f"Attempt {job.attempt} started.", data={"attempt": job.attempt})
    return job


def renew(session: Session, job_id: str, fence: int, lease_seconds: float, **changes: Any) -> Asked | None:
    """Prolong the lease, together with other `changes` of columns; what a client asks of the job.

    Raises:
        Fenced: the job belongs to a newer claim, or is over.
    """
    _held(session, job_id, fence, lease_until=now_epoch() + lease_seconds, **changes)
    return session.scalars(select(Job.asked).where(Job.id == job_id)).one()


def succeed(session: Session, job_id: str, fence: int, made: Adapter | Export) -> None:
    """Insert what the job made and end it, in one transaction. The files are stored already."""
    what = "adapter" if isinstance(made, Adapter) else "export"
    session.add(made)
    _held(
        session,
        job_id,
        fence,
        status=JobStatus.SUCCEEDED,
        finished_at=utcnow(),
        **({"adapter_id": made.id} if isinstance(made, Adapter) else {}),
        **_OVER,
    )
    message = f"Job succeeded; its {what} is {made.id}."
    events.add(session, job_id, "succeeded", message, data={f"{what}_id": made.id})


def fail(session: Session, job_id: str, fence: int, error: GraftError) -> None:
    _held(
        session,
        job_id,
        fence,
        status=JobStatus.FAILED,
        error=error.as_dict(),
        finished_at=utcnow(),
        **_OVER,
    )
    events.add(session, job_id, "failed", error.message, level="error", data=error.as_dict())


def release(session: Session, job_id: str, fence: int, why: str) -> None:
    """The attempt left in order: the job is cancelled or paused as was asked, or queued again. No crash counts."""
    if not _as_asked(session, job_id, fence):
        _held(session, job_id, fence, **_queued_again(0))
        events.add(session, job_id, "released", why)


def crash(
    session: Session,
    job_id: str,
    fence: int,
    why: str,
    *,
    code: str,
    max_crashes: int,
    exit_code: int | None = None,
) -> None:
    """The attempt broke off. The job goes on from its last checkpoint, unless it broke too often."""
    job = _locked(session, job_id)
    crashes = job.crashes + 1
    if job.asked is None and crashes >= max_crashes:
        hint = "GET /jobs/{id}/logs tells more; a smaller batch or model needs less memory."
        fail(
            session,
            job_id,
            fence,
            GraftError(code, f"The job broke off {crashes} times, the last time because {why}.", hint=hint),
        )
        update_one(session, Job, [Job.id == job_id], crashes=crashes)
        return
    events.add(
        session,
        job_id,
        "crashed",
        f"The attempt broke off because {why}; the job goes on from its last checkpoint.",
        level="warning",
        data={"code": code, "crashes": crashes, "step": job.step, "exit_code": exit_code},
    )
    if not _as_asked(session, job_id, fence, crashes=crashes):
        delay = _BACKOFF[min(crashes, len(_BACKOFF)) - 1]
        _held(session, job_id, fence, crashes=crashes, **_queued_again(delay))


def killed_before(session: Session, job: Job, exit_code: int) -> bool:
    """Whether the attempt before this one was ended by the same signal at the same step."""
    last = events.latest(session, job.id, "crashed")
    data = (last.data if last else None) or {}
    return (data.get("exit_code"), data.get("step")) == (exit_code, job.step)


def recover(
    session: Session,
    job_id: str,
    fence: int,
    *,
    cause: str,
    message: str,
    changes: dict[str, Any],
    from_start: bool,
) -> Sequence[str]:
    """Queue the job again with `changes` in its spec, without counting a crash; the keys of dropped checkpoints.

    It fails when it has changed itself too often already, or when the changes do not go with its spec.
    """
    job = _locked(session, job_id)
    if job.asked is Asked.CANCEL:
        _as_asked(session, job_id, fence)
        return []
    try:
        if len(job.recoveries) >= _RECOVERIES:
            code = "out_of_memory" if cause == "out_of_memory" else "training_diverged"
            said = f"{message} The job changed its spec {_RECOVERIES} times to go on; that is where it ends."
            raise GraftError(code, said, hint="Its events tell what was tried.")
        spec = spec_changes.merged(job.spec, changes)
    except GraftError as error:
        fail(session, job_id, fence, error)
        return []
    recoveries = [*job.recoveries, {"step": job.step, "cause": cause, "changes": changes}]
    events.add(
        session,
        job_id,
        "recovered",
        message,
        level="warning",
        data={"step": job.step, "cause": cause, "changes": changes, "from_start": from_start},
    )
    step = 0 if from_start else job.step
    fields = {"spec": spec, "recoveries": recoveries, "step": step}
    if not _as_asked(session, job_id, fence, **fields):
        _held(session, job_id, fence, **fields, **_queued_again(0))
    return events.forget(session, job_id) if from_start else []


def lost(session: Session, dead_owners: list[str]) -> list[Job]:
    """Running jobs whose lease is over, or whose worker is known to be dead."""
    query = select(Job).where(
        Job.status == JobStatus.RUNNING,
        or_(Job.lease_until < now_epoch(), Job.owner.in_(dead_owners)),
    )
    # Locked, so that a heartbeat of this moment is not overlooked.
    return list(session.scalars(query.order_by(Job.id).limit(100).with_for_update(skip_locked=True)))


def unsent(session: Session, limit: int) -> list[str]:
    """Ids of due jobs whose message was never sent, or may be lost, in the order of the queue.

    A message only wakes a worker, which takes the first job of the queue: with a message for every queued job
    none is left over.
    """
    lost = or_(Job.sent_at.is_(None), Job.sent_at < now_epoch() - _SEND_AGAIN)
    return list(session.scalars(_due(select(Job.id)).where(lost).limit(limit)))


def mark_sent(session: Session, job_id: str) -> None:
    update_one(session, Job, [Job.id == job_id], sent_at=now_epoch())


def _due(query: Select[str]) -> Select[str]:
    due = or_(Job.not_before.is_(None), Job.not_before <= now_epoch())
    return query.where(Job.status == JobStatus.QUEUED, due).order_by(Job.priority.desc(), Job.id)


def _locked(session: Session, job_id: str) -> Job:
    """The row as it is now; nobody asks anything of the job until this transaction ends."""
    return session.get_one(Job, job_id, populate_existing=True, with_for_update=True)


def _as_asked(session: Session, job_id: str, fence: int, **changes: Any) -> bool:
    """End the attempt as a client wants it; False when nothing is asked."""
    asked = _locked(session, job_id).asked
    if asked is Asked.CANCEL:
        _held(session, job_id, fence, status=JobStatus.CANCELLED, finished_at=utcnow(), **_OVER, **changes)
        events.add(session, job_id, "cancelled", "Job cancelled.")
    elif asked is Asked.PAUSE:
        _held(session, job_id, fence, status=JobStatus.PAUSED, **_OVER, **changes)
        events.add(session, job_id, "paused", "Job paused; it goes on from its last checkpoint when resumed.")
    return asked is not None


def _queued_again(delay: float) -> dict[str, Any]:
    return _OVER | {
        "status": JobStatus.QUEUED,
        "sent_at": None,
        "not_before": now_epoch() + delay if delay else None,
    }


def _held(session: Session, job_id: str, fence: int, **changes: Any) -> None:
    if not update_one(
        session, Job, [Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING], **changes
    ):
        raise Fenced(f"job {job_id} is no longer held with fence {fence}")
