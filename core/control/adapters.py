"""Adapter rules and queries."""

from sqlalchemy import select, update

from core.control import db
from core.control.db import Session
from core.control.tables import FINISHED, Adapter, Job
from core.errors import Conflict, NotFound
from core.ml.training.run import Trained


def get(
    session: Session,
    project_id: str,
    adapter_id: str,
    *,
    param: str | None = None,
    to: db.Purpose | None = None,
) -> Adapter:
    """`to` holds the row until the transaction ends: whoever makes a job use it and whoever deletes it wait for each other.

    Raises:
        NotFound: `adapter_not_found`, for another project's adapter too.
    """
    adapter = db.locked(session, Adapter, adapter_id, to) if to else session.get(Adapter, adapter_id)
    if adapter is None or adapter.project_id != project_id:
        raise NotFound(
            "adapter_not_found",
            f'There is no adapter "{adapter_id[:60]}".',
            param=param,
            hint="GET /adapters lists those of your project.",
        )
    return adapter


def page(session: Session, project_id: str, *, limit: int, after: str | None) -> list[Adapter]:
    """Newest first; one more than `limit`, to tell whether there are more."""
    query = select(Adapter).where(Adapter.project_id == project_id)
    if after is not None:
        query = query.where(Adapter.id < after)
    return list(session.scalars(query.order_by(Adapter.id.desc()).limit(limit + 1)))


def trained_on(adapter: Adapter) -> tuple[Trained, ...]:
    """What it was trained on, the last at the end, by its certificate, which names what the adapter that it continued from
    was trained on, too."""
    hashes = (adapter.certificate or {}).get("hashes", {})
    if "dataset" not in hashes:
        return ()
    last = Trained(hashes["dataset"], hashes.get("held_back"))
    return (*(Trained(**one) for one in hashes.get("earlier", [])), last)


def delete(session: Session, project_id: str, adapter_id: str) -> Adapter:
    """Raises NotFound, or Conflict `adapter_in_use` while an unfinished job begins with it or exports it."""
    adapter = get(session, project_id, adapter_id)
    # The job's row before the adapter's, in the order of whoever deletes both with the job.
    session.execute(update(Job).where(Job.adapter_id == adapter.id).values(adapter_id=None))
    adapter = get(session, project_id, adapter_id, to="change")
    users = session.scalars(select(Job).where(Job.project_id == project_id, Job.status.not_in(FINISHED)))
    for job in users:
        exported = (job.spec.get("export") or {}).get("adapter_id")
        if adapter.id in (job.spec.get("continue_from"), exported):
            raise Conflict(
                "adapter_in_use",
                f"Job {job.id} is {job.status} and {'exports' if exported else 'continues from'} this adapter.",
                hint="Wait until the job has ended, or cancel it.",
            )
    session.delete(adapter)
    return adapter
