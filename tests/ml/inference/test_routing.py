"""Adapters that come and go keep their seats in the stacks, and nobody gets another's parts."""

import random

import pytest
import torch
from torch import Tensor, nn

from core.ml.inference.batch import lora
from core.ml.inference.batch.lora import Adapter, Layer, Pair, Routing, Stretch

_WIDTH = 8


def adapter(seed: int) -> Adapter:
    """Of another rank than its neighbours, and without some layer."""
    draw = torch.Generator().manual_seed(seed)
    rank = 1 + seed % 5
    pairs = {
        name: Pair(torch.randn(_WIDTH, rank, generator=draw), torch.randn(rank, _WIDTH, generator=draw))
        for name in ("one", "two", "three")
    }
    if seed % 4:
        del pairs[("one", "two", "three")[seed % 3]]
    return Adapter(pairs)


def wanted(layer: Layer, x: Tensor, stretches: list[Stretch]) -> Tensor:
    y: Tensor = layer.base(x)
    for start, end, one in stretches:
        if (pair := one.pairs.get(layer.name)) is not None:
            y[0, start:end] += x[0, start:end] @ pair.a @ pair.b
    return y


@torch.inference_mode()
def step(routing: Routing, layers: list[Layer], adapters: list[Adapter], lengths: list[int]) -> None:
    """Every layer adds to each stretch what its adapter has for it; the last row is the base's."""
    seats = routing.seats(adapters)
    assert sorted(seats.values()) == list(range(len(adapters)))
    stretches, start = [], 0
    for one, length in sorted(zip(adapters, lengths, strict=True), key=lambda item: seats[item[0]]):
        stretches.append(Stretch(start, start := start + length, one))
    routing.take(stretches, torch.device("cpu"))
    x = torch.randn(1, start + 1, _WIDTH)
    for layer in layers:
        torch.testing.assert_close(layer(x), wanted(layer, x, stretches), rtol=1e-4, atol=1e-4)


def test_whoever_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    put = lora._put
    monkeypatch.setattr(lora, "_put", lambda *args: (copied.append(args), put(*args)))
    routing, draw = Routing(), random.Random(1)
    layers = [Layer(nn.Linear(_WIDTH, _WIDTH), name, routing) for name in ("one", "two", "three")]
    known = [adapter(seed) for seed in range(12)]
    present: list[Adapter] = []
    for number in range(400):
        # One comes or goes; now and then many do.
        changes = 1 if number % 7 else draw.randrange(12)
        for one in draw.sample(known, changes):
            present.remove(one) if one in present else present.append(one)
        even = draw.random() < 0.5
        lengths = [1 if even else draw.randrange(1, 5) for _ in present]
        step(routing, layers, draw.sample(present, len(present)), lengths)
    assert copied


def test_those_who_stay_are_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = Routing()
    layers = [Layer(nn.Linear(_WIDTH, _WIDTH), "one", routing)]
    known = [adapter(4 * seed) for seed in range(6)]
    step(routing, layers, known[:5], [1] * 5)
    step(routing, layers, known[:4], [1] * 4)
    copied = []
    put = lora._put
    monkeypatch.setattr(lora, "_put", lambda *args: (copied.append(args[1]), put(*args)))
    step(routing, layers, known[3::-1], [1] * 4)
    step(routing, layers, known[1:4], [1] * 3)
    assert len(copied) == 1  # the one from the last seat took the free one
    step(routing, layers, [*known[1:4], known[5]], [1] * 4)
    assert len(copied) == 2


def test_memory_that_runs_out_in_the_middle_leaves_nobody_without_his_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routing = Routing()
    layers = [Layer(nn.Linear(_WIDTH, _WIDTH), "one", routing)]
    known = [adapter(4 * seed) for seed in range(4)]
    step(routing, layers, known[:3], [1] * 3)
    put = lora._put

    def short(parts: Pair, seat: int, pair: Pair | None) -> None:
        put(parts, seat, pair)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(lora, "_put", short)
        with pytest.raises(torch.OutOfMemoryError):
            step(routing, layers, known[1:], [1] * 3)
    step(routing, layers, known[1:], [1] * 3)
    step(routing, layers, known[:3], [1] * 3)
