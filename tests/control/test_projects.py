import hashlib

import pytest
from sqlalchemy import text

from core.control import projects
from core.control.db import Sessions
from core.control.projects import Caller
from core.control.tables import Role, utcnow
from core.errors import BadRequest, Conflict, NotFound
from tests.control import rows


@pytest.fixture
def project_id(sessions: Sessions) -> str:
    return rows.project(sessions)


def key_of(sessions: Sessions, project_id: str, role: Role = Role.MEMBER) -> tuple[str, str]:
    with sessions.begin() as session:
        row, key = projects.create_key(session, project_id, "key", role)
        return row.id, key


def caller_of(sessions: Sessions, key: str) -> Caller | None:
    with sessions() as session:
        return projects.authenticate(session, key)


def test_a_key_opens_its_project_with_its_role(sessions: Sessions, project_id: str) -> None:
    key_id, key = key_of(sessions, project_id, Role.ADMIN)
    assert caller_of(sessions, key) == Caller(key_id, project_id, Role.ADMIN)


def test_the_database_holds_the_hash_of_the_secret_and_nothing_else(
    sessions: Sessions, project_id: str
) -> None:
    key_id, key = key_of(sessions, project_id)
    secret = key.removeprefix(f"gr_{key_id}_")
    assert len(secret) >= 32
    with sessions() as session:
        stored = session.execute(text("SELECT * FROM api_keys")).mappings().one()
    assert stored["digest"] == hashlib.sha256(secret.encode()).hexdigest()
    assert not any(secret in str(value) for value in stored.values())


def test_no_two_keys_are_alike(sessions: Sessions, project_id: str) -> None:
    assert len({key_of(sessions, project_id)[1] for _ in range(20)}) == 20


def test_only_the_whole_right_key_opens(sessions: Sessions, project_id: str) -> None:
    key_id, key = key_of(sessions, project_id)
    _, other = key_of(sessions, project_id)
    wrong = [
        "",
        "gr_",
        key[:-1],
        key + "x",
        key.upper(),
        f" {key}",
        f"{key}\n",
        key.replace("gr_", "sk_"),
        f"gr_{key_id}_{other.split('_', 2)[2]}",
        f"gr_000000000000_{key.split('_', 2)[2]}",
        f"gr_{key_id}_{hashlib.sha256(key.split('_', 2)[2].encode()).hexdigest()}",
        "gr_%_aaaaaaaaaaaaaaaaaaaa",
        "é" * 40,
    ]
    assert [caller_of(sessions, attempt) for attempt in wrong] == [None] * len(wrong)
    assert caller_of(sessions, key) is not None


def test_a_revoked_key_opens_nothing_and_stays_listed(sessions: Sessions, project_id: str) -> None:
    key_id, key = key_of(sessions, project_id)
    admin = Caller("another key", project_id, Role.ADMIN)
    with sessions.begin() as session:
        first = projects.revoke_key(session, key_id, admin).revoked_at
    with sessions.begin() as session:
        assert projects.revoke_key(session, key_id, admin).revoked_at == first
    assert caller_of(sessions, key) is None
    with sessions() as session:
        assert [row.id for row in projects.keys(session)] == [key_id]


def test_a_key_cannot_revoke_itself(sessions: Sessions, project_id: str) -> None:
    key_id, key = key_of(sessions, project_id, Role.ADMIN)
    with pytest.raises(Conflict) as caught, sessions.begin() as session:
        projects.revoke_key(session, key_id, Caller(key_id, project_id, Role.ADMIN))
    assert caught.value.code == "key_in_use"
    assert caller_of(sessions, key) is not None


def test_what_does_not_exist_is_not_found(sessions: Sessions, project_id: str) -> None:
    with sessions() as session:
        with pytest.raises(NotFound, match="no key"):
            projects.revoke_key(session, "none", Caller("k", project_id, Role.ADMIN))
        with pytest.raises(NotFound, match="no project"):
            projects.create_key(session, "none", "key", Role.MEMBER)


@pytest.mark.parametrize("given", ["secret", "gr_0123456789ab_short", "gr_XYZ_aaaaaaaaaaaaaaaaaaaa"])
def test_a_given_key_must_have_the_form_of_one(sessions: Sessions, project_id: str, given: str) -> None:
    with pytest.raises(BadRequest, match="has the form"), sessions.begin() as session:
        projects.create_key(session, project_id, "key", Role.ADMIN, key=given)


def test_an_admin_key_counts_until_it_is_revoked(sessions: Sessions, project_id: str) -> None:
    with sessions() as session:
        assert not projects.has_admin(session)
    key_of(sessions, project_id, Role.MEMBER)
    key_id, _ = key_of(sessions, project_id, Role.ADMIN)
    with sessions.begin() as session:
        assert projects.has_admin(session)
        projects.revoke_key(session, key_id, Caller("k", project_id, Role.ADMIN))
        assert not projects.has_admin(session)


def test_use_is_noted_to_the_minute(sessions: Sessions, project_id: str) -> None:
    key_id, _ = key_of(sessions, project_id)
    with sessions.begin() as session:
        projects.note_use(session, key_id)
        first = projects.keys(session)[0].last_used_at
        projects.note_use(session, key_id)
        assert projects.keys(session)[0].last_used_at == first
    assert first is not None
    assert abs((utcnow() - first).total_seconds()) < 60


def test_project_names_are_unique_and_the_transaction_goes_on(sessions: Sessions) -> None:
    with sessions.begin() as session:
        projects.create_project(session, "one")
        with pytest.raises(Conflict) as caught:
            projects.create_project(session, "one")
        projects.create_project(session, "two")
    assert (caught.value.code, caught.value.param) == ("project_exists", "name")
    with sessions() as session:
        assert sorted(project.name for project in projects.projects(session)) == ["one", "two"]


def test_the_default_project_is_made_once(sessions: Sessions) -> None:
    with sessions.begin() as session:
        first = projects.default_project(session).id
    with sessions.begin() as session:
        assert projects.default_project(session).id == first
