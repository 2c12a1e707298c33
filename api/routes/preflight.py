"""What a job would do, before it is posted: its rows counted here, its steps measured by a free worker."""

import tempfile
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from api.deps import CallerDep, Services, ServicesDep, ready_model
from api.requests import StrictRoute
from api.schemas.jobs import JobCreate
from api.schemas.preflight import MemoryOut, PreflightOut, Problem, RowsOut, TokensOut
from core.control import datasets, db, probes, queue
from core.control.tables import Dataset
from core.errors import BadRequest
from core.ml import catalogue
from core.ml import contract as contracts
from core.ml.training import data, plan
from core.ml.training.data import Rows
from core.ml.training.run import Run, Source

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)

_POLL_SECONDS = 0.2
# A request that takes longer is given up by many clients and proxies.
_COUNT_SECONDS = 60.0


@router.post("/preflight")
def preflight(body: JobCreate, services: ServicesDep, caller: CallerDep) -> PreflightOut:
    """Count what a job with this body would train, drop and cut; measure its memory and time where a worker is free.

    Nothing is kept. What would make the job fail is listed in `problems`, with the codes a job would fail with.
    """
    validation = body.validation
    with db.reading(services.sessions) as session:
        train = datasets.get(session, caller.project_id, body.dataset_id, param="dataset_id")
        valid = None
        if validation and validation.dataset_id:
            valid = datasets.get(
                session, caller.project_id, validation.dataset_id, param="validation.dataset_id"
            )
    base = ready_model(services, body.model)
    answer = PreflightOut(
        ok=True, problems=[], model=base.name, dataset_id=train.id, spec=body.settled().model_dump()
    )
    with tempfile.TemporaryDirectory(dir=services.settings.uploads) as folder:
        run = Run(
            model=base,
            spec=body.settled(),
            train=_fetched(services, train, Path(folder) / "train"),
            valid=_fetched(services, valid, Path(folder) / "valid") if valid else None,
            fraction=validation.fraction if validation else None,
            work=Path(folder),
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
    if answer.problems:
        answer.ok, answer.not_measured = False, "The job would fail."
    else:
        _measure(services, body, answer)
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
        **{kind: counts[kind] for kind in ("dropped", "truncated", "in_both")},
    )
    answer.tokens = TokensOut(
        total=sum(rows.data.lengths), trained=rows.data.trained_tokens, longest=rows.data.longest
    )
    if rows.train:
        answer.spec = plan.resolved(run.spec, rows).model_dump()
        answer.total_steps = plan.total_steps(run.spec, len(rows.train))


def _measure(services: Services, body: JobCreate, answer: PreflightOut) -> None:
    """Ask a worker to take a few steps, and write what it says into the answer."""
    with services.sessions.begin() as session:
        if not probes.device_is_free(session):
            answer.not_measured = "No worker is free."
            return
        probe_id = probes.ask(
            session, model=answer.model, dataset_id=answer.dataset_id, spec=body.kept_spec()
        )
    services.sender.send(probe_id, queue.PROBE)
    found = _wait(services, probe_id)
    if error := found.get("error"):
        answer.ok, answer.not_measured = False, "The job would fail."
        answer.problems = [Problem(**error)]
    elif measured := found.get("measured"):
        answer.spec = measured["spec"]
        answer.device = measured["device"]
        answer.memory = MemoryOut(
            needed_bytes=measured["memory_needed_bytes"], present_bytes=measured["memory_present_bytes"]
        )
        answer.seconds_per_step = measured["seconds_per_step"]
        steps = answer.total_steps or 0
        answer.eta_seconds = measured["load_seconds"] + steps * measured["seconds_per_step"]
    else:
        answer.not_measured = found["unknown"]


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
