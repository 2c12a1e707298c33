"""A preflight on a whole service: what it measures is what the job then takes."""

from pathlib import Path

import pytest

from tests.e2e.conftest import MESSAGES
from tests.service import Service

# The main job runs on the other kind of servers, too.
pytestmark = pytest.mark.parametrize("service", ["postgres and s3"], indirect=True)
SPEC = {"training": {"max_steps": 6, "effective_batch_size": 8}}


def test_a_free_worker_measures_and_keeps_nothing(service: Service, rows_file: Path) -> None:
    with service.client() as client:
        dataset_id = client.upload(rows_file)["id"]
        body = {"dataset_id": dataset_id, **SPEC}
        found = client.preflight(body)
        assert (found["ok"], found["not_measured"]) == (True, None), found
        assert (found["rows"]["used"], found["total_steps"]) == (len(MESSAGES), 6)
        assert 0 < found["memory"]["needed_bytes"] < found["memory"]["present_bytes"]
        assert found["device"].startswith("CPU, ")
        assert found["eta_seconds"] > 6 * found["seconds_per_step"] > 0
        assert client.jobs() == []
        assert list((service.home / "runs").iterdir()) == []
        *_, job = client.watch(client.create_job(body)["id"])
        assert job["status"] == "succeeded"
        assert job["spec"] == found["spec"]
        assert job["progress"]["total_steps"] == found["total_steps"]
