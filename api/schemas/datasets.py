"""Data sets and previews on the wire."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from core.control.tables import Dataset


class DatasetOut(BaseModel):
    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    filename: str
    format: str
    mapping: dict[str, Any] | None
    columns: list[str]
    rows: int
    bytes: int
    sha256: str
    report: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, row: Dataset) -> "DatasetOut":
        return cls.model_validate(row, from_attributes=True)


class Token(BaseModel):
    id: int
    text: str
    trained: bool


class PreviewRow(BaseModel):
    line: int
    text: str
    tokens: list[Token]
    n_tokens: int
    n_trained: int
    truncated: bool
    too_long: bool


class Preview(BaseModel):
    object: Literal["preview"] = "preview"
    dataset_id: str
    model: str
    loss_on: str
    max_length: int | None
    template_sha256: str
    stop_token_ids: list[int]
    rows: list[PreviewRow]
    totals: dict[str, int]
