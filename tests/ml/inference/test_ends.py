"""What ends an answer or the engine: faults, whoever closes it, idleness, others who want the device."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import GraftError
from core.ml import base_model
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Limits, Scheduler
from core.ml.inference.text import TextStream
from tests import tiny
from tests.ml.inference import strong
from tests.ml.inference.asking import ask, idle
from tests.ml.inference.conftest import EXACT, MakeEngine
from tests.ml.inference.strong import PROMPT, greedy


def broken_for(engine: Engine, token: int, error: Exception) -> None:
    """The model fails on every step that reads this token."""
    assert idle(engine)
    scheduler = engine._scheduler
    assert scheduler is not None
    read = scheduler.model.read

    def reads(rows: Any) -> torch.Tensor:
        if any(token in row.tokens for row in rows):
            raise error
        return read(rows)

    scheduler.model.read = reads  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("a kernel"), ("engine_error", 502)),
        (torch.OutOfMemoryError("too much"), ("device_full", 503)),
    ],
)
def test_a_step_that_fails_ends_the_one_it_fails_for(
    engine: Engine, base: Path, error: Exception, told: tuple[str, int]
) -> None:
    ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
    broken_for(engine, 300, error)
    prompt = [token for token in PROMPT if token != 300]
    wanted = greedy(base, prompt=prompt)
    good = [ask(engine, tiny.NAME, prompt, Sampling(12, logit_bias={300: -100.0})) for _ in range(3)]
    bad = ask(engine, tiny.NAME, [*prompt, 300], Sampling(12))
    with pytest.raises(GraftError) as caught:
        bad.wait()
    assert (caught.value.code, caught.value.status) == told
    assert 300 not in wanted
    assert [one.wait().tokens for one in good] == [wanted] * 3
    assert idle(engine)


def test_numbers_that_are_none_fail_their_own_request(engine: Engine) -> None:
    ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
    assert idle(engine)
    scheduler = engine._scheduler
    assert scheduler is not None
    read = scheduler.model.read

    def reads(rows: Any) -> torch.Tensor:
        logits = read(rows).clone()
        answered = [row for row in rows if row.answered]
        for place, row in enumerate(answered):
            if row.cache.tensor.shape[3] == 77:
                logits[place] = torch.nan
        return logits

    scheduler.model.read = reads  # type: ignore[method-assign]
    good = ask(engine, tiny.NAME, PROMPT, Sampling(12))
    with pytest.raises(GraftError, match="no numbers"):
        ask(engine, tiny.NAME, strong.prompt(70), Sampling(7)).wait()
    assert good.wait().finish is not None
    again = ask(engine, tiny.NAME, strong.prompt(70), Sampling(8)).wait()
    assert again.finish is not None
    assert again.finish.cached == 0


def test_an_engine_that_can_do_nothing_more_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
    broken_for(engine, PROMPT[-1], RuntimeError("the device fell off"))
    for _ in range(3):
        with pytest.raises(GraftError):
            ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
    engine._thread.join(10)
    assert str(engine.broken).endswith("EngineBroken: the device fell off")
    with pytest.raises(GraftError) as caught:
        ask(engine, tiny.NAME, PROMPT, Sampling(2))
    assert (caught.value.code, caught.value.status) == ("engine_unavailable", 503)


class Panic(BaseException):
    """As Rust's in Python: no Exception."""


def test_what_is_no_exception_ends_its_own_answer(
    engine: Engine, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, broken = TextStream.push, strong.prompt(20, seed=7)

    def panics(stream: TextStream, token: int) -> str:
        if stream._ids[:1] == broken[-6:-5]:
            raise Panic("a library in Rust")
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", panics)
    bad = ask(engine, tiny.NAME, broken, Sampling(12))
    good = ask(engine, tiny.NAME, PROMPT, Sampling(12))
    with pytest.raises(GraftError, match="Panic"):
        bad.wait()
    assert good.wait().tokens == greedy(base)
    assert engine.broken is None


def test_an_engine_that_ends_in_any_way_says_so(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()

    def panics(_self: Any) -> None:
        raise Panic("a library in Rust")

    monkeypatch.setattr(Scheduler, "step", panics)
    with pytest.raises(GraftError) as caught:
        ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
    assert (caught.value.code, caught.value.status) == ("engine_unavailable", 503)
    assert str(engine.broken).endswith("Panic: a library in Rust")


def test_a_device_that_takes_nothing_more_ends_the_engine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_asked: Any) -> Any:
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(base_model, "load", broken)
    engine = make_engine()
    with pytest.raises(GraftError, match="device-side assert"):
        ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
    engine._thread.join(10)
    assert "device-side assert" in str(engine.broken)


def test_a_closed_engine_tells_all_who_waited(make_engine: MakeEngine) -> None:
    engine = make_engine(Limits(running=1))
    heard = [ask(engine, tiny.NAME, PROMPT, Sampling(300)) for _ in range(3)]
    assert heard[0].first.wait(30)
    engine.close()
    for one in heard:
        with pytest.raises(GraftError) as caught:
            one.wait()
        assert caught.value.code == "engine_unavailable"


def test_who_waits_for_the_model_is_told_when_it_is_closed(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, go_on = base_model.load, threading.Event()

    def slow(*asked: Any) -> Any:
        assert go_on.wait(30)
        return load(*asked)

    monkeypatch.setattr(base_model, "load", slow)
    engine = make_engine()
    heard = [ask(engine, tiny.NAME, PROMPT, Sampling(3)) for _ in range(2)]
    engine.close(wait=False)
    for one in heard:
        assert one.over.wait(5)
        assert one.error is not None
        assert one.error.code == "engine_unavailable"
    go_on.set()


def test_idle_it_gives_its_memory_back(make_engine: MakeEngine) -> None:
    engine = make_engine(Limits(idle_seconds=0.2))
    ask(engine, tiny.NAME, PROMPT, Sampling(3)).wait()
    for _ in range(100):
        if engine.state()["base_model"] is None:
            break
        time.sleep(0.05)
    assert engine.state()["base_model"] is None
    assert ask(engine, tiny.NAME, PROMPT, Sampling(3)).wait().tokens


def test_those_who_ask_again_and_again_do_not_keep_the_device(models: Catalogue) -> None:
    class Wanted:
        wants = held = False

        def wanted(self) -> bool:
            return self.wants

        def hold(self) -> None:
            self.held = True

        def give_back(self) -> None:
            self.held = False

    device = Wanted()
    engine = Engine(models, EXACT, shared=device)
    stop = threading.Event()

    def asks(_number: int) -> None:
        while not stop.is_set():
            heard = ask(engine, tiny.NAME, PROMPT, Sampling(1))
            assert heard.over.wait(30)

    try:
        ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
        with ThreadPoolExecutor(4) as together:
            asking = together.map(asks, range(4))
            time.sleep(0.2)
            device.wants, until = True, time.monotonic() + 5
            while device.held and time.monotonic() < until:
                time.sleep(0.01)
            given_back = not device.held
            stop.set()
            list(asking)
        assert given_back
    finally:
        engine.close()
