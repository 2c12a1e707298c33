"""Exports of adapters: ask for one, list, download. And a training job as a script for another tool."""

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response

from api.deps import CallerDep, PageDep, Services, ServicesDep
from api.files import respond
from api.requests import StrictRoute
from api.schemas.common import Listing
from api.schemas.exports import ExportCreate, ExportOut
from api.schemas.jobs import JobOut
from core.control import db, exports, jobs
from core.control.db import AlreadyThere
from core.control.projects import Caller
from core.control.tables import Dataset, Export, JobKind
from core.errors import Conflict
from core.ml.export.scripts import written as scripts
from core.ml.export.scripts.recipe import Data

router = APIRouter(tags=["exports"], route_class=StrictRoute)


@router.post("/adapters/{adapter_id}/export", status_code=201)
def create(
    adapter_id: str,
    body: ExportCreate,
    services: ServicesDep,
    caller: CallerDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobOut:
    """Queue a job that writes the adapter in another form; its exports are listed when it has succeeded."""
    try:
        shown, is_new = _ask(services, caller, adapter_id, body, idempotency_key)
    except AlreadyThere:  # the same key in the same moment: the other one was first, and is found now
        shown, is_new = _ask(services, caller, adapter_id, body, idempotency_key)
    if is_new:
        services.sender.send(shown.id)
    return shown


@router.get("/adapters/{adapter_id}/exports")
def list_(adapter_id: str, services: ServicesDep, caller: CallerDep, page: PageDep) -> Listing[ExportOut]:
    with db.reading(services.sessions) as session:
        rows = exports.page(session, caller.project_id, adapter_id, limit=page.limit, after=page.after)
        return Listing.of([ExportOut.of(row) for row in rows], page.limit)


@router.get("/adapters/{adapter_id}/exports/{export_id}")
def get(adapter_id: str, export_id: str, services: ServicesDep, caller: CallerDep) -> ExportOut:
    return ExportOut.of(_get(services, caller.project_id, adapter_id, export_id))


@router.head("/adapters/{adapter_id}/exports/{export_id}/download", include_in_schema=False)
@router.get("/adapters/{adapter_id}/exports/{export_id}/download")
def download(
    adapter_id: str, export_id: str, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """One zip: a folder that transformers loads, or a GGUF file with its Modelfile."""
    row = _get(services, caller.project_id, adapter_id, export_id)
    return respond(
        services,
        request,
        row.archive,
        filename=f"{row.id}-{row.format}.zip",
        etag=row.sha256,
        media_type="application/zip",
        modified=row.created_at,
    )


@router.get("/jobs/{job_id}/script")
def script(
    job_id: str,
    services: ServicesDep,
    caller: CallerDep,
    tool: Annotated[Literal["trl", "axolotl", "llamafactory"], Query(alias="as")],
) -> Response:
    """The same training for another tool: a Python script for TRL, YAML for axolotl and LLaMA-Factory."""
    with db.reading(services.sessions) as session:
        job = jobs.get(session, caller.project_id, job_id)
        dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    if job.kind is not JobKind.TRAIN:
        raise Conflict("not_a_training", f"Job {job.id} is of kind {job.kind}; only a training has a script.")
    data = Data(
        str(job.dataset_id),
        dataset.filename if dataset else None,
        is_text=dataset is not None and dataset.is_text,
    )
    text = scripts.write(tool, job.id, job.model, job.spec, data)
    return Response(text, media_type="text/x-python" if tool == "trl" else "application/yaml")


def _ask(
    services: Services, caller: Caller, adapter_id: str, body: ExportCreate, key: str | None
) -> tuple[JobOut, bool]:
    with services.sessions.begin() as session:
        job, is_new = exports.ask(session, caller.project_id, adapter_id, body.format, idempotency_key=key)
        return JobOut.of(session, job), is_new


def _get(services: Services, project_id: str, adapter_id: str, export_id: str) -> Export:
    with db.reading(services.sessions) as session:
        return exports.get(session, project_id, adapter_id, export_id)
