"""Which worker processes there are, which of them are dead, and who does the sweep."""

import os
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError

from core.control.db import Session, now_epoch
from core.control.tables import Job, JobStatus, Lease, Worker, new_id

# A worker not heard of for so many seconds counts for nothing any more.
ALIVE_SECONDS = 30.0
_FORGET_SECONDS = 24 * 3600.0


def register(session: Session, slots: int) -> str:
    """Enter this process as a worker and return its id, the owner name of its claims."""
    worker_id = new_id("worker")
    beat(session, worker_id, slots)
    return worker_id


def beat(session: Session, worker_id: str, slots: int, device: dict[str, Any] | None = None) -> None:
    """Have the row say that this process is there, also when it was struck out meanwhile: after a long sleep of its
    machine, or with a backup of the database."""
    worker = session.get(Worker, worker_id) or Worker(
        id=worker_id, place=place(), pid=os.getpid(), pid_started=_started(os.getpid()) or "", slots=slots
    )
    worker.seen, worker.device = now_epoch(), device
    session.add(worker)


def device(session: Session) -> dict[str, Any] | None:
    """What jobs run on, where a worker has said so; of several the one with the most memory."""
    known = [worker.device for worker in alive(session) if worker.device is not None]
    return max(known, key=lambda device: int(device["free_bytes"]), default=None)


def leave(session: Session, worker_id: str) -> None:
    session.execute(delete(Worker).where(Worker.id == worker_id))


def alive(session: Session) -> list[Worker]:
    return list(session.scalars(select(Worker).where(Worker.seen > now_epoch() - ALIVE_SECONDS)))


def idle_slots(session: Session) -> int:
    slots = sum(worker.slots for worker in alive(session))
    running = session.scalar(select(func.count()).where(Job.status == JobStatus.RUNNING)) or 0
    return max(slots - running, 0)


def dead_here(session: Session) -> list[str]:
    """Ids of workers of this machine whose process is gone: no need to wait for their leases."""
    here = session.scalars(select(Worker).where(Worker.place == place()))
    return [worker.id for worker in here if _started(worker.pid) != worker.pid_started]


def forget(session: Session, worker_ids: list[str]) -> None:
    """Strike out dead workers, and those silent for a day."""
    session.execute(
        delete(Worker).where(Worker.id.in_(worker_ids) | (Worker.seen < now_epoch() - _FORGET_SECONDS))
    )


def take_duty(session: Session, name: str, owner: str, seconds: float) -> bool:
    """Whether `owner` may do this duty for the next seconds; only one owner may at a time."""
    lease = session.scalars(select(Lease).where(Lease.name == name).with_for_update()).first()
    now = session.scalars(select(now_epoch())).one()
    if lease is None:
        try:
            with session.begin_nested():
                session.add(Lease(name=name, owner=owner, until=now + seconds))
        except IntegrityError:
            return False
        return True
    if lease.owner != owner and lease.until > now and lease.owner not in dead_here(session):
        return False
    lease.owner, lease.until = owner, now + seconds
    return True


def place() -> str:
    """One name for every process that shares this one's process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """When a process started, in kernel ticks; None when there is none with this id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
