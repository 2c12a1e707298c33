"""What an error leaves in memory when the engine says that the device is free, and what memory that runs out costs."""

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import GraftError
from core.ml.catalogue import Catalogue
from core.ml.inference import bases, compat, memory
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Scheduler
from tests import tiny
from tests.ml.inference import strong
from tests.ml.inference.asking import ask
from tests.ml.inference.conftest import EXACT

PROMPT = strong.prompt(20, seed=1)


class Device:
    """Looks, when it is given back, whether the model is still there."""

    def __init__(self) -> None:
        self.model: Callable[[], Any] = lambda: None
        self.held = False
        self.left: list[Any] = []

    def wanted(self) -> bool:
        return False

    def hold(self) -> None:
        self.held = True

    def give_back(self) -> None:
        if self.held:
            self.left.append(self.model())
        self.held = False


@pytest.mark.parametrize("who", ["the load", "what has the model read in batches", "peft"])
def test_what_failed_has_left_memory_when_the_device_is_given_back(
    models: Catalogue, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    device = Device()
    load = bases.base_model.load

    def loaded(*asked: Any) -> Any:
        made = load(*asked)
        device.model = weakref.ref(made)
        if who == "the load":
            raise torch.OutOfMemoryError("full")
        return made

    def broken(*_given: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(bases.base_model, "load", loaded)
    engine = Engine(models, EXACT, shared=device)
    engine.register("dora", tiny.NAME, strong.adapter(tmp_path / "ad", base, 3, use_dora=True))
    if who == "peft":
        monkeypatch.setattr(compat, "_adapted", broken)
    elif who != "the load":
        monkeypatch.setattr("core.ml.inference.engine.Scheduler", broken)
    with pytest.raises(GraftError):
        ask(engine, "dora" if who == "peft" else tiny.NAME, PROMPT, Sampling(2)).wait()
    engine.close()
    assert device.left == [None]


def test_an_error_lets_go_of_what_those_it_comes_from_hold() -> None:
    held: list[weakref.ref[Any]] = []

    def fails(error: Exception) -> None:
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        raise error

    def fails_again() -> None:
        try:
            fails(ValueError())
        except ValueError:
            try:
                fails(KeyError())
            except KeyError as error:
                raise RuntimeError from error

    try:
        fails_again()
    except RuntimeError as error:
        assert all(one() is not None for one in held)
        memory.let_go(error)
        assert [one() for one in held] == [None, None]


def test_what_was_kept_of_prompts_makes_room_for_one_that_is_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = settled(engine)
    cache = scheduler.model.cache

    def short(most: int) -> Any:
        if scheduler.prefixes._blocks:
            raise torch.OutOfMemoryError("full")
        return cache(most)

    monkeypatch.setattr(scheduler.model, "cache", short)
    assert ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait().finish is not None


def test_one_for_whom_there_is_no_memory_is_told_so_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = settled(engine)
    read, cache = scheduler.model.read, scheduler.model.cache
    tried = []

    def reads(rows: Any) -> torch.Tensor:
        if any(row.cache.tensor.shape[3] == 152 for row in rows):
            raise torch.OutOfMemoryError("full")
        return read(rows)

    def caches(most: int) -> Any:
        if most == 142:
            tried.append(most)
            raise torch.OutOfMemoryError("full")
        return cache(most)

    monkeypatch.setattr(scheduler.model, "read", reads)
    monkeypatch.setattr(scheduler.model, "cache", caches)
    for length in [150] * 4 + [140]:
        with pytest.raises(GraftError) as caught:
            ask(engine, tiny.NAME, strong.prompt(length), Sampling(2)).wait()
        assert (caught.value.code, caught.value.status) == ("device_full", 503)
    assert len(tried) == 2
    assert ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait().finish is not None
    assert engine.broken is None


def test_an_adapter_that_never_fits_is_given_up(
    engine: Engine, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(source: Any) -> Any:
        tried.append(source)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(engine._adapters, "_read", full)
    engine.register("ad", tiny.NAME, adapters[0])
    with pytest.raises(GraftError) as caught:
        ask(engine, "ad", PROMPT, Sampling(2)).wait()
    assert caught.value.code == "device_full"
    assert len(tried) == 2


def settled(engine: Engine) -> Scheduler:
    """Of an engine that has answered a long prompt, and keeps it."""
    ask(engine, tiny.NAME, strong.prompt(200, seed=3), Sampling(2)).wait()
    while engine.state()["running"]:
        time.sleep(0.005)
    assert engine._scheduler is not None
    assert engine._scheduler.prefixes._blocks
    return engine._scheduler
