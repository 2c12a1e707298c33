"""Projects and API keys, for admins."""

from fastapi import APIRouter

from api.deps import AdminDep, ServicesDep
from api.requests import StrictRoute
from api.schemas.common import Listing
from api.schemas.keys import KeyCreate, KeyOut, NewKey, ProjectCreate, ProjectOut
from core.control import db, projects

router = APIRouter(tags=["keys"], route_class=StrictRoute)


@router.post("/projects", status_code=201)
def create_project(body: ProjectCreate, services: ServicesDep, caller: AdminDep) -> ProjectOut:  # noqa: ARG001
    with services.sessions.begin() as session:
        return ProjectOut.of(projects.create_project(session, body.name))


@router.get("/projects")
def list_projects(services: ServicesDep, caller: AdminDep) -> Listing[ProjectOut]:  # noqa: ARG001
    with db.reading(services.sessions) as session:
        return Listing(data=[ProjectOut.of(row) for row in projects.projects(session)], has_more=False)


@router.post("/keys", status_code=201)
def create_key(body: KeyCreate, services: ServicesDep, caller: AdminDep) -> NewKey:
    """A new key for the caller's project or another; its text is shown this once."""
    with services.sessions.begin() as session:
        row, text = projects.create_key(session, body.project_id or caller.project_id, body.name, body.role)
    return NewKey(**KeyOut.of(row).model_dump(), key=text)


@router.get("/keys")
def list_keys(services: ServicesDep, caller: AdminDep) -> Listing[KeyOut]:  # noqa: ARG001
    with db.reading(services.sessions) as session:
        return Listing(data=[KeyOut.of(row) for row in projects.keys(session)], has_more=False)


@router.delete("/keys/{key_id}")
def revoke_key(key_id: str, services: ServicesDep, caller: AdminDep) -> KeyOut:
    """Revoke a key; it stops working at once and stays in the list."""
    with services.sessions.begin() as session:
        return KeyOut.of(projects.revoke_key(session, key_id, caller))
