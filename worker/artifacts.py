"""Files between the storage and a job's work folder: data sets in, checkpoints both ways, adapters out."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

from core.control import datasets
from core.control.db import reading
from core.control.tables import Adapter, Checkpoint, Dataset, Job, Probe, new_id, utcnow
from core.errors import GraftError, NotFound
from core.hashes import describe, sha256
from core.ml import catalogue
from core.ml.training import checkpoints
from core.ml.training.config import Spec
from core.ml.training.run import Run, Source
from worker.context import Context


def fetch_run(context: Context, asked: Job | Probe, work: Path) -> Run:
    """What a job or a probe asks for, its data sets as files in `work`.

    Raises:
        NotFound: `dataset_not_found`, `model_not_found`.
        GraftError: `dataset_damaged`.
    """
    spec = dict(asked.spec)
    validation = spec.pop("validation", None) or {}
    with reading(context.sessions) as session:
        train = session.get(Dataset, asked.dataset_id)
        valid = session.get(Dataset, validation["dataset_id"]) if validation.get("dataset_id") else None
    if train is None or (validation.get("dataset_id") and valid is None):
        raise NotFound("dataset_not_found", "The data set was deleted.")
    return Run(
        model=catalogue.find(context.catalogue, asked.model),
        spec=Spec.model_validate(spec),
        train=fetch_dataset(context, train, work / "train"),
        valid=fetch_dataset(context, valid, work / "valid") if valid else None,
        fraction=validation.get("fraction"),
        work=work,
    )


def fetch_dataset(context: Context, dataset: Dataset, target: Path) -> Source:
    """Raises GraftError `dataset_damaged` when the stored bytes are not the uploaded ones."""
    context.storage.get(dataset.key, target)
    if sha256(target) != dataset.sha256:
        raise GraftError(
            "dataset_damaged",
            f"The stored file of data set {dataset.id} is not the one that was uploaded.",
        )
    return Source(target, datasets.reading(dataset, datasets.limits(context.settings)))


def fetch_checkpoint(context: Context, row: Checkpoint, folder: Path) -> bool:
    """Bring a checkpoint into `folder`; False when any byte of it is not what was saved."""
    try:
        for info in row.files:
            context.storage.get(f"{row.key}/{info['path']}", folder / info["path"])
    except NotFound:
        return False
    return checkpoints.is_whole(folder, row.files)


def checkpoint_key(job: Job, step: int) -> str:
    # The fence in the key: a zombie can only ever overwrite its own files.
    return f"jobs/{job.id}/checkpoints/{job.fence}-{step}"


def store_checkpoint(context: Context, job: Job, data: dict[str, Any]) -> None:
    folder = Path(data["folder"])
    context.storage.put_folder(
        folder, checkpoint_key(job, data["step"]), [info["path"] for info in data["files"]]
    )
    shutil.rmtree(folder)


def store_adapter(
    context: Context, job: Job, folder: Path, metrics: dict[str, float], work: Path
) -> dict[str, Any]:
    """Store an adapter's files and their zip; the columns of its row are for the caller to insert.

    Raises:
        StorageFull: no room; nothing of the adapter stays.
    """
    files = describe(folder)
    archive = work / "adapter.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:
        for info in files:
            # A fixed date: the same adapter gives the same bytes.
            entry = zipfile.ZipInfo(info["path"], (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with (
                (folder / info["path"]).open("rb") as source,
                target.open(entry, "w", force_zip64=True) as part,
            ):
                shutil.copyfileobj(source, part)
    fields: dict[str, Any] = {
        "id": new_id("ad"),
        "project_id": job.project_id,
        "job_id": job.id,
        "name": job.name,
        "base_model": job.model,
        "size": archive.stat().st_size,
        "sha256": sha256(archive),
        "files": [dict(info) for info in files],
        "metrics": metrics,
        "created_at": utcnow(),
    }
    key = Adapter(**fields).key
    try:
        context.storage.put_folder(folder, f"{key}/files", [info["path"] for info in files])
        context.storage.put(archive, f"{key}/adapter.zip")
        if context.storage.size(f"{key}/adapter.zip") != fields["size"]:
            raise GraftError("storage_damaged", "The storage did not keep the whole adapter.")
    except Exception:
        context.storage.delete(key)
        raise
    return fields
