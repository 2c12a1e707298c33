"""Training and answering on one device: two processes, an engine in this one."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import GraftError
from core.ml.base_model import Precision
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from tests import tiny
from tests.ml.inference import strong
from tests.ml.inference.asking import ask
from tests.service import wait_until
from worker import device
from worker.context import Context

PROMPT = strong.prompt(20)
TRAINER = """
import sys, time
from pathlib import Path
from worker import device
with device.taking(Path(sys.argv[1]), float(sys.argv[2])) as settled:
    print("taking", flush=True)
    if sys.argv[3] == "settle":
        sys.stdin.readline()
        settled()
        print("settled", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def engine(home: Path, tmp_path: Path) -> Iterator[Engine]:
    base = strong.model(tmp_path / "base", strong.CONFIGURATIONS["llama"])
    catalogue = Catalogue(tmp_path, {tiny.NAME: str(base)})
    made = Engine(
        catalogue,
        Precision(bits=16, type="nf4", double_quant=True, dtype="float32"),
        shared=device.Shared(home),
    )
    yield made
    made.close()


class Trainer:
    def __init__(self, home: Path, patience: float = 30, how: str = "keep") -> None:
        command = [sys.executable, "-c", TRAINER, str(home), str(patience), how]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait()


def holds(engine: Engine) -> bool:
    return engine.state()["base_model"] is not None


def refused(engine: Engine) -> GraftError:
    with pytest.raises(GraftError) as caught:
        ask(engine, tiny.NAME, PROMPT, Sampling(4)).wait()
    return caught.value


def test_a_training_gets_the_memory_and_the_engine_comes_back_beside_it(engine: Engine, home: Path) -> None:
    before = ask(engine, tiny.NAME, PROMPT, Sampling(8)).wait().tokens
    trainer = Trainer(home, how="settle")
    assert trainer.said() == "taking"
    assert not holds(engine)
    error = refused(engine)
    assert (error.code, error.status) == ("device_busy", 503)
    trainer.go_on()
    assert trainer.said() == "settled"
    assert ask(engine, tiny.NAME, PROMPT, Sampling(8)).wait().tokens == before
    trainer.end()


def test_what_is_being_written_is_finished_first(engine: Engine, home: Path) -> None:
    writing = ask(engine, tiny.NAME, PROMPT, Sampling(600, logit_bias={2: -100.0}))
    wait_until(lambda: engine.state()["running"], "it is being written")
    trainer = Trainer(home)
    assert len(writing.wait().tokens) == 600
    assert trainer.said() == "taking"
    assert not holds(engine)
    trainer.end()


def test_a_training_does_not_wait_for_ever(engine: Engine, home: Path) -> None:
    gone = threading.Event()
    ask(engine, tiny.NAME, PROMPT, Sampling(900, logit_bias={2: -100.0}), gone.is_set)
    wait_until(lambda: engine.state()["running"], "it is being written")
    trainer = Trainer(home, patience=0.2)
    assert trainer.said() == "taking"
    gone.set()
    trainer.end()


def test_a_worker_that_leaves_does_not_wait(engine: Engine, home: Path) -> None:
    gone, leaving = threading.Event(), threading.Event()
    ask(engine, tiny.NAME, PROMPT, Sampling(900, logit_bias={2: -100.0}), gone.is_set)
    wait_until(lambda: engine.state()["running"], "it is being written")
    threading.Timer(0.2, leaving.set).start()
    began = time.monotonic()
    with device.taking(home, 60, leaving.is_set):
        assert time.monotonic() - began < 10
    gone.set()


def test_a_killed_training_holds_nothing(engine: Engine, home: Path) -> None:
    trainer = Trainer(home)
    assert trainer.said() == "taking"
    assert refused(engine).code == "device_busy"
    trainer.end(signal.SIGKILL)
    assert ask(engine, tiny.NAME, PROMPT, Sampling(4)).wait().tokens


def test_two_trainings_may_take_at_once(home: Path) -> None:
    with device.taking(home, 0), device.taking(home, 0) as second:
        second()
        assert device.Shared(home).wanted()
    assert not device.Shared(home).wanted()


def test_a_model_for_which_there_is_no_memory_is_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("core.ml.base_model.load", full)
        error = refused(engine)
    assert (error.code, error.status) == ("device_full", 503)
    assert not holds(engine)
    assert ask(engine, tiny.NAME, PROMPT, Sampling(4)).wait().tokens


@pytest.mark.parametrize("known", [{}, {"cuda": True}])
def test_only_a_worker_that_has_no_gpu_does_not_take(context: Context, known: dict[str, bool]) -> None:
    """One that has just been started does not know yet."""
    shared = device.Shared(context.settings.home)
    with device.needed(replace(context, device={"cuda": False})):
        assert not shared.wanted()
    began = time.monotonic()
    with device.needed(replace(context, device=known)) as settled:
        assert shared.wanted()
        settled()
        assert not shared.wanted()
    assert time.monotonic() - began < 1


def test_who_is_asked_to_leave_waits_no_longer_for_the_device(context: Context) -> None:
    engine = device.Shared(context.settings.home)
    engine.hold()
    asked = threading.Event()
    threading.Timer(0.3, asked.set).start()
    began = time.monotonic()
    with device.needed(context, patience=60, leave=asked.is_set):
        assert 0.3 <= time.monotonic() - began < 10
