"""What a job would do, before it is posted: its rows counted here, its steps measured by a free worker."""

import dataclasses
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from api import intake
from api.deps import CallerDep, Services, ServicesDep, ready_model
from api.requests import StrictRoute
from api.schemas.jobs import JobCreate
from api.schemas.preflight import MemoryOut, PreflightOut, Problem, RowsOut, TokensOut
from api.schemas.presets import JobPreset
from core.control import adapters, datasets, db, queue
from core.control.projects import Caller
from core.control.running import probes, workers
from core.control.tables import Dataset
from core.errors import BadRequest, GraftError
from core.ml import catalogue
from core.ml import contract as contracts
from core.ml.training import config, data, plan
from core.ml.training.data import Rows
from core.ml.training.plan import Device, Plan
from core.ml.training.run import Run, Source, Trained
from core.ml.training.spec import memory

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)

_POLL_SECONDS = 0.2
# A request that takes longer is given up by many clients and proxies.
_COUNT_SECONDS = 60.0
# Each holds one of the threads that every request needs, for minutes.
_MOST = 4
_places = threading.BoundedSemaphore(_MOST)


@router.post("/preflight")
def preflight(body: JobCreate, services: ServicesDep, caller: CallerDep) -> PreflightOut:
    """Count what a job with this body would train, drop and cut; measure its memory and time where a worker is free.

    Nothing is kept. What would make the job fail is listed in `problems`, with the codes a job would fail with.
    """
    if not _places.acquire(blocking=False):
        raise GraftError(
            "too_many_preflights",
            f"{_MOST} preflights are being worked on already.",
            status=429,
            hint="Send it again when one of them has been answered.",
        )
    try:
        return _preflight(body, services, caller)
    finally:
        _places.release()


def _preflight(body: JobCreate, services: Services, caller: Caller) -> PreflightOut:
    validation = body.validation
    with db.reading(services.sessions) as session:
        train = datasets.get(session, caller.project_id, body.dataset_id, param="dataset_id")
        valid = None
        if validation and validation.dataset_id:
            valid = datasets.get(
                session, caller.project_id, validation.dataset_id, param="validation.dataset_id"
            )
        earlier: tuple[Trained, ...] = ()
        if body.continue_from:
            start = adapters.get(session, caller.project_id, body.continue_from, param="continue_from")
            earlier = adapters.trained_on(start)
        device = workers.device(session)
    model, asked = intake.model_and_spec(services, caller.project_id, body)
    base, spec = ready_model(services, model), config.settle(asked)
    preset = intake.preset_of(body, model, asked, train)
    answer = PreflightOut(
        ok=True,
        problems=[],
        model=base.name,
        preset=JobPreset.model_validate(preset) if preset else None,
        dataset_id=train.id,
        spec=spec.model_dump(),
    )
    planned = None
    with tempfile.TemporaryDirectory(dir=services.settings.uploads) as folder:
        run = Run(
            model=base,
            spec=spec,
            train=_fetched(services, train, Path(folder) / "train"),
            valid=_fetched(services, valid, Path(folder) / "valid") if valid else None,
            fraction=validation.fraction if validation else None,
            work=Path(folder),
            earlier=earlier,
        )
        try:
            rows = data.rows_of(
                run,
                contracts.load_cached(base.path),
                context=catalogue.context(base),
                count_until=time.monotonic() + _COUNT_SECONDS,
            )
        except BadRequest as error:
            answer.problems = [Problem.of(error)]
        except TimeoutError:
            answer.not_measured = (
                f"The rows are so many or so long that they are not counted within {_COUNT_SECONDS:g} s."
            )
            return answer
        else:
            _count(answer, run, rows)
            if device is not None and not answer.problems:
                try:
                    planned = _reckon(answer, run, rows, device)
                except BadRequest as error:
                    answer.problems = [Problem.of(error)]
    if answer.problems:
        answer.ok, answer.not_measured = False, "The job would fail."
    else:
        _measure(services, body.kept_spec(asked), answer)
        if answer.ok and answer.seconds_per_step is None and planned is not None:
            _by_earlier_jobs(services, answer, planned, rows)
    return answer


def _fetched(services: Services, row: Dataset, file: Path) -> Source:
    services.storage.get(row.key, file)
    return Source(file, datasets.reading(row, datasets.limits(services.settings)))


def _count(answer: PreflightOut, run: Run, rows: Rows) -> None:
    answer.problems = [Problem.of(problem) for problem in data.problems(rows, run)]
    counts = plan.counts(rows)
    answer.rows = RowsOut(
        used=counts["rows"],
        validation=counts["validation_rows"],
        **{name: lines for name, lines in counts.items() if isinstance(lines, dict)},
    )
    answer.tokens = TokensOut(
        total=sum(rows.data.lengths), trained=rows.data.trained_tokens, longest=rows.data.longest
    )
    if rows.train:
        answer.spec = plan.resolved(run.spec, rows).model_dump()
        answer.total_steps = plan.total_steps(run.spec, plan.trained_rows(run.spec, rows))


def _reckon(answer: PreflightOut, run: Run, rows: Rows, device: dict[str, Any]) -> Plan:
    """The plan for the device that a worker has told of, before anything is measured there."""
    known = {field.name: device[field.name] for field in dataclasses.fields(Device) if field.name in device}
    if run.spec.quantization.compute_dtype != "auto":
        known["compute_dtype"] = run.spec.quantization.compute_dtype
    shape = memory.shape_of(catalogue.configuration(run.model))
    planned = plan.made(run.spec, rows, Device(**known), shape)
    answer.spec, answer.total_steps = planned.spec.model_dump(), planned.total_steps
    answer.device = device["name"]
    if planned.memory_bytes is not None:
        answer.memory = MemoryOut(
            needed_bytes=planned.memory_bytes, present_bytes=device["free_bytes"], measured=False
        )
    return planned


def _measure(services: Services, spec: dict[str, Any], answer: PreflightOut) -> None:
    """Ask a worker to take a few steps, and write what it says into the answer."""
    with services.sessions.begin() as session:
        if not probes.device_is_free(session):
            answer.not_measured = "No worker is free."
            return
        probe_id = probes.ask(session, model=answer.model, dataset_id=answer.dataset_id, spec=spec)
    services.sender.send(probe_id, queue.PROBE)
    found = _wait(services, probe_id)
    if error := found.get("error"):
        answer.ok, answer.not_measured = False, "The job would fail."
        answer.problems = [Problem(**error)]
    elif measured := found.get("measured"):
        answer.spec, answer.total_steps = measured["spec"], measured["total_steps"]
        answer.device = measured["device"]
        answer.memory = MemoryOut(
            needed_bytes=measured["memory_needed_bytes"],
            present_bytes=measured["memory_present_bytes"],
            measured=True,
        )
        answer.seconds_per_step = measured["seconds_per_step"]
        answer.eta_seconds = measured["load_seconds"] + measured["training_seconds"]
    else:
        answer.not_measured = found["unknown"]


def _by_earlier_jobs(services: Services, answer: PreflightOut, planned: Plan, rows: Rows) -> None:
    """The seconds that it takes if it goes as earlier runs alike did."""
    tokens = plan.tokens_of_step(planned.spec, rows)
    with db.reading(services.sessions) as session:
        pace = probes.experience(session, answer.model, answer.spec, tokens)
    if pace is None:
        return
    evaluations, _ = plan.pauses(planned, rows)
    answer.seconds_per_step = tokens / pace.steps
    answer.eta_seconds = (
        planned.total_steps * answer.seconds_per_step + (evaluations or planned.total_steps) * pace.pause
    )
    if evaluations:
        answer.eta_seconds += evaluations * plan.validation_tokens(rows) / pace.evaluation


def _wait(services: Services, probe_id: str) -> dict[str, Any]:
    until = time.monotonic() + probes.PATIENCE_SECONDS
    try:
        while time.monotonic() < until:
            with db.reading(services.sessions) as session:
                if (found := probes.answered(session, probe_id)) is not None:
                    return found
            time.sleep(_POLL_SECONDS)
    finally:
        with services.sessions.begin() as session:
            probes.forget(session, probe_id)
    return {"unknown": f"No worker answered within {probes.PATIENCE_SECONDS:g} seconds."}
