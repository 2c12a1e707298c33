"""Data sets and previews on the wire."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from core.control.tables import Dataset
from core.ml.formats.repair import Examination


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


class RepairOut(BaseModel):
    """`rows` are in the repaired file; `changed` of them differ, `left_out` could not be mended."""

    rows: int
    changed: int
    left_out: int
    diff: str


class ValidationOut(BaseModel):
    """`mapping`: the one in use, or where the file cannot be read without one, the one to use."""

    object: Literal["dataset_validation"] = "dataset_validation"
    valid: bool
    filename: str
    format: str | None
    mapping: dict[str, Any] | None
    columns: list[str]
    rows: int
    bytes: int
    sha256: str
    errors: list[dict[str, Any]]
    error_count: int
    report: dict[str, Any]
    repair: RepairOut | None

    @classmethod
    def of(cls, checked: Examination, *, filename: str, bytes: int, sha256: str) -> "ValidationOut":
        report = checked.report
        found = report.detection if report else None
        return cls(
            valid=checked.valid,
            filename=filename,
            format=found.format if found else None,
            mapping=checked.mapping,
            columns=report.columns if report else checked.columns,
            rows=report.rows if report else 0,
            bytes=bytes,
            sha256=sha256,
            errors=checked.errors,
            error_count=checked.error_count,
            report=report.summary() if report else {},
            repair=RepairOut.model_validate(vars(checked.repair)) if checked.repair else None,
        )


class Token(BaseModel):
    id: int
    text: str
    trained: bool


class PreviewRow(BaseModel):
    """`n_tokens` are trained with; of a very long row only the first `n_shown` are in `tokens` and `text`."""

    line: int
    text: str
    tokens: list[Token]
    n_tokens: int
    n_shown: int
    n_trained: int
    truncated: bool
    too_long: bool
    ends_trained: bool


class Preview(BaseModel):
    """`limit`: tokens a row may have. `stopped`: fewer rows are shown than asked for, as they are long."""

    object: Literal["preview"] = "preview"
    dataset_id: str
    model: str
    loss_on: str
    max_length: int | None
    limit: int
    stopped: bool
    template: str
    template_sha256: str
    stop_token_ids: list[int]
    rows: list[PreviewRow]
    totals: dict[str, int]
