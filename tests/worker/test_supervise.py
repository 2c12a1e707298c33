"""A training and its proof, watched by the worker. The children are played: what they say is the test's."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from core.control import jobs as control
from core.control.running import events
from core.control.tables import Adapter, Job, JobStatus
from core.ml.training import config
from core.ml.training.config import Spec
from tests.control import rows
from worker import jobs, train
from worker.attempt import artifacts, supervise
from worker.child import spawn
from worker.context import Context

CERTIFICATE = {
    "ok": True,
    "checks": [{"name": "keys", "ok": True}],
    "evaluation": {"verdict": {"words": "It is better."}},
}
FAILED = {"code": "adapter_changes_nothing", "message": "lora_B is zero.", "hint": None}
Report = tuple[str, dict[str, Any]]


class Played(spawn.Child):
    """A child that says its words and ends; without a last word it stays until it is told to stop or killed."""

    def __init__(self, words: list[Report], *, stays: bool = False, exit_code: int = 0) -> None:
        self.words, self.stays, self.exit = words, stays, exit_code

    def receive(self, timeout: float) -> list[Report]:
        said, self.words = self.words, []
        time.sleep(0 if said else min(timeout, 0.02))
        return said

    @property
    def exit_code(self) -> int | None:
        return None if self.stays or self.words else self.exit

    def tell(self, word: str) -> None:
        if word == "stop" and self.stays:
            self.stays, self.words = False, [("stopped", {})]

    def kill(self) -> None:
        self.stays, self.exit = False, -9

    close = kill


@pytest.fixture
def job(context: Context, project_id: str, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(train, "_inputs", lambda _context, _attempt: None)
    spec = config.settle(Spec()).model_dump() | {"validation": None}
    return rows.job(context.sessions, project_id, spec=spec)


def play(monkeypatch: pytest.MonkeyPatch, context: Context, **children: Played) -> list[tuple[Any, ...]]:
    """Have these children started by their names; what they were started with."""
    started: list[tuple[Any, ...]] = []

    def start(function: str, *args: Any, patience: float) -> Played:  # noqa: ARG001
        started.append((function, *args))
        return children[function]

    monkeypatch.setattr(spawn, "start", start)
    folder = context.settings.home / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    children["train"].words += [("done", {"folder": str(folder), "metrics": {"train_loss": 1.0}, "step": 3})]
    return started


def run_while(context: Context, then: Callable[[], None] | None = None) -> str | None:
    """Let a worker take the job, and do something once its proof runs."""
    results: list[str | None] = []
    worker = threading.Thread(target=lambda: results.append(jobs.run(context)))
    worker.start()
    if then is not None:
        deadline = time.monotonic() + 20
        while not _in_phase(context, "evaluating"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        then()
    worker.join(30)
    assert not worker.is_alive()
    return results[0]


def _in_phase(context: Context, phase: str) -> bool:
    with context.sessions() as session:
        return any(job.phase == phase for job in session.query(Job).all())


def adapters(context: Context) -> list[Adapter]:
    with context.sessions() as session:
        return session.query(Adapter).all()


def test_what_was_trained_is_proved_in_another_process_and_published(
    context: Context, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved = {"certificate": CERTIFICATE, "metrics": {"eval_loss": 0.5}}
    started = play(monkeypatch, context, train=Played([]), prove=Played([("proved", proved)]))
    assert run_while(context) is None
    assert [call[0] for call in started] == ["train", "prove"]
    assert started[1][-1]["metrics"] == {"train_loss": 1.0}
    (adapter,) = adapters(context)
    ended = rows.read(context.sessions, job.id)
    assert (ended.status, ended.adapter_id) == (JobStatus.SUCCEEDED, adapter.id)
    assert adapter.certificate == CERTIFICATE
    assert ended.metrics == adapter.metrics == {"train_loss": 1.0, "eval_loss": 0.5}


def test_a_proof_that_fails_fails_the_job(
    context: Context, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, context, train=Played([]), prove=Played([("error", FAILED)]))
    run_while(context)
    ended = rows.read(context.sessions, job.id)
    assert (ended.status, ended.error) == (JobStatus.FAILED, FAILED)
    assert adapters(context) == []


@pytest.mark.parametrize("exit_code", [-9, 1])
def test_a_proof_that_is_killed_is_done_again(
    context: Context, job: Job, monkeypatch: pytest.MonkeyPatch, exit_code: int
) -> None:
    play(monkeypatch, context, train=Played([]), prove=Played([], exit_code=exit_code))
    run_while(context)
    ended = rows.read(context.sessions, job.id)
    assert (ended.status, ended.crashes) == (JobStatus.QUEUED, 1)


@pytest.mark.parametrize(
    ("what", "status"), [("pause", "paused"), ("cancel", "cancelled"), ("shutdown", "queued")]
)
def test_a_proof_is_left_at_once(
    context: Context, job: Job, monkeypatch: pytest.MonkeyPatch, what: str, status: str
) -> None:
    context = Context(
        **{**vars(context), "settings": context.settings.model_copy(update={"heartbeat_seconds": 0.1})}
    )
    play(monkeypatch, context, train=Played([]), prove=Played([], stays=True))

    def ask() -> None:
        if what == "shutdown":
            context.stopping.set()
            return
        with context.sessions.begin() as session:
            getattr(control, what)(session, job.project_id, job.id)

    run_while(context, ask)
    ended = rows.read(context.sessions, job.id)
    assert (ended.status, ended.crashes, ended.owner) == (status, 0, None)
    assert adapters(context) == []


def test_a_child_that_gives_no_sign_of_life_is_ended(
    context: Context, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(
        **{**vars(context), "settings": context.settings.model_copy(update={"stall_seconds": 0.3})}
    )
    play(monkeypatch, context, train=Played([]), prove=Played([], stays=True))
    run_while(context)
    ended = rows.read(context.sessions, job.id)
    assert (ended.status, ended.crashes) == (JobStatus.QUEUED, 1)
    with context.sessions() as session:
        event = events.latest(session, job.id, "crashed")
    assert event is not None
    assert "because its trainer gave no sign of life for 0 s;" in event.message


def test_what_no_row_can_hold_is_left_out_of_what_a_child_says(
    context: Context, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"loss": 1.0, "eval_loss": float("nan")}
    sample = {"prompt": "Hi", "text": "a\0b", "scores": [0.5, float("inf")]}
    said: list[Report] = [
        ("metrics", {"step": 1, "values": values, "progress": None}),
        ("samples", {"step": 1, "samples": [sample]}),
    ]
    refused = FAILED | {"message": "lora_B\0 is zero."}
    play(monkeypatch, context, train=Played(said), prove=Played([("error", refused)]))
    run_while(context)
    ended = rows.read(context.sessions, job.id)
    assert (ended.status, ended.metrics) == (JobStatus.FAILED, {"train_loss": 1.0})
    assert ended.error == FAILED | {"message": "lora_B\ufffd is zero."}
    with context.sessions() as session:
        event = events.latest(session, job.id, "samples")
    assert event is not None
    assert event.data == {
        "step": 1,
        "samples": [{"prompt": "Hi", "text": "a\ufffdb", "scores": [0.5, None]}],
    }


@pytest.mark.usefixtures("job")
def test_one_log_at_a_time_waits_behind_a_checkpoint(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stored = threading.Event(), threading.Event()
    logs: list[Any] = []

    class Uploader(ThreadPoolExecutor):
        def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
            if function is artifacts.store_log:
                logs.append(args)
            return super().submit(function, *args, **named)

    def store(*_: Any) -> None:
        begun.set()
        stored.wait(30)

    monkeypatch.setattr(supervise, "ThreadPoolExecutor", Uploader)
    monkeypatch.setattr(supervise, "_LOG_SECONDS", 0)
    monkeypatch.setattr(artifacts, "store_checkpoint", store)
    checkpoint = {"step": 1, "folder": "", "files": []}
    said: list[Report] = [("phase", {"phase": "training"}), ("checkpoint", checkpoint)]
    play(monkeypatch, context, train=Played(said, stays=True))
    worker = threading.Thread(target=jobs.run, args=(context,))
    worker.start()
    assert begun.wait(20)
    time.sleep(0.5)  # many looks at the child
    waiting = len(logs)
    context.stopping.set()
    stored.set()
    worker.join(30)
    assert not worker.is_alive()
    assert 1 <= waiting <= 2  # one before the checkpoint, one behind it
