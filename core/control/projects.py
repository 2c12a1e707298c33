"""Projects and API keys. A key is `gr_<id>_<secret>`; the database keeps the hash of the secret only."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from core.control.db import Session
from core.control.tables import ApiKey, Project, Role, new_id, utcnow
from core.errors import BadRequest, Conflict, NotFound

_KEY = re.compile(r"gr_([0-9a-f]{12})_([A-Za-z0-9_-]{24,128})")
_USED_EVERY = timedelta(minutes=1)
DEFAULT_PROJECT = "default"


@dataclass(frozen=True)
class Caller:
    """Whose key a request carries."""

    key_id: str
    project_id: str
    role: Role
    use_is_news: bool = field(default=False, compare=False)


def authenticate(session: Session, key: str) -> Caller | None:
    """The caller behind a key, or None. Takes the same steps whether the key exists or not."""
    match = _KEY.fullmatch(key)
    row = session.get(ApiKey, match.group(1)) if match else None
    digest = _digest(match.group(2) if match else "")
    if row is None or not hmac.compare_digest(row.digest, digest) or row.revoked_at is not None:
        return None
    return Caller(row.id, row.project_id, row.role, use_is_news=_is_news(row))


def note_use(session: Session, key_id: str) -> None:
    """Remember when a key was last used, to the minute."""
    row = session.get_one(ApiKey, key_id)
    if _is_news(row):
        row.last_used_at = utcnow()


def has_admin(session: Session) -> bool:
    query = select(ApiKey.id).where(ApiKey.role == Role.ADMIN, ApiKey.revoked_at.is_(None))
    return session.scalars(query.limit(1)).first() is not None


def default_project(session: Session) -> Project:
    found = session.scalars(select(Project).where(Project.name == DEFAULT_PROJECT)).first()
    return found or create_project(session, DEFAULT_PROJECT)


def create_project(session: Session, name: str) -> Project:
    """Raises Conflict `project_exists`."""
    project = Project(id=new_id("proj"), name=name, created_at=utcnow())
    try:
        with session.begin_nested():
            session.add(project)
    except IntegrityError as error:
        raise Conflict("project_exists", f'There is a project "{name}" already.', param="name") from error
    return project


def projects(session: Session) -> list[Project]:
    return list(session.scalars(select(Project).order_by(Project.id.desc())))


def create_key(
    session: Session, project_id: str, name: str, role: Role, *, key: str | None = None
) -> tuple[ApiKey, str]:
    """A new key and its text, which is shown this once. `key` gives the text instead of making one.

    Raises:
        NotFound: `project_not_found`.
        BadRequest: `invalid_key`, the given text has not the form of a key.
    """
    if session.get(Project, project_id) is None:
        raise NotFound("project_not_found", f'There is no project "{project_id[:60]}".', param="project_id")
    text = key or new_key()
    match = _KEY.fullmatch(text)
    if match is None:
        raise BadRequest(
            "invalid_key", "An API key has the form gr_<12 hex digits>_<at least 24 characters>."
        )
    row = ApiKey(
        id=match.group(1),
        project_id=project_id,
        name=name,
        role=role,
        digest=_digest(match.group(2)),
        created_at=utcnow(),
    )
    session.add(row)
    return row, text


def keys(session: Session) -> list[ApiKey]:
    return list(session.scalars(select(ApiKey).order_by(ApiKey.created_at.desc(), ApiKey.id)))


def revoke_key(session: Session, key_id: str, caller: Caller) -> ApiKey:
    """Raises NotFound `key_not_found`, Conflict `key_in_use` for the caller's own key."""
    row = session.get(ApiKey, key_id)
    if row is None:
        raise NotFound("key_not_found", f'There is no key "{key_id[:60]}".')
    if row.id == caller.key_id:
        raise Conflict("key_in_use", "A key cannot revoke itself; use another admin key.")
    row.revoked_at = row.revoked_at or utcnow()
    return row


def new_key() -> str:
    return f"gr_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"


def _is_news(row: ApiKey) -> bool:
    return row.last_used_at is None or utcnow() - row.last_used_at > _USED_EVERY


def _digest(secret: str) -> str:
    # The secret has 256 random bits, so a fast hash is enough: there is nothing to guess.
    return hashlib.sha256(secret.encode()).hexdigest()
