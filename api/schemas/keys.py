"""Projects and API keys on the wire."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel

from api.schemas.common import Name, Request
from core.control.tables import ApiKey, Project, Role


class ProjectCreate(Request):
    name: Name


class ProjectOut(BaseModel):
    id: str
    object: Literal["project"] = "project"
    name: str
    created_at: datetime

    @classmethod
    def of(cls, row: Project) -> "ProjectOut":
        return cls.model_validate(row, from_attributes=True)


class KeyCreate(Request):
    name: Name
    role: Role = Role.MEMBER
    project_id: str | None = None


class KeyOut(BaseModel):
    id: str
    object: Literal["key"] = "key"
    name: str
    role: Role
    project_id: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: ApiKey) -> "KeyOut":
        return cls.model_validate(row, from_attributes=True)


class NewKey(KeyOut):
    """The only answer that ever holds the key itself."""

    key: str
