"""What a route may ask for, as named types."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.security import HTTPBearer

from api.engine.client import Engine
from core.control import db, projects, queue
from core.control.db import Sessions
from core.control.projects import Caller
from core.control.tables import Role
from core.errors import GraftError
from core.ml import catalogue
from core.ml.catalogue import BaseModel, Catalogue
from core.settings import Settings
from core.storage import Storage


@dataclass(frozen=True)
class Services:
    """What the process has opened; made once in `create_app`."""

    settings: Settings
    sessions: Sessions
    storage: Storage
    sender: queue.Sender
    engine: Engine
    catalogue: Catalogue


def _opened(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


# FastAPI sends a plain function to a thread, which takes longer than these do.
async def _services(request: Request) -> Services:
    return _opened(request)


ServicesDep = Annotated[Services, Depends(_services)]

_bearer = HTTPBearer(auto_error=False, description="An API key: gr_…")


def authenticate(request: Request) -> Caller:
    """Whose key the request carries.

    Raises:
        GraftError: `missing_key` or `invalid_key`, 401.
    """
    services = _opened(request)
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise GraftError(
            "missing_key",
            "This request carries no API key.",
            status=401,
            hint="Send the header: Authorization: Bearer <key>. The first key lies in admin.key in the home folder.",
        )
    with db.reading(services.sessions) as session:
        caller = projects.authenticate(session, key.strip())
    if caller is None:
        raise GraftError("invalid_key", "This API key does not exist or was revoked.", status=401)
    if caller.use_is_news:
        with services.sessions.begin() as session:
            projects.note_use(session, caller.key_id)
    return caller


async def _caller(request: Request, _key: Annotated[object, Depends(_bearer)]) -> Caller:
    """The caller that the route found before it read the body."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


CallerDep = Annotated[Caller, Depends(_caller)]


async def _admin(caller: CallerDep) -> Caller:
    if caller.role != Role.ADMIN:
        raise GraftError("admin_only", "This call needs a key of role admin.", status=403)
    return caller


AdminDep = Annotated[Caller, Depends(_admin)]


# Of a row, of an event or a checkpoint (its step), of a preset.
_ID = r"^([a-z]+_[0-9A-Z]{26}|[0-9]{1,19}|[a-z0-9_]{1,64}@[0-9]{1,9})$"


@dataclass(frozen=True)
class Page:
    limit: int
    after: str | None


async def _page(
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[
        str | None,
        Query(pattern=_ID, description="The last id of the page before."),
    ] = None,
) -> Page:
    return Page(limit, after)


PageDep = Annotated[Page, Depends(_page)]


def ready_model(services: Services, name: str | None) -> BaseModel:
    """The base model of that name, or the default one, if its files are here.

    Raises:
        NotFound: `model_not_found`.
        GraftError: `model_not_ready`, 503.
    """
    base = catalogue.find(services.catalogue, name or services.settings.default_model)
    if not base.ready:
        base = catalogue.check(services.catalogue, base.name)
        raise GraftError(
            "model_not_ready",
            f"The files of base model {base.name} are not here yet.",
            status=503,
            hint="A worker brings them when it starts or when the first job needs them.",
        )
    return base
