"""Exports on the wire."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from api.schemas.common import Request
from core.control.tables import Export
from core.ml.export.run import Format


class ExportCreate(Request):
    """`merged`: the base model with the adapter in it, 16-bit safetensors; `gguf`: the same as one GGUF file."""

    format: Format


class ExportOut(BaseModel):
    """`size` and `sha256` are those of the download; `report` says how near it is to the adapter."""

    id: str
    object: Literal["adapter.export"] = "adapter.export"
    adapter_id: str
    job_id: str
    format: str
    size: int
    sha256: str
    files: list[dict[str, Any]]
    report: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, row: Export) -> "ExportOut":
        return cls.model_validate(row, from_attributes=True)
