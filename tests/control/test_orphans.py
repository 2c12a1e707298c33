"""Which folders of the storage belong to no row."""

from datetime import UTC, datetime, timedelta

import pytest
from ulid import ULID

from core.control import jobs
from core.control.db import Sessions
from core.control.running import attempts, events, orphans
from core.control.tables import Job, JobKind, JobStatus, Project, utcnow
from tests.control import rows


@pytest.fixture
def project_id(sessions: Sessions) -> str:
    """A project as old as any file of these tests but those of another database."""
    project_id = rows.project(sessions)
    with sessions.begin() as session:
        session.get_one(Project, project_id).created_at = utcnow() - timedelta(days=9)
    return project_id


def made(prefix: str, *, days: float) -> str:
    """An id of so many days ago."""
    return f"{prefix}_{ULID.from_datetime(datetime.now(UTC) - timedelta(days=days))}"


def among(sessions: Sessions, folder: str, *names: str) -> list[str]:
    with sessions() as session:
        return orphans.among(session, folder, names)


KINDS = {"datasets": "ds", "jobs": "job", "adapters": "ad"}


@pytest.mark.parametrize("folder", KINDS)
def test_a_folder_is_of_nobody_when_it_has_no_row_and_is_older_than_a_day(
    sessions: Sessions, project_id: str, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    old, new, known = (made(KINDS[folder], days=days) for days in (1.1, 0.9, 2))
    if folder == "datasets":
        rows.dataset(sessions, project_id, id=known)
    elif folder == "jobs":
        monkeypatch.setattr(jobs, "new_id", lambda _prefix: known)
        rows.job(sessions, project_id)
    else:
        with sessions.begin() as session:
            session.add(rows.adapter(project_id, id=known))
    assert among(sessions, folder, old, new, known) == [old]


@pytest.mark.usefixtures("project_id")
def test_what_is_older_than_the_database_is_of_another_one(sessions: Sessions) -> None:
    ours, theirs = made("ds", days=8), made("ds", days=10)
    assert among(sessions, "datasets", ours, theirs) == [ours]


def test_an_empty_database_owns_no_files(sessions: Sessions) -> None:
    assert among(sessions, "datasets", made("ds", days=2)) == []


@pytest.mark.usefixtures("project_id")
def test_a_name_that_is_no_id_of_its_folder_is_left_alone(sessions: Sessions) -> None:
    ulid = made("ds", days=2).removeprefix("ds_")
    names = ["backup", f"job_{ulid}", ulid, f"ds_{ulid}.old", f"ds_{ulid.lower()}", "ds_", f"ds_7{'Z' * 25}"]
    assert among(sessions, "datasets", *names, f"ds_{ulid}") == [f"ds_{ulid}"]
    assert among(sessions, "else", f"ds_{ulid}") == []


def test_an_export_is_of_nobody_without_its_row(sessions: Sessions, project_id: str) -> None:
    adapter = rows.adapter(project_id)
    with sessions.begin() as session:
        session.add(adapter)
    kept, old = rows.export(sessions, adapter.id).id, made("exp", days=2)
    assert among(sessions, f"{adapter.key}/exports", kept, old, made("exp", days=0)) == [old]
    assert among(sessions, "adapters/my copy \udcff/exports", old) == []


def test_a_checkpoint_is_of_nobody_once_no_claim_can_enter_it(sessions: Sessions, project_id: str) -> None:
    job = rows.job(sessions, project_id)
    folder = f"jobs/{job.id}/checkpoints"
    for _ in range(2):
        fence = rows.claimed(sessions, job.id).fence
        with sessions.begin() as session:
            events.add_checkpoint(session, job.id, fence * 10, f"{folder}/{fence}-{fence * 10}", [], {})
            attempts.release(session, job.id, fence, "The worker shuts down.")
    names = ["1-10", "1-15", "2-20", "2-25", "3-30", "old", "1-x"]
    assert among(sessions, folder, *names) == ["1-15", "2-25"]
    rows.claimed(sessions, job.id)
    assert among(sessions, folder, *names) == ["1-15", "2-25"]
    with sessions.begin() as session:
        attempts.release(session, job.id, 3, "The worker shuts down.")
    assert among(sessions, folder, *names) == ["1-15", "2-25", "3-30"]


def test_what_jobs_leave_is_looked_for_until_a_week_after_their_end(
    sessions: Sessions, project_id: str
) -> None:
    ended = {"early": 8.0, "late": 6.0}
    ids = {}
    for name in ("waiting", *ended):
        training = rows.job(sessions, project_id)
        asked = {"export": {"adapter_id": f"ad_{name}", "format": "gguf"}}
        export = rows.job(sessions, project_id, kind=JobKind.EXPORT, spec=asked)
        ids[name] = training.id
        with sessions.begin() as session:
            for job in (training, export) if name in ended else ():
                row = session.get_one(Job, job.id)
                row.status = JobStatus.FAILED
                row.finished_at = utcnow() - timedelta(days=ended[name])
    with sessions() as session:
        found = orphans.worked_on(session)
    assert found == [
        "adapters/ad_late/exports",
        "adapters/ad_waiting/exports",
        *(f"jobs/{ids[name]}/checkpoints" for name in ("waiting", "late")),
    ]
