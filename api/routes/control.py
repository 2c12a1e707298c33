"""What a client may ask of a job that is there: pause, resume, cancel, retry. All of it can be asked twice."""

from fastapi import APIRouter

from api import intake
from api.deps import CallerDep, ServicesDep
from api.requests import StrictRoute
from api.schemas.changes import JobRetry
from api.schemas.jobs import JobOut
from core.control import jobs
from core.control.tables import JobStatus

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)


@router.post("/{job_id}/pause")
def pause(job_id: str, services: ServicesDep, caller: CallerDep) -> JobOut:
    """Save a checkpoint after the current step and free the device, until the job is resumed."""
    with services.sessions.begin() as session:
        job = jobs.pause(session, caller.project_id, job_id)
        return JobOut.of(session, job)


@router.post("/{job_id}/resume")
def resume(job_id: str, services: ServicesDep, caller: CallerDep) -> JobOut:
    """Queue a paused job again. One that is only about to pause goes on."""
    with services.sessions.begin() as session:
        job = jobs.resume(session, caller.project_id, job_id)
        shown = JobOut.of(session, job)
    if job.status == JobStatus.QUEUED:
        services.sender.send(job.id)
    return shown


@router.post("/{job_id}/cancel")
def cancel(job_id: str, services: ServicesDep, caller: CallerDep) -> JobOut:
    """Stop after the current step. Cancelling a cancelled job changes nothing."""
    with services.sessions.begin() as session:
        job = jobs.cancel(session, caller.project_id, job_id)
        return JobOut.of(session, job)


@router.post("/{job_id}/retry")
def retry(job_id: str, services: ServicesDep, caller: CallerDep, body: JobRetry | None = None) -> JobOut:
    """A new attempt of a failed or cancelled job, from its last checkpoint where that fits the changes."""
    changes = body.given() if body else {}
    with services.sessions.begin() as session:
        job = jobs.retry(session, caller.project_id, job_id, changes)
        if "lora" in changes:
            intake.check_modules(services, job.model, job.spec["lora"]["target_modules"])
        shown = JobOut.of(session, job)
    if job.status == JobStatus.QUEUED:
        services.sender.send(job.id)
    return shown
