"""Losses and answers of a model, row by row: each prompt is read once for both."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn.functional import cross_entropy

from core.ml.prompts import Contract
from core.ml.proof.answers import Answer, Draft, Pending, Tick, drafted, go_on
from core.ml.training.data import LabelledIds

_IGNORED = -100
# What a batch may hold: tokens, and numbers of scored positions times vocabulary.
_TOKENS = 4_096
_NUMBERS = 50_000_000
# Bytes of keys and values of answers that wait for each other: the more at a time, the fewer passes over the weights.
_CACHES = 2**30


class Asked(NamedTuple):
    """A row, and where in it the answer begins that the model shall give by itself; None: it is only scored."""

    example: LabelledIds
    start: int | None

    @property
    def scored(self) -> int:
        """Positions from the first that predicts something to the end."""
        labels = self.example["labels"]
        first = next((place for place, label in enumerate(labels) if label != _IGNORED), len(labels) - 1)
        return min(len(labels) - min(first, self.start or first) + 1, len(labels))


class Losses(NamedTuple):
    """`sums` of the trained tokens' losses and their `counts`, of each row."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The mean of all trained tokens, as training measures it."""
        return float(self.sums.sum() / max(self.counts.sum(), 1))

    @property
    def rows(self) -> NDArray[np.float64]:
        """The mean of each row's tokens."""
        return self.sums / np.maximum(self.counts, 1)

    def of(self, places: Sequence[int] | slice) -> "Losses":
        return Losses(self.sums[places], self.counts[places])


def measure(
    model: PeftModel, contract: Contract, asked: Sequence[Asked], limit: int, tick: Tick
) -> tuple[Losses, list[Answer | None]]:
    """The loss of every row, and an answer of at most `limit` tokens to those that ask for one.

    The model is in eval mode, its adapter switched on or off.
    """
    sums, counts = np.zeros(len(asked)), np.zeros(len(asked))
    drafts: dict[int, Draft] = {}
    pending: list[Pending] = []
    vocabulary = model.get_input_embeddings().num_embeddings
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].example["input_ids"]))
    while order:
        last = asked[order[-1]]
        size = max(1, min(_TOKENS // len(last.example["input_ids"]), _NUMBERS // (vocabulary * last.scored)))
        order, places = order[:-size], order[-size:]
        tick()
        with torch.inference_mode():
            losses, labels, begun, unfinished = _batch(
                model, contract, [asked[place] for place in places], limit
            )
            pending += unfinished
            if not order or sum(some.bytes for some in pending) > _CACHES:
                go_on(model.get_base_model(), contract, pending, limit, tick)
                pending = []
        sums[places] = losses.sum(1).double().cpu().numpy()
        counts[places] = (labels != _IGNORED).sum(1).double().cpu().numpy()
        drafts |= {place: draft for place, draft in zip(places, begun, strict=True) if draft is not None}
    answers = {place: draft.answer(contract, limit) for place, draft in drafts.items()}
    return Losses(sums, counts), [answers.get(place) for place in range(len(asked))]


def _batch(
    model: PeftModel, contract: Contract, batch: Sequence[Asked], limit: int
) -> tuple[torch.Tensor, torch.Tensor, list[Draft | None], list[Pending]]:
    """Losses and labels [rows, scored positions], how the answers begin, and those of them that are not whole.

    Rows are padded on the left, so that their answers lie together.
    """
    base = model.get_base_model()
    rows = [one.example["input_ids"] for one in batch]
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=base.device)
    keep = max(one.scored for one in batch)
    answering = any(one.start is not None for one in batch)
    # A model with a state instead of a cache cannot take back what it read.
    cached = answering and not base._is_stateful
    # Training rounds as autocast does; in half precision alone a small loss comes out two percent off.
    with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
        output = base(
            input_ids=_padded(rows, longest, contract.stop_token_ids[0], base.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=keep,
            use_cache=cached,
        )
    # A token is predicted at the position before it; the first of a row never is.
    labels = _padded(
        [[_IGNORED, *one.example["labels"][1:]] for one in batch], longest, _IGNORED, base.device
    )[:, longest - keep + 1 :]
    losses = cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
    )
    if not answering:
        return losses, labels, [None] * len(batch), []
    drafts = [
        None if one.start is None else _draft(contract, one, guesses, limit)
        for one, guesses in zip(batch, output.logits.argmax(-1).tolist(), strict=True)
    ]
    unfinished = {
        place: draft
        for place, draft in enumerate(drafts)
        if draft is not None and not draft.ended and len(draft.tokens) < limit
    }
    if not unfinished:
        return losses, labels, drafts, []
    if cached:
        output.past_key_values.batch_select_indices(torch.tensor(list(unfinished), device=base.device))
    some = [rows[place] for place in unfinished]
    cache = output.past_key_values if cached else None
    return losses, labels, drafts, [Pending(some, list(unfinished.values()), cache)]


def _draft(contract: Contract, one: Asked, guesses: list[int], limit: int) -> Draft:
    ids = one.example["input_ids"]
    assert one.start is not None  # noqa: S101 - for the type checker
    # The last guess is what follows the whole row; those before the scored positions are not known.
    tail = guesses[-len(ids) :]
    known = [-1] * (len(ids) + 1 - len(tail)) + tail
    return drafted(ids, known, one.start, contract.stop_token_ids, limit)


def _padded(rows: Sequence[list[int]], longest: int, filler: int, device: Any) -> torch.Tensor:
    return torch.tensor([[filler] * (longest - len(row)) + row for row in rows], device=device)
