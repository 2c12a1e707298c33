"""What several resources share."""

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

Item = TypeVar("Item")


class Request(BaseModel):
    """A request body: unknown fields and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Listing(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool

    @classmethod
    def of(cls, rows: list[Item], limit: int) -> "Listing[Item]":
        """From rows of which there is one more than `limit` when more follow."""
        return cls(data=rows[:limit], has_more=len(rows) > limit)


class Deleted(BaseModel):
    id: str
    deleted: bool = True
