"""Who answers a request: a base model, an adapter, or the checkpoint of a job that may still be running."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from api.deps import Services, ready_model
from api.engine.client import Target
from core.control import adapters, db, jobs
from core.control.db import Session
from core.control.running import events
from core.control.tables import FINISHED, Checkpoint, Job
from core.errors import Conflict, NotFound, StorageFull, is_disk_full
from core.ml import catalogue
from core.ml import contract as contracts
from core.ml.prompts import Contract
from core.storage import Storage

_CHECKPOINT = re.compile(r"(job_[0-9A-Za-z]+)@(latest|[0-9]{1,9})")
# What ids of adapters and of their jobs begin with.
_TRAINED = ("ad_", "job_")
_PROMPT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", contracts.CONTRACT_FILE)


@dataclass(frozen=True)
class Served:
    """`adapter_id`: an adapter or `job_…@step`, None for the base model; `context`: how many tokens are read."""

    target: Target
    contract: Contract
    context: int | None
    adapter_id: str | None = None

    @property
    def name(self) -> str:
        return self.adapter_id or self.target.base_model


def named(services: Services, project_id: str, name: str, param: str = "model") -> Served:
    """By any of the names: an adapter's id, `job_…@latest` or `@step`, a base model.

    Raises:
        NotFound: there is none of that name.
        GraftError: `model_not_ready`, 503; `contract_broken`.
    """
    if name.startswith(_TRAINED):
        return adapter(services, project_id, name, param)
    return base(services, name, param)


def base(services: Services, name: str | None, param: str = "model") -> Served:
    """A base model, the default one without a name; raises as `named`."""
    if name is not None and name.startswith(_TRAINED):
        raise NotFound(
            "model_not_found",
            f'"{name[:60]}" is no base model.',
            param=param,
            hint="Send an adapter or a checkpoint as adapter_id, and leave model out.",
        )
    with _in_field(param):
        model = ready_model(services, name)
    contract = contracts.load_cached(model.path)
    return Served(Target(model.name, model.name), contract, catalogue.describe(model)["context"])


def adapter(services: Services, project_id: str, name: str, param: str = "adapter_id") -> Served:
    """An adapter by its id, or a checkpoint as `job_…@latest` or `job_…@step`; raises as `named`."""
    with _in_field(param), db.reading(services.sessions) as session:
        if (asked := _CHECKPOINT.fullmatch(name)) is not None:
            job = jobs.get(session, project_id, asked[1])
            row = _checkpoint(session, job, asked[2], param)
            name, model, key = f"{job.id}@{row.step}", job.model, row.key
            weights = next(info["sha256"] for info in row.files if info["path"].endswith(".safetensors"))
            engine_name = f"{name}-{weights[:12]}"
        elif name.startswith("job_"):
            raise NotFound(
                "checkpoint_not_found",
                f'"{name[:60]}" names no checkpoint of a job.',
                hint="Write job_…@latest for its newest checkpoint, or job_…@120 for that of step 120.",
            )
        elif not name.startswith("ad_"):
            raise NotFound(
                "adapter_not_found",
                f'"{name[:60]}" is the id of no adapter, which begins with ad_.',
                hint="GET /adapters lists those of your project. For a base model leave adapter_id out, and send its name "
                "as model; without it, the default one answers.",
            )
        else:
            found = adapters.get(session, project_id, name)
            name, model, key = found.id, found.base_model, f"{found.key}/files"
            engine_name = found.engine_name
    with _in_field(param):
        # The engine would bring the files of the base model here while the client waits.
        base_model = ready_model(services, model)
    _see_files(services, name, key, param)
    folder = services.storage.local(key)
    path = str(folder) if folder else f"{services.storage.url.rstrip('/')}/{key}"
    contract = contracts.load_cached(folder) if folder else _fetched(services.storage, key, engine_name)
    context = catalogue.describe(base_model)["context"]
    return Served(Target(engine_name, model, path), contract, context, name)


@contextmanager
def _in_field(param: str) -> Iterator[None]:
    """Whatever is not found was named in this field of the request."""
    try:
        yield
    except NotFound as error:
        error.param = param
        raise


def _see_files(services: Services, name: str, key: str, param: str) -> None:
    """Raises NotFound `file_missing`, where they are gone from the storage."""
    try:
        services.storage.size(f"{key}/{contracts.CONTRACT_FILE}")
    except NotFound as error:
        checkpoint = name.startswith("job_")
        raise NotFound(
            error.code,
            f"The files of {'checkpoint' if checkpoint else 'adapter'} {name} are not in the storage any more.",
            param=param,
            hint="Checkpoints are replaced while their job runs: @latest finds the newest."
            if checkpoint
            else "Bring them back from a backup of the storage, or train the adapter again.",
        ) from error


def _checkpoint(session: Session, job: Job, step: str, param: str) -> Checkpoint:
    rows = events.checkpoints(session, job.id)
    found = next((row for row in rows if step in ("latest", str(row.step))), None)
    if found is None:
        kept = ", ".join(str(row.step) for row in rows)
        hint: str | None
        if kept:
            what, hint = f"has no checkpoint of step {step}", f"Kept are those of the steps {kept}."
        elif job.status in FINISHED:
            what = f"is {job.status} and has no checkpoint"
            hint = f"Talk to its adapter {job.adapter_id}." if job.adapter_id else None
        else:
            what, hint = "has no checkpoint yet", "checkpoints.every_steps says when one is saved."
        raise NotFound("checkpoint_not_found", f"Job {job.id} {what}.", param=param, hint=hint)
    if job.spec["lora"]["init"] == "pissa":
        raise Conflict(
            "checkpoint_not_servable",
            f"Checkpoints of job {job.id} cannot be talked to: with lora.init pissa they belong to a changed base model.",
            param=param,
            hint="Its adapter, when the job has succeeded, is an ordinary one.",
        )
    return found


@lru_cache(maxsize=256)
def _fetched(storage: Storage, key: str, name: str) -> Contract:
    """From a bucket. What lies under a key is the same for ever under the same name.

    Raises:
        NotFound: `file_missing`.
        StorageFull: no room left.
    """
    try:
        with TemporaryDirectory(prefix=f"{name}-") as folder:
            for file in _PROMPT_FILES:
                storage.get(f"{key}/{file}", Path(folder, file))
            return contracts.load_shared(Path(folder))
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull(f"the prompt contract of {name}") from error
        raise
