"""The processes of one training, each with a device of its own: what they agree on. Every rank does the same and only
the first one tells and writes, so that none waits for a word that never comes. With one process nothing happens here.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import distributed
from torch.utils.data import Sampler

from core.ml import base_model
from core.ml.training.data import LabelledIds

# Of a collective operation: one rank may wait so long for another that evaluates or makes the quantised model.
_PATIENCE = timedelta(hours=2)
# Too short to cost anything; without labels, so that it adds nothing to a loss.
_BLANK: LabelledIds = {"input_ids": [0, 0], "labels": [-100, -100]}


def join() -> None:
    """Meet the other ranks that `accelerate launch` started, over gloo or NCCL, and take this rank's device."""
    PartialState(cpu=base_model.device().type == "cpu", timeout=_PATIENCE)


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    return index() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    agreed(False)


def agreed(flag: bool) -> bool:
    """Whether any rank says so."""
    return flag if count() == 1 else _reduced(int(flag), distributed.ReduceOp.MAX) > 0


def mean(value: float) -> float:
    return value if count() == 1 else _reduced(value, distributed.ReduceOp.SUM) / count()


def least(value: int) -> int:
    return value if count() == 1 else int(_reduced(value, distributed.ReduceOp.MIN))


def joined(numbers: Sequence[int]) -> list[int]:
    """The numbers of all ranks."""
    if count() == 1:
        return list(numbers)
    most = -int(_reduced(-len(numbers), distributed.ReduceOp.MIN))
    device = base_model.device()
    mine = torch.tensor([len(numbers), *numbers] + [0] * (most - len(numbers)), device=device)
    every = [torch.empty_like(mine) for _ in range(count())]
    distributed.all_gather(every, mine)
    return [number for size, *row in (one.tolist() for one in every) for number in row[:size]]


def _reduced(value: float, how: distributed.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=base_model.device())
    distributed.all_reduce(tensor, how)
    return float(tensor)


def evened(examples: list[LabelledIds], batch_size: int) -> list[LabelledIds]:
    """The rows, and after them as many without a label as give every rank as many full batches.

    The library would take rows twice instead, and their loss would be another one than that of one process.
    """
    if count() == 1 or not examples:
        return examples
    blank = _BLANK | ({"seq_lengths": [2]} if "seq_lengths" in examples[0] else {})
    return examples + [blank] * (-len(examples) % (batch_size * count()))


class Evened(Sampler[int]):
    """The places of the rows in `order`, then those of the rows that `evened` added."""

    def __init__(self, order: Sampler[int], rows: int, size: int) -> None:
        self.order, self.rows, self.size = order, rows, size

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from range(self.rows, self.size)

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)  # type: ignore[attr-defined]  # accelerate's, whose seed follows the epoch
