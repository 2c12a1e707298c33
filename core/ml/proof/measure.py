"""The loss of a model, row by row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn.functional import cross_entropy

from core.ml.inference.greedy import Tick
from core.ml.training.data import LabelledIds

_IGNORED = -100
# What a batch may hold: tokens, and numbers of scored positions times vocabulary.
_TOKENS = 4_096
_NUMBERS = 50_000_000


def mean(rows: NDArray[np.float64]) -> float:
    """Of all tokens of these rows of (sum, count)."""
    return float(rows[:, 0].sum() / max(rows[:, 1].sum(), 1))


class Losses(NamedTuple):
    """`sums` of the trained tokens' losses and their `counts`, of each row."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The mean of all trained tokens, as training measures it."""
        return mean(self.rows)

    @property
    def rows(self) -> NDArray[np.float64]:
        """Sum and count of each row."""
        return np.stack([self.sums, self.counts], 1)

    def of(self, places: Sequence[int] | slice) -> "Losses":
        return Losses(self.sums[places], self.counts[places])


def losses(model: PeftModel, rows: Sequence[LabelledIds], tick: Tick) -> Losses:
    """The loss of every row. The model is in eval mode, its adapter switched on or off."""
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    vocabulary = model.get_input_embeddings().num_embeddings
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    while order:
        size, scored = 1, _scored(rows[order[-1]])
        most = _TOKENS // len(rows[order[-1]]["input_ids"])
        while size < min(most, len(order)):
            scored = max(scored, _scored(rows[order[-size - 1]]))
            if (size + 1) * scored * vocabulary > _NUMBERS:
                break
            size += 1
        order, places = order[:-size], order[-size:]
        tick()
        found, labels = _batch(model.get_base_model(), [rows[place] for place in places])
        sums[places] = found.sum(1).double().cpu().numpy()
        counts[places] = (labels != _IGNORED).sum(1).double().cpu().numpy()
    return Losses(sums, counts)


@torch.inference_mode()
def _batch(base: Any, batch: Sequence[LabelledIds]) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and labels [rows, scored positions]. Rows are padded on the left, so that their answers lie together."""
    longest = max(len(row["input_ids"]) for row in batch)
    mask = _padded([[1] * len(row["input_ids"]) for row in batch], longest, 0, base.device)
    keep = max(map(_scored, batch))
    # Training rounds as autocast does; in half precision alone a small loss comes out two percent off.
    with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
        logits = base(
            input_ids=_padded([row["input_ids"] for row in batch], longest, 0, base.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=keep,
            use_cache=False,
        ).logits
    # A token is predicted at the position before it; the first of a row never is.
    labels = _padded([[_IGNORED, *row["labels"][1:]] for row in batch], longest, _IGNORED, base.device)
    labels = labels[:, longest - keep + 1 :]
    found = cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
    )
    return found, labels


def _scored(row: LabelledIds) -> int:
    """Positions from the one before the first trained token to the end."""
    labels = row["labels"]
    first = next((place for place, label in enumerate(labels) if label != _IGNORED), len(labels) - 1)
    return min(len(labels) - first + 1, len(labels))


def _padded(rows: Sequence[list[int]], longest: int, filler: int, device: Any) -> torch.Tensor:
    return torch.tensor([[filler] * (longest - len(row)) + row for row in rows], device=device)
