"""Linear layers that add another adapter's part to every stretch of a step's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, pad

# From so many adapters in a step on, one grouped product is faster than one after the other.
_GROUPED = 3


class Pair(NamedTuple):
    """A [r, inputs] and B [outputs, r], the scale multiplied into it."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """Its parts by the names of the model's layers. `digest` names its content, and is no part of a comparison: two in
    memory are two."""

    digest: str
    pairs: Mapping[str, Pair]


class Stretch(NamedTuple):
    """The tokens `start` to `end` of a step go through this adapter, too."""

    start: int
    end: int
    adapter: Adapter


class Routing:
    """Which tokens of the step at hand go through which adapter; those of no stretch through the base alone.

    Stretches follow one another from the first token on. What grouped products need of the adapters is kept while the
    same adapters follow one another, as they do from token to token.
    """

    def __init__(self) -> None:
        self.stretches: Sequence[Stretch] = ()
        self.ends: Tensor | None = None
        self._stacks: dict[str, tuple[Tensor, Tensor] | None] = {}

    def take(self, stretches: Sequence[Stretch], device: torch.device) -> None:
        if [one.adapter for one in stretches] != [one.adapter for one in self.stretches]:
            self._stacks = {}
        self.stretches = stretches
        self.ends = None
        if len(stretches) >= _GROUPED:
            self.ends = torch.tensor([one.end for one in stretches], dtype=torch.int32, device=device)

    def stack(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [adapters, inputs, r] and B [adapters, r, outputs] of a layer; None where no adapter has it."""
        if name not in self._stacks:
            self._stacks[name] = _stacked([one.adapter.pairs.get(name) for one in self.stretches])
        return self._stacks[name]


class Layer(nn.Module):
    def __init__(self, base: nn.Module, name: str, routing: Routing) -> None:
        super().__init__()
        self.base, self.name, self.routing = base, name, routing

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, inputs] -> [1, tokens, outputs]. Sums are rounded once, as peft does."""
        y: Tensor = self.base(x)
        routing = self.routing
        if routing.ends is not None:
            if (stack := routing.stack(self.name)) is not None:
                a, b = stack
                last = routing.stretches[-1].end
                rows = grouped_mm(x[0, :last].to(a.dtype), a, offs=routing.ends)
                y[0, :last] += grouped_mm(rows, b, offs=routing.ends)
            return y
        for start, end, adapter in routing.stretches:
            if (pair := adapter.pairs.get(self.name)) is not None:
                y[0, start:end] += (x[0, start:end].to(pair.a.dtype) @ pair.a.T) @ pair.b.T
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


def _stacked(pairs: Sequence[Pair | None]) -> tuple[Tensor, Tensor] | None:
    """Shorter ranks are filled up with zeros, and a missing layer is one of nothing but them."""
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return None
    # The kernels want rows of whole 16 bytes.
    rank = -(-max(len(pair.a) for pair in present) // 8) * 8
    none = Pair(
        present[0].a.new_zeros(0, present[0].a.shape[1]), present[0].b.new_zeros(len(present[0].b), 0)
    )
    full = [pair or none for pair in pairs]
    a = torch.stack([pad(pair.a, (0, 0, 0, rank - len(pair.a))) for pair in full])
    b = torch.stack([pad(pair.b, (0, rank - pair.b.shape[1])) for pair in full])
    return a.transpose(1, 2), b.transpose(1, 2)
