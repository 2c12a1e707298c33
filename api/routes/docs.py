"""The description of every call, for tools and people, as OpenAPI."""

from typing import Any

from fastapi import APIRouter, Request

from api.deps import CallerDep
from api.requests import StrictRoute

router = APIRouter(tags=["docs"], route_class=StrictRoute)


@router.get("/docs")
@router.get("/openapi.json", include_in_schema=False)
def description(request: Request, caller: CallerDep) -> dict[str, Any]:  # noqa: ARG001 - only with a key
    document: dict[str, Any] = request.app.openapi()
    return document
