"""A base model that reads the tokens of many sequences in one pass, each through its own adapter."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.ml.inference.batch import attention, lora, packed
from core.ml.inference.batch.attention import Cache, Span
from core.ml.inference.batch.lora import Adapter, Routing, Stretch

# Each has a test that compares it with transformers' generate, token for token.
ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Phi3ForCausalLM",
    }
)
# Others choose their frequencies by the longest position of a step: one sequence would change its neighbours.
_ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})


class Row(NamedTuple):
    """Tokens that a sequence reads next. `answered`: the logits after the last of them are asked for."""

    cache: Cache
    tokens: Sequence[int]
    adapter: Adapter | None
    answered: bool


def supported(config: Any) -> bool:
    """Whether a model with this configuration is read in batches, with the numbers of a request alone."""
    known = any(name in ARCHITECTURES for name in config.architectures or ())
    return known and all(kind in _ROTATIONS for kind in _rotations(getattr(config, "rope_parameters", None)))


def _rotations(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, dict):
        for key, value in parameters.items():
            if key in ("rope_type", "type"):
                yield value
            else:
                yield from _rotations(value)


class Batched:
    def __init__(self, model: Any) -> None:
        """`model` is changed until `close`."""
        self.model = model
        self.routing = Routing()
        self._attention = model.config._attn_implementation
        lora.wrap(model, self.routing)
        self._packed = packed.pack(model)
        attention.install(model)

    def close(self) -> None:
        """Give the model back as it was."""
        packed.unpack(self.model)
        lora.unwrap(self.model)
        self.model.set_attn_implementation(self._attention)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of a token."""
        return torch.Size(attention.shape(self.model.config, 1)).numel() * self.model.dtype.itemsize

    def cache(self, most: int) -> Cache:
        return attention.empty(self.model.config, most, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def read(self, rows: Sequence[Row]) -> Tensor:
        """Read the rows' tokens into their caches; float32 logits [answered rows, vocabulary].

        An error leaves the lengths of all caches as they were: the step can be done again.
        """
        seats = self.routing.seats(row.adapter for row in rows if row.adapter is not None)
        # Neighbours that share an adapter are multiplied together; the base's stand last.
        order = sorted(range(len(rows)), key=lambda place: seats.get(rows[place].adapter, len(seats)))
        ids: list[int] = []
        places: list[int] = []
        spans: list[Span] = []
        last: dict[int, int] = {}
        stretches: list[Stretch] = []
        for adapter, group in groupby(order, key=lambda place: rows[place].adapter):
            start = len(ids)
            for place in group:
                row = rows[place]
                spans.append(Span(len(ids), len(ids) + len(row.tokens), row.cache))
                ids += row.tokens
                places += range(row.cache.length, row.cache.length + len(row.tokens))
                last[place] = len(ids) - 1
            if adapter is not None:
                stretches.append(Stretch(start, len(ids), adapter))
        if self._packed:
            # Tokens that belong to nobody, behind all others.
            filling = packed.filled_up(len(ids)) - len(ids)
            ids += [0] * filling
            places += [0] * filling
        device = self.model.device
        self.routing.take(stretches, device)
        wanted = [last[place] for place, row in enumerate(rows) if row.answered]
        logits: Tensor = self.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([places], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
            spans=spans,
        ).logits[0]
        for span in spans:
            span.cache.length += span.end - span.start
        return logits.float()
