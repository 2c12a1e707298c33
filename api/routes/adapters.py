"""Adapters: list, download, delete."""

from fastapi import APIRouter, Request, Response

from api.deps import CallerDep, PageDep, Services, ServicesDep
from api.files import respond
from api.requests import StrictRoute
from api.schemas.adapters import AdapterOut
from api.schemas.common import Deleted, Listing
from core.control import adapters, db
from core.control.tables import Adapter
from core.errors import NotFound

router = APIRouter(prefix="/adapters", tags=["adapters"], route_class=StrictRoute)


@router.get("")
def list_(services: ServicesDep, caller: CallerDep, page: PageDep) -> Listing[AdapterOut]:
    with db.reading(services.sessions) as session:
        rows = adapters.page(session, caller.project_id, limit=page.limit, after=page.after)
        return Listing.of([AdapterOut.of(row) for row in rows], page.limit)


@router.get("/{adapter_id}")
def get(adapter_id: str, services: ServicesDep, caller: CallerDep) -> AdapterOut:
    return AdapterOut.of(_get(services, caller.project_id, adapter_id))


@router.delete("/{adapter_id}")
def delete(adapter_id: str, services: ServicesDep, caller: CallerDep) -> Deleted:
    with services.sessions.begin() as session:
        row = adapters.delete(session, caller.project_id, adapter_id)
    services.storage.delete(row.key)
    return Deleted(id=row.id)


@router.head("/{adapter_id}/download", include_in_schema=False)
@router.get("/{adapter_id}/download")
def download(adapter_id: str, request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """One zip in PEFT's own layout."""
    row = _get(services, caller.project_id, adapter_id)
    return respond(
        services,
        request,
        f"{row.key}/adapter.zip",
        filename=f"{row.id}.zip",
        etag=row.sha256,
        media_type="application/zip",
        modified=row.created_at,
    )


@router.head("/{adapter_id}/files/{path:path}", include_in_schema=False)
@router.get("/{adapter_id}/files/{path:path}")
def one_file(
    adapter_id: str, path: str, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    row = _get(services, caller.project_id, adapter_id)
    # Looked up among the names that the row lists: a path of the client's never reaches the storage.
    info = next((info for info in row.files if info["path"] == path), None)
    if info is None:
        raise NotFound(
            "file_not_found",
            f'Adapter {row.id} has no file "{path[:100]}".',
            hint=f"It has: {', '.join(info['path'] for info in row.files)}.",
        )
    return respond(
        services,
        request,
        f"{row.key}/files/{info['path']}",
        filename=info["path"],
        etag=info["sha256"],
        media_type="application/octet-stream",
        modified=row.created_at,
    )


def _get(services: Services, project_id: str, adapter_id: str) -> Adapter:
    with db.reading(services.sessions) as session:
        return adapters.get(session, project_id, adapter_id)
