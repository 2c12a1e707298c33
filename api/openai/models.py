"""GET /v1/models: base models and the project's adapters, by the names that chat and completions take."""

from typing import Any

from fastapi import APIRouter

from api.deps import CallerDep, ServicesDep
from api.requests import StrictRoute
from api.serving import models as serving
from core.control import adapters, db
from core.control.tables import Adapter
from core.ml import catalogue

router = APIRouter(prefix="/v1/models", tags=["openai"], route_class=StrictRoute)

_ALL = 10_000


@router.get("")
def list_(services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    with db.reading(services.sessions) as session:
        rows = adapters.page(session, caller.project_id, limit=_ALL, after=None)
        ours = [_adapter(row) for row in rows]
    bases = [_model(model.name) for model in catalogue.known(services.catalogue)]
    return {"object": "list", "data": [*bases, *ours], "has_more": False}


@router.get("/{model:path}")
def get(model: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    if model.startswith("ad_"):
        with db.reading(services.sessions) as session:
            return _adapter(adapters.get(session, caller.project_id, model, param="model"))
    if model.startswith("job_"):
        served = serving.named(services, caller.project_id, model)
        return {**_model(served.name), "parent": served.target.base_model}
    return _model(catalogue.find(services.catalogue, model).name)


def _adapter(row: Adapter) -> dict[str, Any]:
    made = {"created": int(row.created_at.timestamp()), "parent": row.base_model, "name": row.name}
    return {**_model(row.id), **made, "job_id": row.job_id}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "graft"}
