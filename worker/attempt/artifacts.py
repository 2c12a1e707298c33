"""Files between the storage and a job's work folder: data sets in, checkpoints both ways, adapters out."""

import logging
import shutil
import zipfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core import log
from core.control import adapters, datasets, jobs
from core.control.db import reading
from core.control.tables import Adapter, Checkpoint, Dataset, Job, Probe, new_id, utcnow
from core.errors import GraftError, NotFound
from core.hashes import describe, sha256
from core.ml import catalogue
from core.ml.training.config import Spec
from core.ml.training.files import checkpoints
from core.ml.training.run import Run, Source, Trained
from worker.context import Context

logger = logging.getLogger(__name__)

# What a training needs of an adapter to continue from.
_BEGINNING = ("adapter_config.json", "adapter_model.safetensors")


def fetch_run(context: Context, asked: Job | Probe, work: Path) -> Run:
    """What a job or a probe asks for, its data sets and the adapter it begins with as files in `work`.

    Raises:
        NotFound: `dataset_not_found`, `adapter_not_found`, `model_not_found`.
        GraftError: `dataset_damaged`, `adapter_damaged`.
    """
    spec = dict(asked.spec)
    validation = spec.pop("validation", None) or {}
    with reading(context.sessions) as session:
        train = session.get(Dataset, asked.dataset_id)
        valid = session.get(Dataset, validation["dataset_id"]) if validation.get("dataset_id") else None
    if train is None or (validation.get("dataset_id") and valid is None):
        raise NotFound("dataset_not_found", "The data set was deleted.")
    begin = spec.get("continue_from")
    start, earlier = fetch_adapter(context, asked, begin, work / "start") if begin else (None, ())
    return Run(
        model=catalogue.find(context.catalogue, asked.model),
        spec=Spec.model_validate(spec),
        train=fetch_dataset(context, train, work / "train"),
        valid=fetch_dataset(context, valid, work / "valid") if valid else None,
        fraction=validation.get("fraction"),
        work=work,
        start=start,
        earlier=earlier,
        recoveries=tuple(asked.recoveries) if isinstance(asked, Job) else (),
        processes=context.settings.trainer_processes,
        sharding=context.settings.trainer_sharding,
    )


def fetch_adapter(
    context: Context, asked: Job | Probe, adapter_id: str, folder: Path
) -> tuple[Path, tuple[Trained, ...]]:
    """The weights and the configuration of an adapter to continue from, and what it was trained on.

    Raises:
        NotFound: `adapter_not_found`, for another project's adapter too.
        GraftError: `adapter_damaged`.
    """
    with reading(context.sessions) as session:
        row = session.get(Adapter, adapter_id)
    # A probe belongs to no project: the API looked the adapter up in the caller's before it asked.
    if row is None or (isinstance(asked, Job) and row.project_id != asked.project_id):
        raise NotFound(
            "adapter_not_found",
            f"The adapter {adapter_id}, from which this job was to continue, is not there any more.",
            hint="Post a job that continues from another adapter, or from none.",
        )
    return fetch_files(context, row, folder, _BEGINNING), adapters.trained_on(row)


def fetch_files(context: Context, row: Adapter, folder: Path, names: Container[str] | None = None) -> Path:
    """Bring an adapter's files here, or those of these names.

    Raises:
        GraftError: `adapter_damaged`.
    """
    for info in row.files:
        if names is not None and info["path"] not in names:
            continue
        context.storage.get(f"{row.key}/files/{info['path']}", folder / info["path"])
        if sha256(folder / info["path"]) != info["sha256"]:
            raise GraftError(
                "adapter_damaged",
                f"The stored {info['path']} of adapter {row.id} is not the one that was made.",
                hint="Use another adapter, or train this one again.",
            )
    return folder


def dataset_names(context: Context, job: Job) -> dict[str, str]:
    """Those of `dataset` and `validation`, as far as the job has them."""
    ids = {"dataset": job.dataset_id, "validation": (job.spec.get("validation") or {}).get("dataset_id")}
    with reading(context.sessions) as session:
        found = {part: session.get(Dataset, id_) for part, id_ in ids.items() if id_}
    return {part: dataset.name for part, dataset in found.items() if dataset is not None}


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


def store_log(context: Context, job: Job, work: Path) -> None:
    """Store the job's log as far as it is written. A log that cannot be stored is no reason to end a job."""
    copy = work / f"{log.FILE}.copy"  # the storage may keep a second name of what it gets, and the log grows
    try:
        shutil.copyfile(work / log.FILE, copy)
        context.storage.put(copy, jobs.log_key(job.id, job.fence))
    except Exception:
        logger.exception("the log is not stored")
    finally:
        copy.unlink(missing_ok=True)


def pack(folder: Path, paths: list[str], archive: Path) -> None:
    """One zip of the files, stored as they are; a fixed date, so that the same files give the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:
        for path in paths:
            entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with (
                (folder / path).open("rb") as source,
                target.open(entry, "w", force_zip64=True) as part,
            ):
                shutil.copyfileobj(source, part)


def store_adapter(
    context: Context, job: Job, folder: Path, metrics: dict[str, float], work: Path
) -> dict[str, Any]:
    """Store an adapter's files and their zip; the columns of its row are for the caller to insert.

    Raises:
        StorageFull: no room; nothing of the adapter stays.
    """
    files = describe(folder)
    archive = work / "adapter.zip"
    pack(folder, [info["path"] for info in files], archive)
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
    with kept_whole(context, key, archive):
        context.storage.put_folder(folder, f"{key}/files", [info["path"] for info in files])
        context.storage.put(archive, f"{key}/{archive.name}")
    return fields


@contextmanager
def kept_whole(context: Context, key: str, archive: Path) -> Iterator[None]:
    """What the block stores under `key` is all there, the archive with every byte, or nothing of it stays."""
    try:
        yield
        if context.storage.size(f"{key}/{archive.name}") != archive.stat().st_size:
            raise GraftError("storage_damaged", f"The storage did not keep the whole {archive.name}.")
    except Exception:
        context.storage.delete(key)
        raise
