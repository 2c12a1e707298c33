"""Answers of a model, always with its most likely token: what the scoring of a row tells already, and the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from core.ml import prompts
from core.ml.prompts import Contract

_MOST_NEW = 512
_SPARE = 8

# Called again and again, to show that the work goes on; raises to end it.
Tick = Callable[[], None]


@dataclass(frozen=True)
class Answer:
    """`stop`: the model ended the answer itself; `length`: it was cut."""

    text: str
    finish_reason: Literal["stop", "length"]


def most_new(lengths: Sequence[int]) -> int:
    """Tokens that an answer may have: some more than the longest expected one, or half as many again as nearly all."""
    ordered = sorted(lengths)
    usual = int(1.5 * ordered[int(0.95 * (len(ordered) - 1))])
    return min(min(usual, ordered[-1]) + _SPARE, _MOST_NEW)


@dataclass
class Draft:
    """The beginning of an answer: `tokens`, all but the last of which are those of the row; `ended` by the model."""

    start: int
    tokens: list[int]
    ended: bool

    def answer(self, contract: Contract, limit: int) -> Answer:
        text = prompts.text_of(contract, self.tokens[:limit])
        return Answer(text, "stop" if self.ended and len(self.tokens) <= limit else "length")

    def add(self, new: Sequence[int], stops: Sequence[int]) -> None:
        """Tokens that the model went on with."""
        end = next((place for place, token in enumerate(new) if token in stops), None)
        self.tokens += new[:end]
        self.ended = end is not None


def drafted(
    ids: Sequence[int], guesses: Sequence[int], start: int, stops: Sequence[int], limit: int
) -> Draft:
    """What the model answers after the first `start` tokens of a row, as far as scoring the row tells.

    `guesses[n]` is its most likely token after the first n of `ids`. As long as they are those of the row, the next
    one is known too.
    """
    draft = Draft(start, [], ended=False)
    for place in range(start, min(start + limit, len(ids) + 1)):
        guess = guesses[place]
        if guess in stops:
            draft.ended = True
            break
        draft.tokens.append(guess)
        if place == len(ids) or ids[place] != guess:
            break
    return draft


class Pending(NamedTuple):
    """Rows of a batch whose drafts are not whole, and what the model made of them, padded on the left.

    `cache` None: the model keeps a state instead, which cannot take back what it read.
    """

    rows: list[list[int]]
    drafts: list[Draft]
    cache: Any | None

    @property
    def bytes(self) -> int:
        layers = self.cache.layers if self.cache is not None else ()
        return sum(states.nbytes for layer in layers for states in (layer.keys, layer.values))


def go_on(base: Any, contract: Contract, pending: Sequence[Pending], limit: int, tick: Tick) -> None:
    """Let the model finish the drafts: all rows at a time, where their caches can be put together."""
    if any(type(layer) is not DynamicLayer for some in pending if some.cache for layer in some.cache.layers):
        for some in pending:
            _finish(base, contract, some, limit, tick)
    elif pending:
        rows = [row for some in pending for row in some.rows]
        drafts = [draft for some in pending for draft in some.drafts]
        _finish(base, contract, Pending(rows, drafts, _together(pending, limit)), limit, tick)


def _finish(base: Any, contract: Contract, some: Pending, limit: int, tick: Tick) -> None:
    stops = contract.stop_token_ids
    ids, mask = [], []
    for row, draft in zip(some.rows, some.drafts, strict=True):
        if some.cache is None:
            ids.append(row[: draft.start] + draft.tokens)
            mask.append([1] * len(ids[-1]))
        else:
            # Of a row in the cache only what the draft shares with it is seen; the rest lies there unseen.
            seen = draft.start + len(draft.tokens) - 1
            ids.append([*row, draft.tokens[-1]])
            mask.append([1] * seen + [0] * (len(row) - seen) + [1])
    widest = max(map(len, ids)) if some.cache is None else some.cache.get_seq_length() + 1
    base.generation_config = GenerationConfig()  # penalties of the model's makers must not mix in
    made = base.generate(
        input_ids=torch.tensor([[stops[0]] * (widest - len(row)) + row for row in ids], device=base.device),
        attention_mask=torch.tensor([[0] * (widest - len(row)) + row for row in mask], device=base.device),
        past_key_values=some.cache,
        generation_config=GenerationConfig(
            max_new_tokens=max(limit - len(draft.tokens) for draft in some.drafts),
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        ),
        stopping_criteria=StoppingCriteriaList([_Ticking(tick)]),
    )
    for draft, new in zip(some.drafts, made[:, widest:].tolist(), strict=True):
        draft.add(new, stops)


def _together(pending: Sequence[Pending], room: int) -> Any | None:
    """One cache of all rows, with room for so many more tokens."""
    caches = [some.cache for some in pending if some.cache is not None]
    if not caches:
        return None
    for place, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        caches[0].layers[place] = _Roomy(layers, room)
        for cache in caches[1:]:
            cache.layers[place] = None  # two copies of a layer at a time, not of all of them
    return caches[0]


class _Roomy(DynamicLayer):
    """Keys and values with room for more: the library's own layer copies all of them for every new token."""

    def __init__(self, filled: Sequence[Any], room: int) -> None:
        super().__init__()
        self.lazy_initialization(filled[0].keys, filled[0].values)
        length = max(layer.keys.shape[-2] for layer in filled)
        self._lying = [
            _wider([layer.keys for layer in filled], length, room),
            _wider([layer.values for layer in filled], length, room),
        ]
        self.keys, self.values = (lying[:, :, :length] for lying in self._lying)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._lying[0].shape[-2]:
            return super().update(key_states, value_states, *args, **kwargs)
        for lying, new in zip(self._lying, (key_states, value_states), strict=True):
            lying[:, :, start:end] = new
        self.keys, self.values = (lying[:, :, :end] for lying in self._lying)
        return self.keys, self.values


def _wider(parts: Sequence[torch.Tensor], length: int, room: int) -> torch.Tensor:
    """States [rows, heads, tokens, width] below one another, padded on the left to `length`, and room on the right."""
    rows = sum(len(states) for states in parts)
    _, heads, _, width = parts[0].shape
    # Zeros: what is masked must be numbers all the same.
    lying = parts[0].new_zeros(rows, heads, length + room, width)
    start = 0
    for states in parts:
        lying[start : start + len(states), :, length - states.shape[-2] : length] = states
        start += len(states)
    return lying


class _Ticking(StoppingCriteria):
    """Ticks with every token, and ends nothing."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
