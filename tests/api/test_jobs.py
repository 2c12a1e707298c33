"""Jobs over HTTP. No worker runs: what one would write is written through core.control."""

import csv
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import event

from core.control import jobs
from core.control.db import engine_of
from core.control.running import attempts, events
from core.control.tables import Asked
from core.errors import GraftError
from tests import tiny
from tests.api.conftest import Api, only_sqlite, refused
from tests.conftest import Valkey
from tests.control import rows
from tests.service import wait_until


@pytest.fixture
def dataset_id(api: Api) -> str:
    return api.dataset_id()


@pytest.fixture
def job_id(api: Api) -> str:
    return rows.job(api.sessions, api.project_id).id


def finish(api: Api, job_id: str) -> None:
    fence = rows.claimed(api.sessions, job_id).fence
    with api.sessions.begin() as session:
        attempts.fail(session, job_id, fence, GraftError("broken", "It broke.", hint="Mend it."))


def test_only_a_data_set_is_needed_and_everything_else_is_settled(api: Api, dataset_id: str) -> None:
    answer = api.client.post("/jobs", json={"dataset_id": dataset_id})
    assert answer.status_code == 201
    job = answer.json()
    assert job["id"].startswith("job_")
    assert (job["object"], job["status"], job["phase"], job["attempt"]) == ("job", "queued", None, 0)
    assert (job["model"], job["dataset_id"], job["name"]) == (tiny.NAME, dataset_id, "rows.jsonl")
    assert (job["queue"], job["validation"], job["error"], job["adapter_id"]) == (
        {"position": 0},
        None,
        None,
        None,
    )
    assert job["progress"]["percent"] == 0
    training = job["spec"]["training"]
    assert (training["epochs"], training["batch_size"], training["loss_on"]) == (3.0, "auto", "auto")
    assert api.client.get(f"/jobs/{job['id']}").json() == job


def test_what_is_said_is_kept(api: Api, dataset_id: str) -> None:
    body = {
        "dataset_id": dataset_id,
        "model": tiny.NAME,
        "name": "été",
        "seed": 7,
        "validation": {"fraction": 0.2},
        "metadata": {"team": "a"},
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "training": {"max_steps": 3, "batch_size": 2, "learning_rate": 0.001},
    }
    job = api.client.post("/jobs", json=body).json()
    assert (job["name"], job["metadata"], job["spec"]["seed"]) == ("été", {"team": "a"}, 7)
    assert job["validation"] == {"dataset_id": None, "fraction": 0.2}
    assert body["lora"].items() <= job["spec"]["lora"].items()
    assert body["training"].items() <= job["spec"]["training"].items()
    assert job["spec"]["training"]["epochs"] is None


def test_what_does_not_exist_is_not_trained(api: Api, dataset_id: str) -> None:
    refused(api.client.post("/jobs", json={"dataset_id": "ds_none"}), 404, "dataset_not_found")
    body = {"dataset_id": dataset_id, "model": "tests/tny"}
    error = refused(api.client.post("/jobs", json=body), 404, "model_not_found")
    assert error["param"] == "model"
    assert 'did you mean "tests/tiny"' in error["message"]
    assert api.client.get("/jobs").json()["data"] == []


# ---- The broker


@only_sqlite
def test_a_broker_that_refuses_does_not_hold_up_a_job(api: Api, dataset_id: str) -> None:
    started = time.monotonic()
    answer = api.client.post("/jobs", json={"dataset_id": dataset_id})
    assert time.monotonic() - started < 1
    assert answer.status_code == 201
    with api.sessions() as session:
        assert attempts.unsent(session, 10) == [answer.json()["id"]]


@only_sqlite
def test_a_broker_that_never_answers_does_not_hold_up_a_job(make_api: Callable[..., Api]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = make_api(broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        dataset_id = api.dataset_id()
        for _ in range(3):
            started = time.monotonic()
            assert api.client.post("/jobs", json={"dataset_id": dataset_id}).status_code == 201
            assert time.monotonic() - started < 1


@only_sqlite
def test_a_job_is_sent_as_its_id_alone(make_api: Callable[..., Api], valkey: Valkey) -> None:
    api = make_api(broker_url=valkey.url)
    body = {"dataset_id": api.dataset_id(), "name": "not in the message"}
    job_id = api.client.post("/jobs", json=body).json()["id"]
    with redis.Redis(port=valkey.port) as broker:
        deadline = time.monotonic() + 10
        while not (messages := broker.lrange("graft:train", 0, -1)) and time.monotonic() < deadline:
            time.sleep(0.02)
    (message,) = messages
    assert job_id.encode() in message or job_id in json.dumps(json.loads(message))
    assert json.loads(message)["headers"]["task"] == "graft.train"
    assert b"not in the message" not in message


# ---- Idempotency


def test_the_same_request_twice_makes_one_job(api: Api, dataset_id: str) -> None:
    headers = {"idempotency-key": "once"}
    body = {"dataset_id": dataset_id, "seed": 1}
    first = api.client.post("/jobs", json=body, headers=headers)
    again = api.client.post("/jobs", json={"seed": 1, "dataset_id": dataset_id}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"]
    other = api.client.post("/jobs", json={**body, "seed": 2}, headers=headers)
    refused(other, 409, "idempotency_conflict")
    assert other.headers["x-should-retry"] == "false"
    assert len(api.client.get("/jobs").json()["data"]) == 1
    assert api.client.post("/jobs", json=body).json()["id"] != first.json()["id"]


def test_the_same_request_at_once_makes_one_job(api: Api, dataset_id: str) -> None:
    answers: list[Any] = []

    def post() -> None:
        answers.append(
            api.client.post("/jobs", json={"dataset_id": dataset_id}, headers={"idempotency-key": "once"})
        )

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    assert len(api.client.get("/jobs").json()["data"]) == 1


@pytest.mark.parametrize("key", ["", "x" * 256])
@only_sqlite
def test_an_idempotency_key_has_a_length(api: Api, dataset_id: str, key: str) -> None:
    answer = api.client.post("/jobs", json={"dataset_id": dataset_id}, headers={"idempotency-key": key})
    assert refused(answer, 422, "invalid_request")["param"] == "idempotency-key"


# ---- The life of a job


def test_a_running_job_shows_its_progress(api: Api, job_id: str) -> None:
    fence = rows.claimed(api.sessions, job_id).fence
    progress = {"step": 3, "total_steps": 12, "tokens_per_second": 99.5, "eta_seconds": 4.5}
    with api.sessions.begin() as session:
        attempts.renew(session, job_id, fence, 60, phase="training", metrics={"train_loss": 0.5}, **progress)
    job = api.client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["phase"], job["queue"]) == ("running", "training", None)
    assert job["progress"] == {**progress, "percent": 25.0}
    assert job["metrics"] == {"train_loss": 0.5}
    assert job["started_at"].endswith(("Z", "+00:00"))


def test_a_failed_job_says_why(api: Api, job_id: str) -> None:
    finish(api, job_id)
    job = api.client.get(f"/jobs/{job_id}").json()
    assert job["error"] == {"code": "broken", "message": "It broke.", "hint": "Mend it."}
    assert job["finished_at"] is not None


def test_a_succeeded_job_names_its_adapter(api: Api, job_id: str) -> None:
    fence = rows.claimed(api.sessions, job_id).fence
    adapter = rows.adapter(api.project_id, job_id)
    with api.sessions.begin() as session:
        attempts.succeed(session, job_id, fence, adapter)
    job = api.client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["adapter_id"], job["progress"]["percent"]) == ("succeeded", adapter.id, 100.0)


def test_cancel_is_idempotent_and_refused_after_the_end(api: Api, job_id: str) -> None:
    for _ in range(2):
        answer = api.client.post(f"/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    ended = rows.job(api.sessions, api.project_id).id
    finish(api, ended)
    answer = api.client.post(f"/jobs/{ended}/cancel")
    refused(answer, 409, "job_finished")
    assert answer.headers["x-should-retry"] == "false"


def test_cancel_of_a_running_job_leaves_it_running(api: Api, job_id: str) -> None:
    fence = rows.claimed(api.sessions, job_id).fence
    assert api.client.post(f"/jobs/{job_id}/cancel").json()["status"] == "running"
    with api.sessions.begin() as session:
        assert attempts.renew(session, job_id, fence, 60) is Asked.CANCEL


def test_pause_and_resume_can_be_asked_for_twice(api: Api, job_id: str) -> None:
    for what, status in (
        ("pause", "paused"),
        ("pause", "paused"),
        ("resume", "queued"),
        ("resume", "queued"),
    ):
        answer = api.client.post(f"/jobs/{job_id}/{what}")
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    fence = rows.claimed(api.sessions, job_id).fence
    assert api.client.post(f"/jobs/{job_id}/pause").json()["status"] == "running"
    with api.sessions.begin() as session:
        attempts.release(session, job_id, fence, "The trainer left.")
    job = api.client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["phase"], job["finished_at"]) == ("paused", None, None)
    refused(api.client.delete(f"/jobs/{job_id}"), 409, "job_not_finished")
    assert api.client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    for what in ("pause", "resume"):
        refused(api.client.post(f"/jobs/{job_id}/{what}"), 409, "job_finished")
    for what in ("pause", "resume", "cancel", "retry"):
        refused(api.stranger.post(f"/jobs/{job_id}/{what}"), 404, "job_not_found")


@only_sqlite
def test_what_waits_again_is_sent_again(make_api: Callable[..., Api], valkey: Valkey) -> None:
    api = make_api(broker_url=valkey.url)
    job_id = api.client.post("/jobs", json={"dataset_id": api.dataset_id()}).json()["id"]
    with redis.Redis(port=valkey.port) as broker:
        for calls in (("pause", "resume"), ("cancel", "retry")):
            wait_until(lambda: broker.llen("graft:train"), "a message")
            broker.flushall()
            for call in calls:
                assert api.client.post(f"/jobs/{job_id}/{call}").status_code == 200
        wait_until(lambda: broker.llen("graft:train"), "a message")


def test_a_failed_job_is_retried_with_changes(api: Api, dataset_id: str, tmp_path: Any) -> None:
    body = {"dataset_id": dataset_id, "training": {"max_steps": 9, "effective_batch_size": 12}}
    job_id = api.client.post("/jobs", json=body).json()["id"]
    (tmp_path / "file").write_text("x")
    api.storage.put(tmp_path / "file", f"jobs/{job_id}/checkpoints/1-5/file")
    with api.sessions.begin() as session:
        events.add_checkpoint(session, job_id, 5, f"jobs/{job_id}/checkpoints/1-5", [], {})
    finish(api, job_id)
    changes = {"training": {"batch_size": 3, "learning_rate": 0.001}}
    for _ in range(2):
        job = api.client.post(f"/jobs/{job_id}/retry", json=changes).json()
        assert (job["status"], job["error"], job["finished_at"]) == ("queued", None, None)
    training = job["spec"]["training"]
    assert (training["batch_size"], training["learning_rate"], training["max_steps"]) == (3, 0.001, 9)
    assert len(api.client.get(f"/jobs/{job_id}/checkpoints").json()["data"]) == 1
    finish(api, job_id)
    retried = f"/jobs/{job_id}/retry"
    refused(
        api.client.post(retried, json={"lora": {"target_modules": ["q_prj"]}}), 422, "unknown_target_modules"
    )
    assert api.client.get(f"/jobs/{job_id}").json()["status"] == "failed"
    assert api.client.post(retried, json={"seed": 1}).json()["status"] == "queued"
    assert len(api.client.get(f"/jobs/{job_id}/checkpoints").json()["data"]) == 1
    refused(api.client.post(f"/jobs/{job_id}/retry", json={"seed": 2}), 409, "job_not_finished")


@pytest.mark.parametrize(
    ("changes", "param", "hint"),
    [
        (
            {"training": {"learnin_rate": 1}},
            "training.learnin_rate",
            'Did you mean "training.learning_rate"?',
        ),
        ({"dataset_id": "ds_1"}, "dataset_id", None),
        ({"continue_from": "ad_1"}, "continue_from", None),
        ({"training": {"learning_rate": 0}}, "training.learning_rate", None),
        ({"training": {"batch_size": 5}}, "training", 'or "auto" again'),
        ({"evaluation": {"early_stopping": {"patience": 1}}}, "evaluation", None),
        ({"lora": {"target_modules": [".*"]}}, "lora.target_modules", None),
        ({"lora": None}, "lora", None),
        ({"seed": None}, "seed", None),
    ],
)
@only_sqlite
def test_changes_are_checked_as_a_new_job_is(
    api: Api, dataset_id: str, changes: dict[str, Any], param: str, hint: str | None
) -> None:
    job_id = rows.job(api.sessions, api.project_id, dataset_id=dataset_id).id
    finish(api, job_id)
    error = refused(api.client.post(f"/jobs/{job_id}/retry", json=changes), 422, "invalid_request")
    assert error["param"] == param
    assert hint is None or hint in error["hint"]


def test_a_stream_stays_open_while_a_job_is_paused(api: Api, job_id: str) -> None:
    streams: list[list[dict[str, Any]]] = []
    watcher = threading.Thread(target=lambda: streams.append(follow(api, job_id)))
    api.client.post(f"/jobs/{job_id}/pause")
    watcher.start()
    time.sleep(1)
    assert watcher.is_alive()
    api.client.post(f"/jobs/{job_id}/cancel")
    watcher.join(10)
    assert [event["event"] for event in streams[0]] == ["created", "paused", "cancelled"]


def test_logs_are_those_of_all_attempts(api: Api, job_id: str, tmp_path: Path) -> None:
    assert api.client.get(f"/jobs/{job_id}/logs").text == ""
    for _ in range(3):
        fence = rows.claimed(api.sessions, job_id).fence
        if fence != 2:  # a worker that was lost before it wrote anything
            (tmp_path / f"log-{fence}").write_text(f"attempt {fence}: ä\n")
            api.storage.put(tmp_path / f"log-{fence}", jobs.log_key(job_id, fence))
        with api.sessions.begin() as session:
            attempts.release(session, job_id, fence, "It left.")
    answer = api.client.get(f"/jobs/{job_id}/logs")
    assert (answer.text, answer.headers["content-type"]) == (
        "attempt 1: ä\nattempt 3: ä\n",
        "text/plain; charset=utf-8",
    )
    refused(api.stranger.get(f"/jobs/{job_id}/logs"), 404, "job_not_found")


def test_delete_takes_a_finished_job_and_its_files(api: Api, job_id: str, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("x")
    api.storage.put(tmp_path / "file", f"jobs/{job_id}/checkpoints/5/file")
    refused(api.client.delete(f"/jobs/{job_id}"), 409, "job_not_finished")
    assert len(api.stored()) == 1
    finish(api, job_id)
    assert api.client.delete(f"/jobs/{job_id}").json() == {"id": job_id, "deleted": True}
    assert api.stored() == []
    for path in ("", "/events", "/metrics", "/checkpoints", "/logs"):
        refused(api.client.get(f"/jobs/{job_id}{path}"), 404, "job_not_found")


def test_lists_can_be_narrowed_and_paged(api: Api) -> None:
    made = [rows.job(api.sessions, api.project_id, labels={"team": "ab"[i % 2]}).id for i in range(4)]
    rows.claimed(api.sessions, made[0])

    def listed(**query: Any) -> list[str]:
        return [job["id"] for job in api.client.get("/jobs", params=query).json()["data"]]

    assert listed() == made[::-1]
    assert listed(limit=2, after=made[3]) == [made[2], made[1]]
    assert listed(status="running") == [made[0]]
    assert listed(**{"metadata[team]": "b"}) == [made[3], made[1]]
    assert listed(**{"metadata[team]": "a", "status": "queued"}) == [made[2]]
    assert listed(**{"metadata[nobody]": "x"}) == []
    positions = {job["id"]: job["queue"] for job in api.client.get("/jobs").json()["data"]}
    assert positions == {
        made[0]: None,
        made[1]: {"position": 0},
        made[2]: {"position": 1},
        made[3]: {"position": 2},
    }


@only_sqlite
def test_a_page_of_waiting_jobs_asks_once_for_their_positions(api: Api) -> None:
    asked: list[str] = []

    def note(*told: Any) -> None:
        asked.append(told[2])

    def asks(jobs: int) -> int:
        for _ in range(jobs):
            rows.job(api.sessions, api.project_id)
        asked.clear()
        assert api.client.get("/jobs").status_code == 200
        return len(asked)

    api.client.get("/jobs")  # the first use of a key is noted
    event.listen(engine_of(api.sessions), "before_cursor_execute", note)
    assert asks(1) == asks(3)


# ---- Events


def parsed(stream: str) -> list[dict[str, Any]]:
    """The server-sent events of a stream."""
    found = []
    for block in stream.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append(
                {"id": int(fields["id"]), "event": fields["event"], "data": json.loads(fields["data"])}
            )
    return found


def follow(api: Api, job_id: str, **headers: str) -> list[dict[str, Any]]:
    answer = api.client.get(f"/jobs/{job_id}/events", headers={"accept": "text/event-stream", **headers})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return parsed(answer.text)


def test_events_are_listed_newest_first(api: Api, job_id: str) -> None:
    finish(api, job_id)
    body = api.client.get(f"/jobs/{job_id}/events").json()
    assert [event["type"] for event in body["data"]] == ["failed", "started", "created"]
    assert body["data"][0]["level"] == "error"
    first = api.client.get(f"/jobs/{job_id}/events", params={"limit": 1}).json()
    assert first == {"object": "list", "data": body["data"][:1], "has_more": True}
    after = {"after": first["data"][0]["id"], "limit": 2}
    rest = api.client.get(f"/jobs/{job_id}/events", params=after).json()
    assert (rest["data"], rest["has_more"]) == (body["data"][1:], False)


def test_a_stream_replays_an_ended_job_and_ends(api: Api, job_id: str) -> None:
    finish(api, job_id)
    stream = follow(api, job_id)
    assert [event["event"] for event in stream] == ["created", "started", "failed"]
    assert [event["id"] for event in stream] == [event["data"]["id"] for event in stream]
    assert follow(api, job_id, **{"last-event-id": str(stream[1]["id"])}) == stream[2:]
    assert follow(api, job_id, **{"last-event-id": str(stream[2]["id"])}) == []
    assert follow(api, job_id, **{"last-event-id": ""}) == stream


def test_a_stream_follows_a_job_to_its_end(api: Api, job_id: str) -> None:
    streams: list[list[dict[str, Any]]] = []
    watcher = threading.Thread(target=lambda: streams.append(follow(api, job_id)))
    watcher.start()
    fence = rows.claimed(api.sessions, job_id).fence
    time.sleep(0.7)
    assert watcher.is_alive()
    with api.sessions.begin() as session:
        events.add(session, job_id, "note", "line one\nline two", data={"é": "\n\n"})
        attempts.fail(session, job_id, fence, GraftError("broken", "It broke."))
    watcher.join(10)
    (stream,) = streams
    assert [event["event"] for event in stream] == ["created", "started", "note", "failed"]
    assert stream[2]["data"]["message"] == "line one\nline two"
    assert stream[2]["data"]["data"] == {"é": "\n\n"}


@pytest.mark.parametrize("place", ["x", "-1", "1.5", "9" * 40])
def test_a_place_that_no_event_can_have_is_refused(api: Api, job_id: str, place: str) -> None:
    finish(api, job_id)
    path = f"/jobs/{job_id}/events"
    refused(api.client.get(path, params={"after": place}), 422, "invalid_request")
    headers = {"accept": "text/event-stream", "last-event-id": place}
    refused(api.client.get(path, headers=headers), 422, "invalid_request")


# ---- Metrics and checkpoints


@pytest.fixture
def measured(api: Api, job_id: str) -> str:
    with api.sessions.begin() as session:
        for step in range(1, 11):
            events.measure(session, job_id, step, {"loss": 1 / step})
        events.measure(session, job_id, 5, {"eval_loss": 0.25})
    return job_id


def test_metrics_are_a_series(api: Api, measured: str) -> None:
    body = api.client.get(f"/jobs/{measured}/metrics").json()
    assert [row["step"] for row in body["data"]] == list(range(1, 11))
    assert body["data"][4] == {"step": 5, "loss": 0.2, "eval_loss": 0.25}
    assert body["object"] == "list"


def test_metrics_as_a_table(api: Api, measured: str) -> None:
    answer = api.client.get(f"/jobs/{measured}/metrics", params={"format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    table = list(csv.DictReader(io.StringIO(answer.text)))
    assert list(table[0]) == ["step", "eval_loss", "loss"]
    assert [float(row["loss"]) for row in table] == [1 / step for step in range(1, 11)]
    assert [row["eval_loss"] for row in table] == ["", "", "", "", "0.25", "", "", "", "", ""]


@pytest.mark.parametrize(
    ("points", "steps"),
    [(2, [1, 10]), (4, [1, 4, 7, 10]), (10, list(range(1, 11))), (50, list(range(1, 11)))],
)
@only_sqlite
def test_metrics_can_be_thinned_out(api: Api, measured: str, points: int, steps: list[int]) -> None:
    body = api.client.get(f"/jobs/{measured}/metrics", params={"points": points}).json()
    assert [row["step"] for row in body["data"]] == steps


@pytest.mark.parametrize(
    "query", [{"format": "xml"}, {"points": 1}, {"points": 10_001}, {"format": "json\n"}]
)
@only_sqlite
def test_metrics_in_an_unknown_form_are_refused(api: Api, job_id: str, query: dict[str, Any]) -> None:
    refused(api.client.get(f"/jobs/{job_id}/metrics", params=query), 422, "invalid_request")


def test_a_job_without_metrics_has_empty_ones(api: Api, job_id: str) -> None:
    assert api.client.get(f"/jobs/{job_id}/metrics").json()["data"] == []
    assert api.client.get(f"/jobs/{job_id}/metrics", params={"format": "csv"}).text == "step\n"


def test_checkpoints_are_listed_with_their_size(api: Api, job_id: str) -> None:
    files = [{"path": "a", "bytes": 10, "sha256": "0"}, {"path": "b", "bytes": 5, "sha256": "0"}]
    with api.sessions.begin() as session:
        events.add_checkpoint(session, job_id, 5, "key", files, {"eval_loss": 0.5})
        events.add_checkpoint(session, job_id, 10, "key", [], {})
    body = api.client.get(f"/jobs/{job_id}/checkpoints").json()
    assert [(row["step"], row["bytes"], row["metrics"], row["best"]) for row in body["data"]] == [
        (10, 0, {}, False),
        (5, 15, {"eval_loss": 0.5}, True),
    ]
    assert body["has_more"] is False
    newest = api.client.get(f"/jobs/{job_id}/checkpoints", params={"limit": 1}).json()
    assert ([row["step"] for row in newest["data"]], newest["has_more"]) == ([10], True)
    older = api.client.get(f"/jobs/{job_id}/checkpoints", params={"after": 10}).json()
    assert ([(row["step"], row["best"]) for row in older["data"]], older["has_more"]) == ([(5, True)], False)
    refused(api.client.get(f"/jobs/{job_id}/checkpoints", params={"after": job_id}), 422, "invalid_request")


def test_the_position_in_the_queue_falls(api: Api, dataset_id: str) -> None:
    first = api.client.post("/jobs", json={"dataset_id": dataset_id}).json()["id"]
    time.sleep(0.002)
    second = api.client.post("/jobs", json={"dataset_id": dataset_id}).json()
    assert second["queue"] == {"position": 1}
    with api.sessions.begin() as session:
        jobs.cancel(session, api.project_id, first)
    assert api.client.get(f"/jobs/{second['id']}").json()["queue"] == {"position": 0}


@pytest.mark.parametrize("after", ["", "zzz", "job_x", "%F0%9F"])
def test_a_page_after_no_id_is_refused(api: Api, after: str) -> None:
    assert refused(api.client.get(f"/jobs?after={after}"), 422, "invalid_request")["param"] == "after"
