"""Adapters and models on the wire."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from core.control.tables import Adapter


class AdapterOut(BaseModel):
    """`size` and `sha256` are those of the download; `files` those of each file in it. `certificate` says what was
    checked and measured of the saved files; an adapter made before there were certificates has none."""

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    base_model: str
    job_id: str | None
    size: int
    sha256: str
    files: list[dict[str, Any]]
    metrics: dict[str, float]
    certificate: dict[str, Any] | None
    created_at: datetime

    @classmethod
    def of(cls, row: Adapter) -> "AdapterOut":
        return cls.model_validate(row, from_attributes=True)


class ModelOut(BaseModel):
    name: str
    object: Literal["model"] = "model"
    source: str
    parameters: int | None
    context: int | None
    ready: bool
    default: bool
