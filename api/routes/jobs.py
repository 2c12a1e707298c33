"""Jobs: post, watch, delete."""

import asyncio
import csv
import hashlib
import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BeforeValidator, Field
from starlette.concurrency import run_in_threadpool

from api import intake
from api.deps import CallerDep, PageDep, Services, ServicesDep
from api.requests import StrictRoute
from api.schemas.common import Deleted, Listing
from api.schemas.jobs import LABEL, CheckpointOut, EventOut, JobCreate, JobOut
from core.control import adapters, datasets, db, jobs
from core.control.db import AlreadyThere
from core.control.projects import Caller
from core.control.running import events
from core.control.tables import FINISHED, Job, JobStatus
from core.errors import BadRequest, Conflict, NotFound
from core.ml import catalogue
from core.ml.training.spec import support

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)

_POLL_SECONDS = 0.5
_PING_SECONDS = 15.0
_LOG_BYTES = 64 * 1024
# What a database counts with is no longer.
_DIGITS = 18


@router.post("", status_code=201)
def create(
    body: JobCreate,
    services: ServicesDep,
    caller: CallerDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobOut:
    """Queue a job. It starts as soon as a worker is free, those of a higher priority before it."""
    sha256 = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
    if earlier := _earlier(services, caller, idempotency_key, sha256):
        return earlier
    model, spec = intake.model_and_spec(services, caller.project_id, body)
    catalogue.check(services.catalogue, model)
    try:
        with services.sessions.begin() as session:
            project_id = caller.project_id
            # Held until the job is there: whoever deletes one of them then sees it in use.
            dataset = datasets.get(session, project_id, body.dataset_id, param="dataset_id", to="use")
            if body.validation and body.validation.dataset_id:
                valid = datasets.get(
                    session,
                    project_id,
                    body.validation.dataset_id,
                    param="validation.dataset_id",
                    to="use",
                )
                support.check_kinds(
                    spec.training.loss_on, trained_texts=dataset.is_text, valid_texts=valid.is_text
                )
            if body.continue_from:
                adapters.get(session, project_id, body.continue_from, param="continue_from", to="use")
            job = jobs.create(
                session,
                project_id,
                name=body.name or dataset.name,
                model=model,
                dataset_id=dataset.id,
                spec=body.kept_spec(spec),
                labels=body.metadata,
                priority=body.priority,
                preset=intake.preset_of(body, model, spec, dataset),
            )
            if idempotency_key:
                jobs.remember(session, project_id, idempotency_key, sha256, job.id)
            shown = JobOut.of(session, job)
    except AlreadyThere as error:  # the same key in the same moment: the other one was first
        if earlier := _earlier(services, caller, idempotency_key, sha256):
            return earlier
        raise Conflict(
            "idempotency_conflict",
            "A request with this Idempotency-Key is being worked on.",
            hint="Send it again in a moment.",
        ) from error
    services.sender.send(job.id)
    return shown


@router.get("")
def list_(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    page: PageDep,
    status: JobStatus | None = None,
) -> Listing[JobOut]:
    """Newest first; `metadata[key]=value` selects."""
    labels = {
        name[9:-1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if any(re.fullmatch(LABEL, name) is None for name in labels):
        return Listing(data=[], has_more=False)  # no job can have such a name
    with db.reading(services.sessions) as session:
        rows = jobs.page(
            session,
            caller.project_id,
            limit=page.limit,
            after=page.after,
            status=status,
            labels=labels,
        )
        return Listing.of(JobOut.page(session, rows), page.limit)


@router.get("/{job_id}")
def get(job_id: str, services: ServicesDep, caller: CallerDep) -> JobOut:
    with db.reading(services.sessions) as session:
        job = jobs.get(session, caller.project_id, job_id)
        return JobOut.of(session, job)


@router.delete("/{job_id}")
def delete(job_id: str, services: ServicesDep, caller: CallerDep, adapter: bool = False) -> Deleted:
    """Delete a finished job, its events, metrics, logs and checkpoints; its adapter stays unless `adapter=true`."""
    with services.sessions.begin() as session:
        keys = jobs.remove(session, caller.project_id, job_id, with_adapter=adapter)
    for key in keys:
        services.storage.delete(key)
    return Deleted(id=job_id)


@router.get("/{job_id}/events", response_model=Listing[EventOut])
def list_events(
    job_id: str,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    page: PageDep,
    last_event_id: Annotated[
        # Browsers send an empty one before the first event.
        Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(lambda given: given or None), Header()
    ] = None,
) -> Any:
    """Newest first; with `Accept: text/event-stream` as they happen, after `Last-Event-ID`."""
    with db.reading(services.sessions) as session:
        job = jobs.get(session, caller.project_id, job_id)
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(
                _follow(services, job.id, last_event_id or 0),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        before = _number(page.after, "the id of an event")
        rows = events.page(session, job.id, limit=page.limit, before=before)
        return Listing.of([EventOut.of(row) for row in rows], page.limit)


@router.get("/{job_id}/metrics", response_model=None)
def metrics(
    job_id: str,
    services: ServicesDep,
    caller: CallerDep,
    format: Annotated[str, Query(pattern="^(json|csv)$")] = "json",
    points: Annotated[int | None, Query(ge=2, le=10_000)] = None,
) -> dict[str, Any] | Response:
    """The values of every step; `points` thins them out evenly, first and last kept."""
    with db.reading(services.sessions) as session:
        job = jobs.get(session, caller.project_id, job_id)
        rows = [{"step": step, **values} for step, values in events.metrics(session, job.id, points)]
    if format == "json":
        return {"object": "list", "data": rows, "has_more": False}
    names = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return Response(text.getvalue(), media_type="text/csv")


@router.get("/{job_id}/checkpoints")
def checkpoints(
    job_id: str, services: ServicesDep, caller: CallerDep, page: PageDep
) -> Listing[CheckpointOut]:
    """Newest first; `after` is the step of one."""
    before = _number(page.after, "the step of a checkpoint")
    with db.reading(services.sessions) as session:
        job = jobs.get(session, caller.project_id, job_id)
        rows = events.checkpoints(session, job.id)
        best = events.best(rows)
        found = [
            CheckpointOut.of(row, best=row is best) for row in rows if before is None or row.step < before
        ]
        return Listing.of(found, page.limit)


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
def logs(job_id: str, services: ServicesDep, caller: CallerDep) -> StreamingResponse:
    """What the worker and the trainer wrote about the job, attempt by attempt; of a running one some seconds old."""
    with db.reading(services.sessions) as session:
        job = jobs.get(session, caller.project_id, job_id)

    def content() -> Iterator[bytes]:
        for fence in range(1, job.fence + 1):
            # One that never came to write, or whose worker was lost before it could.
            with suppress(NotFound), services.storage.open(jobs.log_key(job.id, fence)) as file:
                yield from iter(lambda: file.read(_LOG_BYTES), b"")

    return StreamingResponse(content(), media_type="text/plain; charset=utf-8")


def _number(after: str | None, what: str) -> int | None:
    """Where a page begins in a list that goes by numbers."""
    if after is None:
        return None
    if not (after.isdecimal() and len(after) <= _DIGITS):
        raise BadRequest("invalid_request", f'The field "after" must be {what}.', param="after")
    return int(after)


def _earlier(services: Services, caller: Caller, key: str | None, sha256: str) -> JobOut | None:
    """The job that the same request made before, if it came with a key."""
    if key is None:
        return None
    with db.reading(services.sessions) as session:
        job = jobs.replay(session, caller.project_id, key, sha256)
        return JobOut.of(session, job) if job else None


async def _follow(services: Services, job_id: str, last: int) -> AsyncIterator[str]:
    """Events as server-sent events, until the job has ended and all of them are sent."""

    def read() -> tuple[list[EventOut], bool]:
        with db.reading(services.sessions) as session:
            job = session.get(Job, job_id)
            over = job is None or job.status in FINISHED
            return [EventOut.of(row) for row in events.after(session, job_id, last)], over

    quiet = 0.0
    while True:
        found, over = await run_in_threadpool(read)
        for event in found:
            last = event.id
            yield f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(event.model_dump(mode='json'))}\n\n"
        if over and not found:
            return
        quiet = 0.0 if found else quiet + _POLL_SECONDS
        if quiet >= _PING_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(0 if found else _POLL_SECONDS)
