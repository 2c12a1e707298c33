"""Presets: published runs as the starting point of a job."""

from fastapi import APIRouter

from api.deps import CallerDep
from api.requests import StrictRoute
from api.schemas.common import Listing
from api.schemas.presets import PresetOut
from core.ml.training.spec import presets

router = APIRouter(prefix="/presets", tags=["presets"], route_class=StrictRoute)


@router.get("")
def list_(caller: CallerDep) -> Listing[PresetOut]:  # noqa: ARG001 - only with a key
    """Every version of every preset, by name, the newest first."""
    return Listing(data=[PresetOut.of(preset) for preset in presets.known()], has_more=False)
