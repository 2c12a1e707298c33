"""A worker asked what a run would take, and what it answers when something is in the way."""

import multiprocessing
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.control.running import attempts, probes
from core.control.tables import Dataset, Probe
from core.hashes import sha256
from core.ml.training import config
from tests import tiny
from tests.control import rows
from tests.service import wait_until
from worker import probe
from worker.context import Context

# The rows of both databases are tests/control's.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ROWS = b'{"prompt": "Hi", "completion": "Hello there"}\n' * 8


@pytest.fixture
def dataset(context: Context, project_id: str, tmp_path: Path) -> Dataset:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ROWS)
    made = rows.dataset(context.sessions, project_id, format="prompt_completion", sha256=sha256(file))
    context.storage.put(file, made.key)
    return made


def ask(context: Context, dataset_id: str, **training: Any) -> str:
    training = {"max_steps": 2, "effective_batch_size": 4, **training}
    spec = config.settle(config.Spec.model_validate({"training": training})).model_dump()
    with context.sessions.begin() as session:
        return probes.ask(session, model=tiny.NAME, dataset_id=dataset_id, spec=spec)


def answer(context: Context, probe_id: str) -> dict[str, Any] | None:
    with context.sessions() as session:
        return probes.answered(session, probe_id)


def test_a_few_steps_are_measured_and_nothing_stays(context: Context, dataset: Dataset) -> None:
    asked = ask(context, dataset.id)
    probe.run(context, asked)
    found = answer(context, asked)
    assert found is not None
    measured = found["measured"]
    assert measured["spec"]["training"]["gradient_checkpointing"] in (True, False)
    assert measured["total_steps"] == 2
    assert 0 < measured["memory_needed_bytes"] < measured["memory_present_bytes"]
    assert measured["seconds_per_step"] > 0
    assert measured["load_seconds"] > 0
    assert measured["training_seconds"] > 2 * measured["seconds_per_step"]
    assert list(context.settings.scratch.iterdir()) == []


def test_a_trainer_that_the_system_ends_had_too_little_memory_and_a_job_would_go_on(
    context: Context, dataset: Dataset
) -> None:
    asked = ask(context, dataset.id)
    running = threading.Thread(target=probe.run, args=(context, asked))
    running.start()
    wait_until(lambda: bool(multiprocessing.active_children()), "the trainer starts", 60)
    for child in multiprocessing.active_children():
        child.kill()
    running.join(60)
    found = answer(context, asked)
    assert found is not None
    assert "more memory than there is" in found["unknown"]


def test_what_a_job_would_fail_with_is_the_answer(context: Context, dataset: Dataset) -> None:
    asked = ask(context, dataset.id, max_length=8)
    probe.run(context, asked)
    found = answer(context, asked)
    assert found is not None
    assert (found["error"]["code"], found["error"]["param"]) == ("row_too_long", "training.max_length")


def test_a_data_set_that_is_gone_is_said(context: Context) -> None:
    asked = ask(context, "ds_gone")
    probe.run(context, asked)
    found = answer(context, asked)
    assert found is not None
    assert found["error"]["code"] == "dataset_not_found"


def test_a_storage_that_fails_is_said(context: Context, dataset: Dataset) -> None:
    place = context.storage.local(dataset.key)
    assert place is not None
    place.unlink()
    place.mkdir()
    asked = ask(context, dataset.id)
    probe.run(context, asked)
    assert answer(context, asked) == {"unknown": "The worker met IsADirectoryError."}


def test_a_worker_with_a_job_measures_nothing(context: Context, dataset: Dataset, project_id: str) -> None:
    job = rows.job(context.sessions, project_id)
    with context.sessions.begin() as session:
        attempts.claim(session, job.id, context.owner, 60)
    asked = ask(context, dataset.id)
    probe.run(context, asked)
    assert answer(context, asked) == {"unknown": "No worker is free."}


def test_a_worker_that_leaves_says_so_and_an_old_question_is_left_alone(
    context: Context, dataset: Dataset
) -> None:
    old = ask(context, dataset.id)
    with context.sessions.begin() as session:
        session.get_one(Probe, old).asked -= probes.PATIENCE_SECONDS + 1
    probe.run(context, old)
    assert answer(context, old) is None
    asked = ask(context, dataset.id)
    context.stopping.set()
    probe.run(context, asked)
    assert answer(context, asked) == {"unknown": "The worker shuts down."}


def test_a_run_in_several_processes_is_not_measured(context: Context, dataset: Dataset) -> None:
    asked = ask(context, dataset.id)
    several = context.settings.model_copy(update={"trainer_processes": 2})
    probe.run(replace(context, settings=several), asked)
    found = answer(context, asked)
    assert found is not None
    assert "several processes" in found["unknown"]


def test_a_work_folder_that_cannot_be_made_is_said(context: Context, dataset: Dataset) -> None:
    shutil.rmtree(context.settings.scratch, ignore_errors=True)
    context.settings.scratch.write_text("in the way")
    asked = ask(context, dataset.id)
    probe.run(context, asked)
    assert answer(context, asked) == {"unknown": "The worker met NotADirectoryError."}
