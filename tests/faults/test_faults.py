"""Kills, outages and full disks in the middle of a job, on a service of real processes."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from graft_client.client import ApiError, Client
from tests.conftest import Valkey
from tests.e2e.conftest import MESSAGES, tiny_environment
from tests.service import Service, wait_until

# Long enough to be hit in the middle, short enough to wait for.
SLOW = {
    "training": {"max_steps": 120, "learning_rate": 0.01, "effective_batch_size": 4},
    "checkpoints": {"every_steps": 5},
    "seed": 3,
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("faults") / "home", tiny_environment(tiny_model))
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def dataset(service: Service, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MESSAGES))
    with service.client() as client:
        return str(client.upload(file)["id"])


@pytest.fixture(scope="module")
def undisturbed(service: Service, dataset: str) -> dict:
    """The same job with nothing in its way: what every disturbed one must come to."""
    with service.client() as client:
        *_, job = client.watch(client.create_job({"dataset_id": dataset, **SLOW})["id"])
    assert job["status"] == "succeeded", service.logs()
    return job


def weights(client: Client, job: dict) -> str:
    adapter = next(row for row in client.adapters(100) if row["id"] == job["adapter_id"])
    return str(
        next(file["sha256"] for file in adapter["files"] if file["path"] == "adapter_model.safetensors")
    )


def start_and_reach(client: Client, dataset: str, step: int) -> str:
    job_id = str(client.create_job({"dataset_id": dataset, **SLOW})["id"])
    wait_until(lambda: client.job(job_id)["progress"]["step"] >= step, f"step {step}")
    assert client.job(job_id)["status"] == "running"
    return job_id


def has_reached(client: Client, job_id: str, step: int) -> bool:
    return bool(client.job(job_id)["progress"]["step"] >= step)


def trainer_of(service: Service) -> int:
    """The process that trains: a child of the fork server, itself a child of the worker."""
    (worker,) = service.pids("celery", "worker.main")
    found = []
    for child in children(worker):
        found += children(child)
    (trainer,) = found
    return trainer


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


@pytest.mark.parametrize("victim", ["worker", "trainer"])
def test_killed_in_the_middle_it_goes_on_to_the_same_weights(
    service: Service, dataset: str, undisturbed: dict, victim: str
) -> None:
    with service.client() as client:
        job_id = start_and_reach(client, dataset, 17)
        trainer = trainer_of(service)
        (worker,) = service.pids("celery", "worker.main")
        os.kill(worker if victim == "worker" else trainer, signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: not Path(f"/proc/{trainer}").exists(), "the trainer ends with its worker", 5)
        *_, job = client.watch(job_id)
        assert job["status"] == "succeeded", (job["error"], service.logs())
        assert job["attempt"] == 2
        kinds = [event["type"] for event in client.events(job_id)]
        assert "crashed" in kinds
        resumed = next(event for event in client.events(job_id) if event["type"] == "resumed")
        assert resumed["data"]["step"] >= 10
        assert weights(client, job) == weights(client, undisturbed)
        assert job["metrics"]["train_loss"] == pytest.approx(undisturbed["metrics"]["train_loss"], abs=1e-9)
    assert time.monotonic() - killed < 90
    assert not any((service.home / "runs").glob("*/*/checkpoints"))


def test_shutdown_in_the_middle_counts_as_no_crash(service: Service, dataset: str, undisturbed: dict) -> None:
    with service.client() as client:
        job_id = start_and_reach(client, dataset, 8)
    trainer = trainer_of(service)
    os.kill(trainer, signal.SIGSTOP)  # the API ends first; within that second so small a job would be done
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(service.stop)
        wait_until(lambda: not service.pids("uvicorn", "api.main"), "the API has ended", 20)
        os.kill(trainer, signal.SIGCONT)
    assert stopped.result() == 0
    service.start()
    with service.client() as client:
        *_, job = client.watch(job_id)
        kinds = [event["type"] for event in client.events(job_id)]
        assert job["status"] == "succeeded", (job["error"], service.logs())
        assert "released" in kinds
        assert "crashed" not in kinds
        assert weights(client, job) == weights(client, undisturbed)


def test_cancel_ends_a_running_job_and_leaves_no_adapter(service: Service, dataset: str) -> None:
    with service.client() as client:
        before = len(client.adapters(100))
        job_id = start_and_reach(client, dataset, 3)
        client.cancel(job_id)
        asked = time.monotonic()
        *_, job = client.watch(job_id, every=0.1)
        assert job["status"] == "cancelled"
        assert time.monotonic() - asked < 15
        assert client.cancel(job_id)["status"] == "cancelled"
        assert len(client.adapters(100)) == before
        assert job["adapter_id"] is None


def test_a_pause_frees_the_device_and_the_job_comes_to_the_same_weights(
    service: Service, dataset: str, undisturbed: dict
) -> None:
    quick = {"dataset_id": dataset, "training": {"max_steps": 1}}
    with service.client() as client:
        job_id = start_and_reach(client, dataset, 8)
        low = client.create_job(quick)["id"]
        high = client.create_job({**quick, "priority": 5})["id"]
        assert [client.job(waiting)["queue"]["position"] for waiting in (low, high)] == [1, 0]
        client.pause(job_id)
        wait_until(lambda: client.job(job_id)["status"] == "paused", "the job is paused", 30)
        saved = client.checkpoints(job_id)[0]["step"]
        assert saved >= 8
        *_, first = client.watch(low)
        *_, second = client.watch(high)
        assert second["started_at"] < first["started_at"]
        assert client.job(job_id)["status"] == "paused"
        client.resume(job_id)
        *_, job = client.watch(job_id)
        assert job["status"] == "succeeded", (job["error"], service.logs())
        resumed = next(event for event in client.events(job_id) if event["type"] == "resumed")
        assert resumed["data"]["step"] == saved  # no step is done twice
        assert weights(client, job) == weights(client, undisturbed)


def test_a_resume_right_after_a_pause_never_leaves_the_job_behind(
    service: Service, dataset: str, undisturbed: dict
) -> None:
    with service.client() as client:
        job_id = start_and_reach(client, dataset, 5)
        for reached, wait in ((10, 0), (20, 1.2)):  # before and after the worker has heard of it
            client.pause(job_id)
            time.sleep(wait)
            assert client.resume(job_id)["status"] in ("running", "queued")
            wait_until(partial(has_reached, client, job_id, reached), "it goes on")
        *_, job = client.watch(job_id)
        assert job["status"] == "succeeded", (job["error"], service.logs())
        assert weights(client, job) == weights(client, undisturbed)


def test_a_trainer_killed_while_it_is_to_pause_leaves_a_paused_job(
    service: Service, dataset: str, undisturbed: dict
) -> None:
    with service.client() as client:
        job_id = start_and_reach(client, dataset, 12)
        trainer = trainer_of(service)
        os.kill(trainer, signal.SIGSTOP)  # it hears of the pause, and comes no further
        client.pause(job_id)
        time.sleep(1.5)
        os.kill(trainer, signal.SIGKILL)
        wait_until(lambda: client.job(job_id)["status"] == "paused", "the job is paused", 30)
        # What the trainer still had said (of a checkpoint) may be heard after the pause was asked for.
        kinds = [event["type"] for event in client.events(job_id) if event["type"] != "checkpoint"]
        assert kinds[:3] == ["paused", "crashed", "pause_requested"]
        client.resume(job_id)
        *_, job = client.watch(job_id)
        assert job["status"] == "succeeded", (job["error"], service.logs())
        assert weights(client, job) == weights(client, undisturbed)


def test_a_cancelled_job_is_retried_from_where_it_was(service: Service, dataset: str) -> None:
    with service.client() as client:
        job_id = start_and_reach(client, dataset, 8)
        client.cancel(job_id)
        wait_until(lambda: client.job(job_id)["status"] == "cancelled", "the job is cancelled", 30)
        saved = client.checkpoints(job_id)[0]["step"]
        changes = {"training": {"max_steps": saved + 4, "learning_rate": 0.001}, "checkpoints": {"keep": 1}}
        client.retry(job_id, changes)
        *_, job = client.watch(job_id)
        assert job["status"] == "succeeded", (job["error"], service.logs())
        assert job["progress"]["step"] == saved + 4
        assert [row["step"] for row in client.checkpoints(job_id)] == [saved + 4]
        rates = {row["step"]: row["learning_rate"] for row in client.metrics(job_id)}
        assert rates[saved] > 0.005
        assert 0 < rates[saved + 1] <= 0.001


def test_a_deleted_data_set_cannot_vanish_under_a_job(service: Service, dataset: str) -> None:
    with service.client() as client:
        job_id = start_and_reach(client, dataset, 1)
        with pytest.raises(ApiError) as caught:
            client._call("DELETE", f"/datasets/{dataset}")
        assert caught.value.code == "dataset_in_use"
        client.cancel(job_id)
        *_, _ = client.watch(job_id)


def test_a_killed_engine_is_started_anew_and_that_shows(service: Service) -> None:
    def ready() -> dict:
        return dict(httpx.get(f"{service.url}/health/ready").json())

    with service.client() as client:
        answer = client.generate(prompt="Say hello.", max_new_tokens=4)
        before = ready()
        (pid,) = service.pids("worker.inference")
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 60
        states = set()
        while (now := ready())["parts"]["engine"] != "ok" or now["engine"] == before["engine"]:
            states.add(now["parts"]["engine"])
            assert time.monotonic() < until
            time.sleep(0.1)
        assert "down" in states
        assert now["engine"]["started_at"] > before["engine"]["started_at"]
        assert client.generate(prompt="Say hello.", max_new_tokens=4)["outputs"] == answer["outputs"]


def test_broker_down_at_post(tmp_path: Path, tiny_model: Path, valkey: Valkey) -> None:
    """201 at once, and the job runs when the broker is back."""
    service = Service(
        tmp_path / "home", {**tiny_environment(tiny_model), "GRAFT_BROKER_URL": valkey.url}
    ).start()
    try:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in MESSAGES[:8]))
        with service.client() as client:
            dataset = client.upload(rows)["id"]
            valkey.stop()
            posted = time.monotonic()
            job_id = client.create_job({"dataset_id": dataset, "training": {"max_steps": 1}})["id"]
            assert time.monotonic() - posted < 1
            time.sleep(3)
            assert client.job(job_id)["status"] == "queued"
            valkey.start()
            wait_until(lambda: client.job(job_id)["status"] == "succeeded", "the job runs", 90)
    finally:
        service.stop()


@pytest.mark.parametrize("small_disk", [3], indirect=True)
def test_disk_full_while_saving(tmp_path: Path, tiny_model: Path, small_disk: Path) -> None:
    """The job fails with storage_full, the checkpoints before it are whole, and the service lives."""
    service = Service(
        tmp_path / "home", {**tiny_environment(tiny_model), "GRAFT_STORAGE_URL": str(small_disk)}
    )
    try:
        service.start()
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in MESSAGES))
        with service.client() as client:
            dataset = client.upload(rows)["id"]
            body = {"dataset_id": dataset, **SLOW, "checkpoints": {"every_steps": 2, "keep": 100}}
            *_, job = client.watch(client.create_job(body)["id"])
            assert job["status"] == "failed"
            assert job["error"]["code"] == "storage_full"
            kept = client._call("GET", f"/jobs/{job['id']}/checkpoints")["data"]
            assert kept
            folders = list((small_disk / "jobs" / job["id"] / "checkpoints").iterdir())
            assert len(folders) == len(kept)
            for row in kept:
                (folder,) = [f for f in folders if f.name.endswith(f"-{row['step']}")]
                assert sum(f.stat().st_size for f in folder.iterdir()) == row["bytes"]
            assert not list(small_disk.rglob("*.part"))
            assert client.ready()
            client._call("DELETE", f"/jobs/{job['id']}")
            *_, after = client.watch(
                client.create_job({"dataset_id": dataset, "training": {"max_steps": 1}})["id"]
            )
            assert after["status"] == "succeeded"
    finally:
        service.stop()
