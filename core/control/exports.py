"""Queries about exports. Their jobs make the rows; they go with their adapter."""

import hashlib

from sqlalchemy import select

from core.control import adapters, jobs
from core.control.db import Session
from core.control.tables import Export, Job, JobKind
from core.errors import NotFound


def ask(
    session: Session, project_id: str, adapter_id: str, kind: str, *, idempotency_key: str | None
) -> tuple[Job, bool]:
    """The job that exports an adapter as `kind`, and whether it is new.

    Raises:
        NotFound: `adapter_not_found`.
        Conflict: `idempotency_conflict`.
    """
    adapter = adapters.get(session, project_id, adapter_id, to="use")
    what = hashlib.sha256(f"export {adapter.id} {kind}".encode()).hexdigest()
    if idempotency_key and (earlier := jobs.replay(session, project_id, idempotency_key, what)):
        return earlier, False
    job = jobs.create(
        session,
        project_id,
        kind=JobKind.EXPORT,
        name=adapter.name,
        model=adapter.base_model,
        dataset_id=None,
        spec={"export": {"adapter_id": adapter.id, "format": kind}},
        labels={},
    )
    if idempotency_key:
        jobs.remember(session, project_id, idempotency_key, what, job.id)
    return job, True


def get(session: Session, project_id: str, adapter_id: str, export_id: str) -> Export:
    """Raises NotFound `export_not_found`, for another adapter's export too."""
    adapter = adapters.get(session, project_id, adapter_id)
    export = session.get(Export, export_id)
    if export is None or export.adapter_id != adapter.id:
        raise NotFound(
            "export_not_found",
            f'Adapter {adapter.id} has no export "{export_id[:60]}".',
            hint=f"GET /adapters/{adapter.id}/exports lists them.",
        )
    return export


def page(
    session: Session, project_id: str, adapter_id: str, *, limit: int, after: str | None
) -> list[Export]:
    """Newest first; one more than `limit`, to tell whether there are more."""
    query = select(Export).where(Export.adapter_id == adapters.get(session, project_id, adapter_id).id)
    if after is not None:
        query = query.where(Export.id < after)
    return list(session.scalars(query.order_by(Export.id.desc()).limit(limit + 1)))
