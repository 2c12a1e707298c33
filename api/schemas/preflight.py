"""What a job would do, before it is posted."""

from typing import Any, Literal

from pydantic import BaseModel

from api.schemas.presets import JobPreset
from core.errors import GraftError


class Lines(BaseModel):
    """How many rows, and the lines of the first hundred."""

    count: int
    lines: list[int]


class RowsOut(BaseModel):
    """`validation_dropped`, `validation_truncated`: of a validation data set of its own. `in_both`: validation rows that
    are trained, too, or were by the adapter to continue from."""

    used: int
    validation: int
    dropped: Lines
    truncated: Lines
    validation_dropped: Lines
    validation_truncated: Lines
    in_both: Lines


class TokensOut(BaseModel):
    """Of the rows that are used, validation rows of the same data set among them."""

    total: int
    trained: int
    longest: int


class MemoryOut(BaseModel):
    """`measured` on the device; else reckoned from the model's shape and the rows."""

    needed_bytes: int
    present_bytes: int
    measured: bool


class Problem(BaseModel):
    """Why the job would fail."""

    code: str
    message: str
    param: str | None
    hint: str | None

    @classmethod
    def of(cls, error: GraftError) -> "Problem":
        return cls(code=error.code, message=error.message, param=error.param, hint=error.hint)


class PreflightOut(BaseModel):
    """`ok`: nothing that was looked at would make the job fail. What could not be measured is reckoned, the seconds from
    an earlier job alike, or null, and `not_measured` says why, as it does where rows are too many to be counted; what the
    device decides of `spec` is "auto" then."""

    object: Literal["preflight"] = "preflight"
    ok: bool
    problems: list[Problem]
    model: str
    preset: JobPreset | None = None
    dataset_id: str
    rows: RowsOut | None = None
    tokens: TokensOut | None = None
    total_steps: int | None = None
    spec: dict[str, Any]
    device: str | None = None
    memory: MemoryOut | None = None
    seconds_per_step: float | None = None
    eta_seconds: float | None = None
    not_measured: str | None = None
