"""Worker processes: real ones, that really die."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import select, update

from core.control.db import Sessions, now_epoch
from core.control.running import workers
from core.control.tables import Worker
from tests.control import rows

REGISTER = """
import sys
from core.control import db
from core.control.running import workers
sessions = db.connect(sys.argv[1])
with sessions.begin() as session:
    print(workers.register(session, 2), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process(database_url: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that registered itself as a worker with two slots, and its worker id."""
    started = subprocess.Popen(
        [sys.executable, "-c", REGISTER, database_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    yield started, started.stdout.readline().strip()
    started.kill()
    started.communicate()


def dead(sessions: Sessions) -> list[str]:
    with sessions() as session:
        return workers.dead_here(session)


def test_an_ended_process_is_noticed(sessions: Sessions, process: tuple[subprocess.Popen[str], str]) -> None:
    running, worker_id = process
    assert dead(sessions) == []
    running.kill()
    # Nobody has taken note of its end yet: it is a zombie, and dead all the same.
    deadline = time.monotonic() + 5
    while not dead(sessions) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dead(sessions) == [worker_id]
    running.wait()
    assert dead(sessions) == [worker_id]
    with sessions.begin() as session:
        workers.forget(session, [worker_id])
    assert dead(sessions) == []


def test_another_process_with_the_same_id_is_not_the_worker(sessions: Sessions) -> None:
    with sessions.begin() as session:
        worker_id = workers.register(session, 1)
        assert workers.dead_here(session) == []
        session.execute(update(Worker).values(pid_started="1"))
        assert workers.dead_here(session) == [worker_id]


def test_a_worker_elsewhere_is_never_called_dead_from_here(sessions: Sessions) -> None:
    with sessions.begin() as session:
        workers.register(session, 1)
        session.execute(update(Worker).values(place="elsewhere", pid=2**22 + 1))
        assert workers.dead_here(session) == []


def test_idle_slots_are_those_of_live_workers_without_the_running_jobs(sessions: Sessions) -> None:
    with sessions.begin() as session:
        assert workers.idle_slots(session) == 0
        silent = workers.register(session, 8)
        workers.register(session, 2)
        session.execute(update(Worker).where(Worker.id == silent).values(seen=now_epoch() - 31))
        assert workers.idle_slots(session) == 2
    project_id = rows.project(sessions)
    for expected in (1, 0, 0):
        rows.claimed(sessions, rows.job(sessions, project_id).id)
        with sessions() as session:
            assert workers.idle_slots(session) == expected


def test_a_beat_brings_a_silent_worker_back(sessions: Sessions) -> None:
    with sessions.begin() as session:
        worker_id = workers.register(session, 1)
        session.execute(update(Worker).values(seen=now_epoch() - 31))
        assert workers.alive(session) == []
        workers.beat(session, worker_id, 1)
    with sessions.begin() as session:
        assert [worker.id for worker in workers.alive(session)] == [worker_id]
        workers.leave(session, worker_id)
        assert workers.alive(session) == []


def test_a_beat_enters_a_worker_again_that_was_struck_out(sessions: Sessions) -> None:
    with sessions.begin() as session:
        worker_id = workers.register(session, 2)
    with sessions.begin() as session:
        workers.forget(session, [worker_id])
    with sessions.begin() as session:
        workers.beat(session, worker_id, 2, {"free_bytes": 1})
    with sessions.begin() as session:
        (worker,) = workers.alive(session)
        assert (worker.id, worker.slots, worker.pid) == (worker_id, 2, os.getpid())
        assert workers.device(session) == {"free_bytes": 1}
        assert workers.dead_here(session) == []


def test_workers_silent_for_a_day_are_forgotten(sessions: Sessions) -> None:
    with sessions.begin() as session:
        old, new = workers.register(session, 1), workers.register(session, 1)
        session.execute(update(Worker).where(Worker.id == old).values(seen=now_epoch() - 86_401))
        workers.forget(session, [])
        assert session.scalars(select(Worker.id)).all() == [new]


def test_a_duty_has_one_owner_at_a_time(sessions: Sessions) -> None:
    def take(owner: str, seconds: float = 60, name: str = "sweep") -> bool:
        with sessions.begin() as session:
            return workers.take_duty(session, name, owner, seconds)

    assert take("a")
    assert not take("b")
    assert take("b", name="another duty")
    assert take("a", 0.1)
    time.sleep(0.2)
    assert take("b")
    assert not take("a")


def test_of_many_that_want_a_duty_at_once_one_gets_it(sessions: Sessions) -> None:
    start = threading.Barrier(8)
    taken: list[int] = []

    def want(owner: int) -> None:
        start.wait()
        with sessions.begin() as session:
            if workers.take_duty(session, "sweep", str(owner), 60):
                taken.append(owner)

    threads = [threading.Thread(target=want, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_the_databases_clock_is_in_seconds_since_1970(sessions: Sessions) -> None:
    with sessions() as session:
        first = session.scalars(select(now_epoch())).one()
        assert abs(first - time.time()) < 30
        time.sleep(0.05)
        # The clock goes on inside a transaction.
        assert session.scalars(select(now_epoch())).one() > first + 0.02


def test_the_place_is_the_same_for_every_process_here(
    process: tuple[subprocess.Popen[str], str], sessions: Sessions
) -> None:
    _, worker_id = process
    with sessions() as session:
        assert session.get_one(Worker, worker_id).place == workers.place()
        assert session.get_one(Worker, worker_id).pid != os.getpid()
