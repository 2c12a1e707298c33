"""An export job: an adapter's files brought here, written in another form by a child process, and published."""

import shutil
from pathlib import Path
from typing import Any

from core.control.db import Session, reading
from core.control.running import attempts
from core.control.tables import Adapter, Dataset, Export, Job, new_id, utcnow
from core.errors import GraftError, NotFound
from core.hashes import describe, sha256
from core.ml import catalogue
from core.ml.export import run as runs
from core.ml.quantization import Quantization
from core.ml.training.run import Source
from worker.attempt import artifacts
from worker.attempt.reports import Attempt
from worker.attempt.supervise import insert, see_through
from worker.context import Context


def make(context: Context, attempt: Attempt) -> bool:
    """Export an adapter and publish it; False: `attempt.outcome` tells what came instead. Always from the start."""
    run = _inputs(context, attempt)
    kind, done = see_through(context, attempt, "export", run, attempt.job.id)
    if kind != "done":
        return False
    publish(context, attempt, Path(done["folder"]), done["report"])
    return True


def _inputs(context: Context, attempt: Attempt) -> runs.Export:
    """The adapter and the rows that it was trained on, as files on this machine.

    Raises:
        NotFound: `adapter_not_found`, `model_not_found`.
        GraftError: `adapter_damaged`.
    """
    job, work = attempt.job, attempt.work
    asked = job.spec["export"]
    with reading(context.sessions) as session:
        adapter = session.get(Adapter, asked["adapter_id"])
        trained = session.get(Job, adapter.job_id) if adapter and adapter.job_id else None
        dataset = session.get(Dataset, trained.dataset_id) if trained and trained.dataset_id else None
    if adapter is None or adapter.project_id != job.project_id:
        raise NotFound("adapter_not_found", f"Adapter {asked['adapter_id']} was deleted.")
    return runs.Export(
        name=adapter.name,
        model=catalogue.find(context.catalogue, adapter.base_model),
        adapter=artifacts.fetch_files(context, adapter, work / "adapter"),
        format=asked["format"],
        quantization=_held(adapter, trained),
        rows=_rows(context, dataset, work / "rows") if dataset else None,
        work=work,
    )


def _held(adapter: Adapter, trained: Job | None) -> Quantization:
    """How the base was held in the training, by the certificate, which stays when the job is deleted, or by the job."""
    known = ((adapter.certificate or {}).get("spec") or (trained.spec if trained else {})).get("quantization")
    # Where nobody knows, the export is compared with the 16-bit base alone.
    return Quantization.model_validate(known or {"bits": 16})


def _rows(context: Context, dataset: Dataset, target: Path) -> Source | None:
    """They only make the comparison better: without them it is on prompts of our own."""
    try:
        return artifacts.fetch_dataset(context, dataset, target)
    except GraftError:
        return None


def publish(context: Context, attempt: Attempt, folder: Path, report: dict[str, Any]) -> None:
    """Store the archive once, then insert its row and end the job, as often as the database needs."""
    job = attempt.job
    fields = store(context, job, folder, report, attempt.work)
    spec = job.spec | {"export": job.spec["export"] | {"export_id": fields["id"]}}

    def tell(session: Session) -> None:
        attempts.renew(session, job.id, job.fence, context.settings.lease_seconds, spec=spec)

    insert(context, job, lambda: Export(**fields), tell)


def store(context: Context, job: Job, folder: Path, report: dict[str, Any], work: Path) -> dict[str, Any]:
    """Store the archive of an export; the columns of its row are for the caller to insert.

    Raises:
        StorageFull: no room; nothing of the export stays.
    """
    files = describe(folder)
    archive = work / "export.zip"
    artifacts.pack(folder, [info["path"] for info in files], archive)
    shutil.rmtree(folder)  # gigabytes, and all of them in the archive
    fields: dict[str, Any] = {
        "id": new_id("exp"),
        "adapter_id": job.spec["export"]["adapter_id"],
        "job_id": job.id,
        "format": job.spec["export"]["format"],
        "size": archive.stat().st_size,
        "sha256": sha256(archive),
        "files": [dict(info) for info in files],
        "report": report,
        "created_at": utcnow(),
    }
    row = Export(**fields)
    with artifacts.kept_whole(context, row.key, archive):
        context.storage.put(archive, row.archive)
    return fields
