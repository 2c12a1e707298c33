"""Linear layers that add another adapter's part to every stretch of a step's tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Adapters are multiplied together unless that multiplies more than so many times the rows there are.
_FILLED_UP = 2
# One alone is not stacked.
_FEWEST = 2


class Pair(NamedTuple):
    """A [inputs, r] and B [r, outputs], the scale multiplied into it: rows go through them from the left."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """Its parts by the names of the model's layers. Two in memory are two, whatever they hold."""

    pairs: Mapping[str, Pair]


class Stretch(NamedTuple):
    """The tokens `start` to `end` of a step go through this adapter, too."""

    start: int
    end: int
    adapter: Adapter


class Routing:
    """Which tokens of the step at hand go through which adapter; those of no stretch through the base alone.

    Stretches follow one another from the first token on. Where they are alike in length, as when every answer reads its
    last token, the adapters are multiplied together from stacks of their parts, which takes a quarter of the time of one
    after the other. An adapter keeps its seat in the stacks from step to step: one that comes is copied, the others stay.
    """

    def __init__(self) -> None:
        self.stretches: Sequence[Stretch] = ()
        self.together = False
        # Where the rows of each adapter stand, filled up to the most of them, and which of these are none but filling.
        self.places: Tensor | None = None
        self.rows: Tensor | None = None
        self._seats: list[Adapter] = []
        self._stacks: dict[str, _Stack] = {}

    def seats(self, adapters: Iterable[Adapter]) -> Mapping[Adapter | None, int]:
        """The order in which the stretches of the next step's adapters are to follow one another."""
        present = list(dict.fromkeys(adapters))
        if len(present) < _FEWEST or len(present) * 2 <= len(self._seats):
            self.forget()
        kept = self._seats[: len(present)]
        new = [one for one in present if one not in kept]
        seats = [one if one in present else new.pop() for one in kept] + new
        if seats != self._seats:
            self._seats = seats  # another list: by that the stacks see that somebody came or went
        return {one: seat for seat, one in enumerate(seats)}

    def take(self, stretches: Sequence[Stretch], device: torch.device) -> None:
        """The step's stretches, in the order of their seats."""
        self.stretches = stretches
        self.places = self.rows = None
        lengths = [one.end - one.start for one in stretches]
        most = max(lengths, default=0)
        self.together = len(stretches) >= _FEWEST and most * len(stretches) <= _FILLED_UP * sum(lengths)
        if self.together and most * len(stretches) > sum(lengths):
            places = [min(one.start + row, one.end - 1) for one in stretches for row in range(most)]
            rows = [number * most + row for number, length in enumerate(lengths) for row in range(length)]
            self.places = torch.tensor(places, device=device)
            self.rows = torch.tensor(rows, device=device)

    def forget(self) -> None:
        """Drop the stacks: they take as much memory again as the adapters, and keep these from being dropped."""
        self._seats, self._stacks = [], {}

    def added(self, name: str, x: Tensor) -> Tensor | None:
        """What the adapters add to the rows [tokens, inputs] of their stretches; None where none has this layer."""
        if name not in self._stacks:
            self._stacks[name] = _Stack(name)
        if (parts := self._stacks[name].of(self._seats)) is None:
            return None
        if self.places is not None:
            x = x[self.places]
        rows = x.to(parts.a.dtype).view(len(parts.a), -1, x.shape[-1])
        made = torch.bmm(torch.bmm(rows, parts.a), parts.b).view(-1, parts.b.shape[-1])
        return made if self.rows is None else made[self.rows]


class _Stack:
    """The parts of several adapters for one layer: [adapters, inputs, r] and [adapters, r, outputs]."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._seated: list[Adapter] = []
        self._parts: Pair | None = None
        # More seats than are taken.
        self._room: Pair | None = None

    def of(self, seats: list[Adapter]) -> Pair | None:
        """Shorter ranks are filled up with zeros; an adapter without this layer is nothing but them."""
        if self._seated is not seats:
            self._seat(seats)
        return self._parts

    def _seat(self, seats: list[Adapter]) -> None:
        # Should memory run out on the way, nobody sits here.
        before, self._seated, self._parts = self._seated, [], None
        pairs = [one.pairs.get(self.name) for one in seats]
        present = [pair for pair in pairs if pair is not None]
        if present:
            rank = max(len(pair.b) for pair in present)
            if self._room is None or len(self._room.a) < len(seats) or self._room.b.shape[1] < rank:
                a, b = present[0]
                size = len(seats) if self._room is None else 2 * len(seats)
                self._room, before = None, []
                self._room = Pair(a.new_empty(size, len(a), rank), b.new_empty(size, rank, b.shape[1]))
            parts = Pair(self._room.a[: len(seats)], self._room.b[: len(seats)])
            for seat, (one, pair) in enumerate(zip(seats, pairs, strict=True)):
                if seat >= len(before) or before[seat] is not one:
                    _put(parts, seat, pair)
            self._parts = parts
        else:
            self._room = None
        self._seated = seats


def _put(parts: Pair, seat: int, pair: Pair | None) -> None:
    rank = 0 if pair is None else len(pair.b)
    if pair is not None:
        parts.a[seat, :, :rank] = pair.a
        parts.b[seat, :rank] = pair.b
    parts.a[seat, :, rank:] = 0
    parts.b[seat, rank:] = 0


class Layer(nn.Module):
    def __init__(self, base: nn.Module, name: str, routing: Routing) -> None:
        super().__init__()
        self.base, self.name, self.routing = base, name, routing

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, inputs] -> [1, tokens, outputs]. Sums are rounded once, as peft does."""
        y: Tensor = self.base(x)
        routing = self.routing
        if routing.together:
            last = routing.stretches[-1].end
            if (added := routing.added(self.name, x[0, :last])) is not None:
                y[0, :last] += added
            return y
        for start, end, adapter in routing.stretches:
            if (pair := adapter.pairs.get(self.name)) is not None:
                y[0, start:end] += (x[0, start:end].to(pair.a.dtype) @ pair.a) @ pair.b
        return y


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Every layer that adapters can be added to, by its name: the linear ones but the head."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


def wrap(model: Any, routing: Routing) -> None:
    for name, layer in linear_layers(model).items():
        model.set_submodule(name, Layer(layer, name, routing))


def unwrap(model: Any) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Layer):
            model.set_submodule(name, layer.base)
