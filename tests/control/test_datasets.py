import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from core.control import adapters, datasets, exports, jobs
from core.control.db import Sessions
from core.control.running import attempts
from core.control.tables import Dataset
from core.errors import Conflict, GraftError, NotFound
from core.ml.formats.files.rows import Limits
from core.ml.formats.validate import Reading
from core.settings import Settings
from tests.control import rows


@pytest.fixture
def project_id(sessions: Sessions) -> str:
    return rows.project(sessions)


def use_it(sessions: Sessions, project_id: str, dataset: Dataset, how: str) -> str:
    fields: dict[str, Any] = {"dataset_id": dataset.id}
    if how == "validation":
        fields = {"spec": {**rows.SPEC, "validation": {"dataset_id": dataset.id, "fraction": None}}}
    return rows.job(sessions, project_id, **fields).id


@pytest.mark.parametrize("how", ["training", "validation"])
def test_a_data_set_in_use_is_kept_until_its_job_has_ended(
    sessions: Sessions, project_id: str, how: str
) -> None:
    dataset = rows.dataset(sessions, project_id)
    job_id = use_it(sessions, project_id, dataset, how)
    for status in ("queued", "running"):
        with pytest.raises(Conflict) as caught, sessions.begin() as session:
            datasets.delete(session, project_id, dataset.id)
        assert caught.value.code == "dataset_in_use"
        assert job_id in caught.value.message
        assert status in caught.value.message
        if status == "queued":
            fence = rows.claimed(sessions, job_id).fence
    with sessions.begin() as session:
        attempts.fail(session, job_id, fence, GraftError("broken", "It broke."))
    with sessions.begin() as session:
        datasets.delete(session, project_id, dataset.id)
    with pytest.raises(NotFound), sessions() as session:
        datasets.get(session, project_id, dataset.id)


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_what_a_job_is_just_made_with_is_not_deleted_at_the_same_time(
    sessions: Sessions, project_id: str, kind: str
) -> None:
    dataset, adapter = rows.dataset(sessions, project_id), rows.adapter(project_id)
    with sessions.begin() as session:
        session.add(adapter)

    def delete() -> None:
        with sessions.begin() as session:
            if kind == "dataset":
                datasets.delete(session, project_id, dataset.id)
            else:
                adapters.delete(session, project_id, adapter.id)

    with ThreadPoolExecutor(1) as other:
        with sessions.begin() as session:
            datasets.get(session, project_id, dataset.id, to="use")
            adapters.get(session, project_id, adapter.id, to="use")
            deleting = other.submit(delete)
            time.sleep(0.3)  # it has looked for users by now, if it did not wait
            fields: dict[str, Any] = {"name": "job", "model": "m", "labels": {}, "dataset_id": dataset.id}
            jobs.create(session, project_id, spec=rows.SPEC | {"continue_from": adapter.id}, **fields)
        with pytest.raises(Conflict) as caught:
            deleting.result(30)
    assert caught.value.code == f"{kind}_in_use"


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_what_is_just_deleted_is_not_found_by_whoever_waited_for_it(
    sessions: Sessions, project_id: str, kind: str
) -> None:
    dataset, adapter = rows.dataset(sessions, project_id), rows.adapter(project_id)
    with sessions.begin() as session:
        session.add(adapter)

    def use() -> None:
        with sessions.begin() as session:
            if kind == "dataset":
                datasets.get(session, project_id, dataset.id, to="use")
            else:
                exports.ask(session, project_id, adapter.id, "merged", idempotency_key=None)

    with ThreadPoolExecutor(1) as other:
        with sessions.begin() as session:
            datasets.delete(session, project_id, dataset.id)
            adapters.delete(session, project_id, adapter.id)
            session.flush()
            using = other.submit(use)
            time.sleep(0.3)
        with pytest.raises(NotFound):
            using.result(30)


def test_another_data_sets_job_does_not_hold_this_one(sessions: Sessions, project_id: str) -> None:
    one, two = rows.dataset(sessions, project_id), rows.dataset(sessions, project_id)
    rows.job(sessions, project_id, dataset_id=one.id)
    with sessions.begin() as session:
        datasets.delete(session, project_id, two.id)


def test_a_foreign_projects_rows_are_not_found(sessions: Sessions, project_id: str) -> None:
    other = rows.project(sessions, "theirs")
    dataset, job = rows.dataset(sessions, other), rows.job(sessions, other)
    made = rows.adapter(other)
    with sessions.begin() as session:
        session.add(made)
    with sessions() as session:
        for look in (
            lambda: datasets.get(session, project_id, dataset.id),
            lambda: datasets.delete(session, project_id, dataset.id),
            lambda: jobs.get(session, project_id, job.id),
            lambda: jobs.cancel(session, project_id, job.id),
            lambda: jobs.remove(session, project_id, job.id),
            lambda: adapters.get(session, project_id, made.id),
            lambda: adapters.delete(session, project_id, made.id),
        ):
            with pytest.raises(NotFound):
                look()
        assert datasets.page(session, project_id, limit=10, after=None) == []
        assert adapters.page(session, project_id, limit=10, after=None) == []


def test_pages_are_newest_first_and_tell_of_more(sessions: Sessions, project_id: str) -> None:
    made = [rows.dataset(sessions, project_id).id for _ in range(5)][::-1]
    with sessions() as session:
        first = [row.id for row in datasets.page(session, project_id, limit=2, after=None)]
        assert first == made[:3]
        second = [row.id for row in datasets.page(session, project_id, limit=2, after=made[1])]
        assert second == made[2:5]
        assert [row.id for row in datasets.page(session, project_id, limit=2, after=made[3])] == made[4:]


def test_json_and_times_come_back_as_they_went_in(sessions: Sessions, project_id: str) -> None:
    mapping = {"messages": [{"role": "user", "content": "été 東京 {a}"}], "none": None, "n": 1.5}
    dataset = rows.dataset(sessions, project_id, mapping=mapping, columns=["b", "a"], bytes=2**40)
    with sessions() as session:
        again = datasets.get(session, project_id, dataset.id)
    assert (again.mapping, again.columns, again.bytes) == (mapping, ["b", "a"], 2**40)
    assert again.created_at == dataset.created_at
    assert again.created_at.utcoffset() is not None
    assert datasets.reading(again, Limits(rows=100)) == Reading(
        "jsonl", False, "prompt_completion", mapping, Limits(rows=100)
    )


@pytest.mark.parametrize("packed", [True, False])
def test_a_packed_file_is_read_as_one_again(sessions: Sessions, project_id: str, packed: bool) -> None:
    kept = datasets.kept_type("csv", packed)
    dataset = rows.dataset(sessions, project_id, file_type=kept)
    with sessions() as session:
        reading = datasets.reading(datasets.get(session, project_id, dataset.id), Limits())
    assert (reading.file_type, reading.packed) == ("csv", packed)


def test_the_limits_of_files_are_settings() -> None:
    made = Settings(line_max_bytes=1, unpacked_max_bytes=2, rows_max=3, columns_max=4, nesting_max=5)
    assert datasets.limits(made) == Limits(line_bytes=1, unpacked_bytes=2, rows=3, columns=4, depth=5)
    assert datasets.limits(Settings()) == Limits()
