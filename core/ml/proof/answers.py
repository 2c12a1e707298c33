"""Answers of a model, always with its most likely token: what the scoring of a row tells already, and the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


def go_on(
    base: Any,
    contract: Contract,
    rows: Sequence[Sequence[int]],
    drafts: Sequence[Draft],
    cache: Any,
    limit: int,
    tick: Tick,
) -> None:
    """Let the model finish the drafts. `cache` holds what it made of `rows`, padded on the left; None: nothing does."""
    stops = contract.stop_token_ids
    known = [row if cache else row[: draft.start] for row, draft in zip(rows, drafts, strict=True)]
    longest = cache.get_seq_length() if cache else max(map(len, known))
    ids, mask = [], []
    for row, draft in zip(known, drafts, strict=True):
        new = draft.tokens[-1:] if cache else draft.tokens
        pad = longest - len(row)
        # Of a row in the cache only what the draft shares with it is seen; the rest lies there unseen.
        seen = draft.start + len(draft.tokens) - 1 if cache else len(row)
        ids.append([stops[0]] * pad + [*row, *new])
        mask.append([0] * pad + [1] * seen + [0] * (len(row) - seen) + [1] * len(new))
    if not cache:
        widest = max(map(len, ids))
        ids = [[stops[0]] * (widest - len(row)) + row for row in ids]
        mask = [[0] * (widest - len(row)) + row for row in mask]
    base.generation_config = GenerationConfig()  # penalties of the model's makers must not mix in
    made = base.generate(
        input_ids=torch.tensor(ids, device=base.device),
        attention_mask=torch.tensor(mask, device=base.device),
        past_key_values=cache,
        generation_config=GenerationConfig(
            max_new_tokens=max(limit - len(draft.tokens) for draft in drafts),
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        ),
        stopping_criteria=StoppingCriteriaList([_Ticking(tick)]),
    )
    for draft, new in zip(drafts, made[:, len(ids[0]) :].tolist(), strict=True):
        draft.add(new, stops)


class _Roomy(DynamicLayer):
    """Keys and values with room for more: the library's own layer copies all of them for every new token."""

    def __init__(self, filled: Any, rows: torch.Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self._lying = [_wider(filled.keys[rows], room), _wider(filled.values[rows], room)]
        length = filled.keys.shape[-2]
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


def _wider(states: torch.Tensor, room: int) -> torch.Tensor:
    """States [rows, heads, tokens, width] at the beginning of a tensor for so many more tokens."""
    rows, heads, length, width = states.shape
    lying = states.new_empty(rows, heads, length + room, width)
    lying[:, :, :length] = states
    return lying


def with_room(cache: Any, rows: Sequence[int], room: int) -> Any:
    """The cache of these rows of a batch, with room for so many more tokens."""
    chosen = torch.tensor(rows)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        cache.batch_select_indices(chosen)
        return cache
    for place, layer in enumerate(cache.layers):
        cache.layers[place] = _Roomy(layer, chosen.to(layer.keys.device), room)
    return cache


class _Ticking(StoppingCriteria):
    """Ticks with every token, and ends nothing."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
