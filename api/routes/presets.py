"""Presets: published runs as the starting point of a job."""

from fastapi import APIRouter

from api.deps import CallerDep, PageDep
from api.requests import StrictRoute
from api.schemas.common import Listing
from api.schemas.presets import PresetOut
from core.errors import BadRequest
from core.ml.training.spec import presets

router = APIRouter(prefix="/presets", tags=["presets"], route_class=StrictRoute)


@router.get("")
def list_(caller: CallerDep, page: PageDep) -> Listing[PresetOut]:  # noqa: ARG001 - only with a key
    """Every version of every preset, by name, the newest first."""
    found = [PresetOut.of(preset) for preset in presets.known()]
    if page.after is not None:
        ids = [preset.id for preset in found]
        if page.after not in ids:
            raise BadRequest(
                "invalid_request", 'The field "after" must be the id of a preset.', param="after"
            )
        found = found[ids.index(page.after) + 1 :]
    return Listing.of(found, page.limit)
