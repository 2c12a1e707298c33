"""The worker's part of an export, without a child process."""

from pathlib import Path
from typing import Any

import pytest

from core.control import exports
from core.control.running import attempts
from core.control.tables import Adapter, Export, JobStatus
from core.errors import Fenced, GraftError, NotFound
from core.hashes import describe
from tests.control import rows
from worker import export
from worker.attempt.reports import Attempt
from worker.context import Context


@pytest.fixture
def adapter(context: Context, project_id: str, tmp_path: Path) -> Adapter:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    trained = rows.job(
        context.sessions, project_id, dataset_id=None, spec={"quantization": {"bits": 8}, "validation": None}
    )
    row = rows.adapter(project_id, trained.id, files=[dict(info) for info in describe(folder)])
    context.storage.put_folder(folder, f"{row.key}/files", ["adapter_model.safetensors"])
    with context.sessions.begin() as session:
        session.add(row)
    return row


@pytest.fixture
def attempt(context: Context, project_id: str, adapter: Adapter) -> Attempt:
    with context.sessions.begin() as session:
        job, _ = exports.ask(session, project_id, adapter.id, "merged", idempotency_key=None)
    held = rows.claimed(context.sessions, job.id)
    return Attempt(held, context.settings.scratch / held.id / "1")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_child_gets_the_adapter_and_how_its_base_was_held(context: Context, attempt: Attempt) -> None:
    run = export._inputs(context, attempt)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (run.format, run.quantization.bits, run.rows) == ("merged", 8, None)


@pytest.mark.parametrize(("certificate", "bits"), [({"spec": {"quantization": {"bits": 8}}}, 8), (None, 16)])
def test_when_the_training_was_deleted_the_certificate_says_how_the_base_was_held(
    context: Context, attempt: Attempt, adapter: Adapter, certificate: dict[str, Any] | None, bits: int
) -> None:
    with context.sessions.begin() as session:
        row = session.get_one(Adapter, adapter.id)
        row.job_id, row.certificate = None, certificate
    assert export._inputs(context, attempt).quantization.bits == bits


def test_an_adapter_that_is_damaged_or_gone_is_not_exported(
    context: Context, attempt: Attempt, adapter: Adapter
) -> None:
    stored = context.storage.local(f"{adapter.key}/files/adapter_model.safetensors")
    assert stored is not None
    stored.write_bytes(b"others")
    with pytest.raises(GraftError, match="is not the one that was made"):
        export._inputs(context, attempt)
    with context.sessions.begin() as session:
        session.delete(session.get_one(Adapter, adapter.id))
    with pytest.raises(NotFound):
        export._inputs(context, attempt)


def test_a_finished_export_is_stored_and_its_job_says_which(
    context: Context, attempt: Attempt, adapter: Adapter, finished: Path
) -> None:
    attempt.work.mkdir(parents=True)
    export.publish(context, attempt, finished, {"degraded": False})
    job = rows.read(context.sessions, attempt.job.id)
    assert (job.status, job.adapter_id) == (JobStatus.SUCCEEDED, None)
    with context.sessions() as session:
        row = session.get_one(Export, job.spec["export"]["export_id"])
    assert (row.adapter_id, row.job_id, row.report) == (adapter.id, job.id, {"degraded": False})
    assert context.storage.size(row.archive) == row.size


@pytest.mark.parametrize("why", ["lease", "adapter"])
def test_an_export_that_nobody_waits_for_any_more_leaves_no_files(
    context: Context, attempt: Attempt, adapter: Adapter, finished: Path, why: str
) -> None:
    attempt.work.mkdir(parents=True)
    with context.sessions.begin() as session:
        if why == "lease":
            attempts.release(session, attempt.job.id, attempt.job.fence, "taken")
        else:
            session.delete(session.get_one(Adapter, adapter.id))
    with pytest.raises(Fenced if why == "lease" else Exception):
        export.publish(context, attempt, finished, {})
    left = context.storage.local(f"{adapter.key}/exports")
    assert left is not None
    assert [path for path in left.rglob("*") if path.is_file()] == []
