"""Who may call what. The routes come from the OpenAPI description, so a new one is covered at once."""

import re

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.main import create_app
from core.control import adapters, datasets, jobs, projects
from core.control.tables import Role
from tests.api.conftest import ADMIN_KEY, Api, only_sqlite, refused
from tests.control import rows


def filled(path: str) -> str:
    return re.sub(r"\{[^}]+\}", "x", path)


def test_every_route_but_health_needs_a_key(api: Api) -> None:
    routes = api.routes()
    assert len(routes) > 20
    for method, path in routes:
        answer = api.nobody.request(method, filled(path))
        if path.startswith("/health/"):
            assert answer.status_code in (200, 503), path
            continue
        error = refused(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert method == "HEAD" or error["code"] == "missing_key", path


def test_the_key_is_asked_for_before_the_body_is_read(api: Api) -> None:
    for method, path in api.routes():
        if method == "POST":
            refused(
                api.nobody.post(filled(path), content=b"{", headers={"content-type": "application/json"}), 401
            )
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    refused(api.nobody.post("/datasets", content=b"not multipart at all", headers=multipart), 401)


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {ADMIN_KEY}x",
        f"bearer gr_0123456789ab_{'x' * 30}",
        f"Basic {ADMIN_KEY}",
        f"Token {ADMIN_KEY}",
        ADMIN_KEY,
    ],
)
@only_sqlite
def test_a_wrong_key_opens_nothing(api: Api, header: str) -> None:
    error = refused(api.nobody.get("/jobs", headers={"authorization": header}), 401)
    assert error["code"] in ("missing_key", "invalid_key")


@only_sqlite
def test_a_key_in_the_query_or_a_cookie_is_no_key(api: Api) -> None:
    refused(api.nobody.get("/jobs", params={"key": ADMIN_KEY, "authorization": f"Bearer {ADMIN_KEY}"}), 401)
    refused(api.nobody.get("/jobs", headers={"cookie": f"authorization={ADMIN_KEY}"}), 401)


def test_a_revoked_key_stops_at_once(api: Api) -> None:
    made = api.client.post("/keys", json={"name": "short-lived"}).json()
    headers = {"authorization": f"Bearer {made['key']}"}
    assert api.nobody.get("/jobs", headers=headers).status_code == 200
    api.client.delete(f"/keys/{made['id']}")
    refused(api.nobody.get("/jobs", headers=headers), 401, "invalid_key")


def test_foreign_ids_are_not_found_on_every_route(api: Api) -> None:
    with api.sessions.begin() as session:
        other = projects.create_project(session, "another").id
    adapter = rows.adapter(other, files=[{"path": "adapter_config.json", "bytes": 1, "sha256": "0" * 64}])
    with api.sessions.begin() as session:
        session.add(adapter)
    ids = {
        "dataset_id": rows.dataset(api.sessions, other).id,
        "job_id": rows.job(api.sessions, other).id,
        "adapter_id": adapter.id,
        "export_id": rows.export(api.sessions, adapter.id).id,
        "path": "adapter_config.json",
        "model": adapter.id,
    }
    # What a route needs besides, to get as far as the id.
    bodies = {"/adapters/{adapter_id}/export": {"format": "gguf"}}
    queries = {"/jobs/{job_id}/script": {"as": "trl"}}
    seen = set()
    for method, path in api.routes():
        names = set(re.findall(r"\{([^}]+)\}", path))
        # Keys belong to the admin, whatever their project.
        if not names or names == {"key_id"}:
            continue
        assert names <= set(ids), f"{path}: say here what a foreign id of it is"
        answer = api.client.request(
            method, path.format(**ids), json=bodies.get(path), params=queries.get(path)
        )
        refused(answer, 404)
        seen |= names
    assert seen == set(ids)
    with api.sessions() as session:
        datasets.get(session, other, ids["dataset_id"])
        adapters.get(session, other, ids["adapter_id"])
        assert jobs.get(session, other, ids["job_id"]).status == "queued"
        assert jobs.get(session, other, ids["job_id"]).asked is None


def test_foreign_ids_in_bodies_and_queries_are_not_found(api: Api) -> None:
    with api.sessions.begin() as session:
        other = projects.create_project(session, "another").id
        adapter = rows.adapter(other)
        session.add(adapter)
    foreign, own = rows.dataset(api.sessions, other).id, rows.dataset(api.sessions, api.project_id).id
    error = refused(api.client.post("/jobs", json={"dataset_id": foreign}), 404, "dataset_not_found")
    assert error["param"] == "dataset_id"
    body = {"dataset_id": own, "validation": {"dataset_id": foreign}}
    assert refused(api.client.post("/jobs", json=body), 404)["param"] == "validation.dataset_id"
    body = {"adapter_id": adapter.id, "prompt": "Hi"}
    assert refused(api.client.post("/generate", json=body), 404)["param"] == "adapter_id"
    body = {"targets": ["base", adapter.id], "prompt": "Hi"}
    assert refused(api.client.post("/compare", json=body), 404)["param"] == "targets.1"
    theirs = rows.job(api.sessions, other)
    for name in (adapter.id, f"{theirs.id}@latest", f"{theirs.id}@5"):
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
        refused(api.client.post("/v1/chat/completions", json=body), 404)
        refused(api.client.post("/v1/completions", json={"model": name, "prompt": "Hi"}), 404)
        assert name not in api.client.get("/v1/models").text
    assert api.client.get("/jobs").json()["data"] == []


def test_lists_hold_the_callers_own_rows_alone(api: Api) -> None:
    with api.sessions.begin() as session:
        other = projects.create_project(session, "another").id
        session.add(rows.adapter(other))
    rows.dataset(api.sessions, other)
    rows.job(api.sessions, other)
    for path in ("/datasets", "/jobs", "/adapters"):
        assert api.client.get(path).json() == {"object": "list", "data": [], "has_more": False}


# ---- Keys and projects


def test_keys_and_projects_are_the_admins_alone(api: Api) -> None:
    admins = [(method, path) for method, path in api.routes() if path.startswith(("/keys", "/projects"))]
    assert len(admins) >= 5
    for method, path in admins:
        body = {"name": "x"} if method == "POST" else None
        refused(api.stranger.request(method, filled(path), json=body), 403, "admin_only")


def test_a_new_key_works_and_is_shown_once(api: Api) -> None:
    answer = api.client.post("/keys", json={"name": "Anna", "role": "member"})
    assert answer.status_code == 201
    made = answer.json()
    assert (made["object"], made["role"], made["project_id"]) == ("key", "member", api.project_id)
    assert api.nobody.get("/jobs", headers={"authorization": f"Bearer {made['key']}"}).status_code == 200
    listed = api.client.get("/keys")
    assert made["id"] in [key["id"] for key in listed.json()["data"]]
    assert made["key"] not in listed.text
    assert not any("key" in key or "digest" in key for key in listed.json()["data"])


def test_a_key_that_was_used_says_when(api: Api) -> None:
    made = api.client.post("/keys", json={"name": "Anna"}).json()
    assert made["last_used_at"] is None
    api.nobody.get("/jobs", headers={"authorization": f"Bearer {made['key']}"})
    (listed,) = [key for key in api.client.get("/keys").json()["data"] if key["id"] == made["id"]]
    assert listed["last_used_at"] is not None


def test_a_key_for_another_project_sees_that_one(api: Api) -> None:
    project = api.client.post("/projects", json={"name": "new"}).json()
    key = api.client.post("/keys", json={"name": "k", "project_id": project["id"]}).json()["key"]
    rows.dataset(api.sessions, project["id"])
    found = api.nobody.get("/datasets", headers={"authorization": f"Bearer {key}"}).json()["data"]
    assert len(found) == 1
    assert api.client.get("/datasets").json()["data"] == []


def test_projects_and_keys_that_cannot_be(api: Api) -> None:
    assert api.client.post("/projects", json={"name": "one"}).status_code == 201
    answer = api.client.post("/projects", json={"name": "one"})
    assert refused(answer, 409, "project_exists")["param"] == "name"
    assert answer.headers["x-should-retry"] == "false"
    refused(api.client.post("/keys", json={"name": "k", "project_id": "proj_none"}), 404, "project_not_found")
    refused(api.client.post("/keys", json={"name": "k", "role": "owner"}), 422)
    refused(api.client.post("/projects", json={"name": ""}), 422)
    refused(api.client.delete("/keys/none"), 404, "key_not_found")
    refused(api.client.delete(f"/keys/{ADMIN_KEY.split('_')[1]}"), 409, "key_in_use")
    names = [project["name"] for project in api.client.get("/projects").json()["data"]]
    assert sorted(names) == ["default", "one", "theirs"]


def test_a_second_start_keeps_the_first_admin_key(api: Api) -> None:
    other = "gr_ffffffffffff_another-admin-key-for-the-tests"
    for changes in ({"admin_key": None}, {"admin_key": SecretStr(other)}):
        with TestClient(create_app(api.services.settings.model_copy(update=changes))) as client:
            assert client.get("/keys", headers={"authorization": f"Bearer {ADMIN_KEY}"}).status_code == 200
            assert client.get("/keys", headers={"authorization": f"Bearer {other}"}).status_code == 401
    with api.sessions() as session:
        assert [key.role for key in projects.keys(session)].count(Role.ADMIN) == 1
