"""Linear layers that add another adapter's part to every stretch of a step's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Adapters are multiplied together unless that multiplies more than so many times the rows there are.
_FILLED_UP = 2


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
    last token, the adapters are stacked and multiplied together, which takes a quarter of the time of one after the
    other. The stacks are kept while the same adapters follow one another, and dropped with most of them.
    """

    def __init__(self) -> None:
        self.stretches: Sequence[Stretch] = ()
        self.together = False
        # Where the rows of each adapter stand, filled up to the most of them, and which of these are none but filling.
        self.places: Tensor | None = None
        self.rows: Tensor | None = None
        self._adapters: list[Adapter] = []
        self._stacks: dict[str, Pair | None] = {}

    def take(self, stretches: Sequence[Stretch], device: torch.device) -> None:
        self.stretches = stretches
        self.places = self.rows = None
        lengths = [one.end - one.start for one in stretches]
        most = max(lengths, default=0)
        self.together = len(stretches) > 1 and most * len(stretches) <= _FILLED_UP * sum(lengths)
        if not self.together:
            if len(stretches) * 2 <= len(self._adapters):
                self.forget()
            return
        if (adapters := [one.adapter for one in stretches]) != self._adapters:
            self._adapters, self._stacks = adapters, {}
        if most * len(stretches) > sum(lengths):
            places = [min(one.start + row, one.end - 1) for one in stretches for row in range(most)]
            rows = [number * most + row for number, length in enumerate(lengths) for row in range(length)]
            self.places = torch.tensor(places, device=device)
            self.rows = torch.tensor(rows, device=device)

    def forget(self) -> None:
        """Drop the stacks: they take as much memory again as the adapters, and keep these from being dropped."""
        self._adapters, self._stacks = [], {}

    def added(self, name: str, x: Tensor) -> Tensor | None:
        """What the adapters add to the rows [tokens, inputs] of their stretches; None where none has this layer."""
        if name not in self._stacks:
            self._stacks[name] = _stacked([adapter.pairs.get(name) for adapter in self._adapters])
        if (stack := self._stacks[name]) is None:
            return None
        if self.places is not None:
            x = x[self.places]
        rows = x.to(stack.a.dtype).view(len(self._adapters), -1, x.shape[-1])
        made = torch.bmm(torch.bmm(rows, stack.a), stack.b).view(-1, stack.b.shape[-1])
        return made if self.rows is None else made[self.rows]


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


def _stacked(pairs: Sequence[Pair | None]) -> Pair | None:
    """[adapters, inputs, r] and [adapters, r, outputs]. Shorter ranks are filled up with zeros; a missing layer is one of
    nothing but them."""
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return None
    a, b = present[0]
    rank = max(len(pair.b) for pair in present)
    stack = Pair(a.new_zeros(len(pairs), len(a), rank), b.new_zeros(len(pairs), rank, b.shape[1]))
    for number, pair in enumerate(pairs):
        if pair is not None:
            stack.a[number, :, : len(pair.b)] = pair.a
            stack.b[number, : len(pair.b)] = pair.b
    return stack
