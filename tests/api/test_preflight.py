"""What a job would do, asked without a worker: counts, steps and problems."""

import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest

from api.routes import preflight
from core.control.running import attempts, events, probes, workers
from core.control.tables import Probe
from tests.api.conftest import Api, only_sqlite, refused
from tests.control import rows

LONG = {"prompt": "word " * 600, "completion": "b"}


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


def asked(api: Api, data: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    dataset_id = api.upload(data).json()["id"]
    answer = api.client.post("/jobs/preflight", json={"dataset_id": dataset_id, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert (found["object"], found["dataset_id"]) == ("preflight", dataset_id)
    return found


def test_rows_tokens_and_steps_are_counted_and_nothing_is_kept(api: Api) -> None:
    found = asked(api, [pair(n) for n in range(10)], training={"effective_batch_size": 4, "epochs": 2})
    assert (found["ok"], found["problems"], found["total_steps"]) == (True, [], 6)
    nothing = {"count": 0, "lines": []}
    assert found["rows"] == {
        "used": 10,
        "validation": 0,
        "dropped": nothing,
        "truncated": nothing,
        "validation_dropped": nothing,
        "validation_truncated": nothing,
        "in_both": nothing,
    }
    tokens = found["tokens"]
    assert tokens["total"] > tokens["trained"] > 10
    assert found["spec"]["training"]["max_length"] == tokens["longest"]
    assert found["spec"]["training"]["loss_on"] == "assistant"
    assert (found["memory"], found["seconds_per_step"], found["eta_seconds"]) == (None, None, None)
    assert found["not_measured"] == "No worker is free."
    assert api.client.get("/jobs").json()["data"] == []


@only_sqlite
@pytest.mark.parametrize(
    ("policy", "used", "dropped", "truncated", "codes"),
    [
        ("error", 2, [2, 4], [], ["row_too_long"]),
        ("drop", 2, [2, 4], [], []),
        ("truncate", 4, [], [2, 4], []),
    ],
)
def test_too_long_rows_are_counted_with_their_lines(
    api: Api, policy: str, used: int, dropped: list[int], truncated: list[int], codes: list[str]
) -> None:
    found = asked(
        api, [pair(0), LONG, pair(1), LONG], training={"max_length": 128, "overlength": policy, "epochs": 1}
    )
    assert found["rows"]["used"] == used
    assert (found["rows"]["dropped"]["lines"], found["rows"]["truncated"]["lines"]) == (dropped, truncated)
    assert [problem["code"] for problem in found["problems"]] == codes
    assert found["ok"] == (not codes)


@only_sqlite
def test_everything_that_is_wrong_is_listed(api: Api) -> None:
    found = asked(api, [LONG, LONG], training={"max_length": 64})
    assert [problem["code"] for problem in found["problems"]] == ["row_too_long", "no_trained_tokens"]
    assert (found["rows"]["used"], found["total_steps"]) == (0, None)
    found = asked(api, [pair(0)], training={"max_length": 100_000})
    assert [problem["code"] for problem in found["problems"]] == ["max_length_too_long"]
    assert found["rows"] is None


def test_validation_rows_that_are_left_out_are_counted(api: Api) -> None:
    valid = api.upload([pair(1), LONG]).json()["id"]
    for policy, kind in (("drop", "validation_dropped"), ("truncate", "validation_truncated")):
        found = asked(
            api,
            [pair(n) for n in range(10)],
            validation={"dataset_id": valid},
            training={"overlength": policy, "max_length": 128},
        )
        assert found["rows"][kind] == {"count": 1, "lines": [2]}
        assert found["rows"]["dropped"]["count"] == found["rows"]["truncated"]["count"] == 0


@pytest.mark.parametrize("path", ["/jobs", "/jobs/preflight"])
def test_what_no_device_can_do_is_refused_at_once(api: Api, path: str) -> None:
    dataset_id = api.upload([pair(0)]).json()["id"]
    for changes, code in (
        ({"lora": {"init": "pissa"}}, "pissa_needs_16_bit"),
        ({"lora": {"use_dora": True}, "quantization": {"bits": 8}}, "dora_not_with_8_bit"),
    ):
        refused(api.client.post(path, json={"dataset_id": dataset_id, **changes}), 422, code)


def test_validation_rows_are_counted(api: Api) -> None:
    valid = api.upload([pair(1), pair(99)]).json()["id"]
    found = asked(api, [pair(n) for n in range(10)], validation={"dataset_id": valid})
    assert (found["rows"]["used"], found["rows"]["validation"]) == (10, 2)
    assert found["rows"]["in_both"] == {"count": 1, "lines": [1]}
    found = asked(api, [pair(n) for n in range(40)], validation={"fraction": 0.25})
    assert found["rows"]["used"] + found["rows"]["validation"] == 40
    assert found["rows"]["validation"] > 0
    found = asked(api, [pair(0)], validation={"fraction": 0.25})
    assert [problem["code"] for problem in found["problems"]] == ["validation_empty"]


@only_sqlite
def test_a_wrong_body_is_refused_as_a_job_would_be(api: Api) -> None:
    dataset_id = api.dataset_id()
    for body, status in [
        ({}, 422),
        ({"dataset_id": "ds_none"}, 404),
        ({"dataset_id": dataset_id, "validation": {"dataset_id": "ds_none"}}, 404),
        ({"dataset_id": dataset_id, "model": "other"}, 404),
        ({"dataset_id": dataset_id, "trainin": {}}, 422),
    ]:
        job = refused(api.client.post("/jobs", json=body), status)
        error = refused(api.client.post("/jobs/preflight", json=body), status)
        assert error["code"] == job["code"]
    refused(api.stranger.post("/jobs/preflight", json={"dataset_id": dataset_id}), 404, "dataset_not_found")


MEASURED = {
    "spec": {"seed": 7},
    "total_steps": 2,
    "device": "GPU",
    "memory_needed_bytes": 10,
    "memory_present_bytes": 20,
    "seconds_per_step": 2.0,
    "load_seconds": 3.0,
    "training_seconds": 4.0,
}
ERROR = {"code": "unknown_target_modules", "message": "No.", "hint": None, "param": "lora.target_modules"}


@only_sqlite
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"measured": MEASURED},
            {"ok": True, "spec": {"seed": 7}, "device": "GPU", "seconds_per_step": 2.0, "eta_seconds": 7.0}
            | {"memory": {"needed_bytes": 10, "present_bytes": 20, "measured": True}, "not_measured": None},
        ),
        (
            {"error": ERROR},
            {"ok": False, "problems": [ERROR], "memory": None, "not_measured": "The job would fail."},
        ),
        ({"unknown": "It is late."}, {"ok": True, "memory": None, "not_measured": "It is late."}),
    ],
)
def test_a_workers_answer_is_passed_on(api: Api, said: dict[str, Any], expected: dict[str, Any]) -> None:
    with api.sessions.begin() as session:
        workers.register(session, 1)

    def reply() -> None:
        while True:
            with api.sessions.begin() as session:
                if asked := session.query(Probe).first():
                    probes.answer(session, asked.id, said)
                    return
            time.sleep(0.05)

    worker = threading.Thread(target=reply, daemon=True)
    worker.start()
    found = asked(api, [pair(0)], training={"max_steps": 2})
    worker.join(10)
    assert {name: found[name] for name in expected} == expected
    with api.sessions() as session:
        assert session.query(Probe).all() == []


@only_sqlite
def test_a_worker_is_asked_only_while_it_has_nothing_to_do(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with api.sessions.begin() as session:
        workers.register(session, 1)
    monkeypatch.setattr(probes, "PATIENCE_SECONDS", 0.5)
    found = asked(api, [pair(0)])
    assert (found["ok"], found["not_measured"]) == (True, "No worker answered within 0.5 seconds.")
    rows.job(api.sessions, api.project_id)
    assert asked(api, [pair(0)])["not_measured"] == "No worker is free."


def busy_worker(api: Api, *, packing: bool = False) -> None:
    """One that has told of its device, and has no slot free."""
    device = {
        "name": "CPU",
        "compute_dtype": "float32",
        "cuda": False,
        "free_bytes": 10**10,
        "packing": packing,
    }
    with api.sessions.begin() as session:
        workers.beat(session, "worker_1", 0, device)


@only_sqlite
def test_where_nothing_is_measured_earlier_jobs_alike_tell_the_seconds(api: Api) -> None:
    busy_worker(api)
    training = {"max_steps": 10, "effective_batch_size": 2}
    found = asked(api, [pair(0), pair(1)], training=training)
    assert found["seconds_per_step"] is None
    assert found["memory"]["measured"] is False
    lora = found["spec"]["lora"]
    for speed, changed in ((49.0, {}), (50.0, {}), (70.0, {}), (1.0, {"lora": lora | {"r": 64}})):
        job = rows.job(api.sessions, api.project_id, model=found["model"], spec=found["spec"] | changed)
        fence = rows.claimed(api.sessions, job.id).fence
        with api.sessions.begin() as session:
            events.measure(session, job.id, 1, {"tokens_per_second": speed})
            tokens = found["tokens"]["total"]
            measured = {"tokens": tokens, "train_seconds": tokens / speed + 5}
            attempts.renew(session, job.id, fence, 60, step=1, metrics=measured)
            attempts.succeed(session, job.id, fence, rows.adapter(api.project_id, job.id))
    found = asked(api, [pair(0), pair(1)], training=training)
    assert found["seconds_per_step"] == pytest.approx(found["tokens"]["total"] / 50)
    # 5 s of the one step of those jobs went into its checkpoint.
    assert found["eta_seconds"] == pytest.approx(10 * (found["seconds_per_step"] + 5))
    assert found["not_measured"] == "No worker is free."


@only_sqlite
def test_steps_are_those_of_packed_rows_where_the_device_packs(api: Api) -> None:
    data = [pair(n) for n in range(40)]
    training = {"epochs": 1, "effective_batch_size": 2, "max_length": 256}
    assert asked(api, data, training=training)["total_steps"] == 20
    busy_worker(api, packing=True)
    found = asked(api, data, training=training)
    assert found["spec"]["training"]["packing"] is True
    packs = -(-found["tokens"]["total"] // 256)
    assert found["total_steps"] == -(-packs // 2) < 20


@only_sqlite
def test_a_data_set_that_takes_too_long_to_count_is_said(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.routes.preflight._COUNT_SECONDS", 0)
    found = asked(api, [pair(0)])
    assert (found["ok"], found["rows"], found["tokens"], found["total_steps"]) == (True, None, None, None)
    assert "not counted within 0 s" in found["not_measured"]


@only_sqlite
def test_preflights_leave_the_service_room_for_other_requests(api: Api) -> None:
    dataset_id = api.dataset_id()
    with ExitStack() as stack:
        for _ in range(preflight._MOST):
            preflight._places.acquire()
            stack.callback(preflight._places.release)
        answer = api.client.post("/jobs/preflight", json={"dataset_id": dataset_id})
        refused(answer, 429, "too_many_preflights")
        assert answer.headers["retry-after"] == "5"
    for _ in range(preflight._MOST + 1):
        refused(api.client.post("/jobs/preflight", json={"dataset_id": "ds_none"}), 404)
    assert api.client.post("/jobs/preflight", json={"dataset_id": dataset_id}).status_code == 200
