"""What several resources share."""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

Item = TypeVar("Item")
_LONGEST_NAME = 128


def _name(text: str) -> str:
    if not text or len(text) > _LONGEST_NAME or any(ord(sign) < ord(" ") or sign == "\x7f" for sign in text):
        raise ValueError(f"1 to {_LONGEST_NAME} characters without line breaks or other control characters")
    return text


Name = Annotated[str, AfterValidator(_name)]


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
