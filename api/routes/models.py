"""The catalogue of base models."""

from fastapi import APIRouter

from api.deps import CallerDep, ServicesDep
from api.requests import StrictRoute
from api.schemas.adapters import ModelOut
from api.schemas.common import Listing
from core.ml import catalogue

router = APIRouter(prefix="/models", tags=["models"], route_class=StrictRoute)


@router.get("")
def list_(services: ServicesDep, caller: CallerDep) -> Listing[ModelOut]:  # noqa: ARG001 - only with a key
    models = [
        ModelOut(
            name=model.name,
            source=model.source,
            ready=model.ready,
            default=model.name == services.settings.default_model,
            **catalogue.describe(model),
        )
        for model in catalogue.known(services.catalogue)
    ]
    return Listing(data=models, has_more=False)
