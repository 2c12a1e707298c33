"""Several short rows in one long one. No torch: a plan counts steps with it."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from core.ml.training.data import LabelledIds


def packs(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Places of rows that go together, `limit` tokens at most: each, longest first, where it fits best."""
    made: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, pack), sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect_left(room, (lengths[place], -1))
        if at < len(room):
            free, pack = room.pop(at)
        else:
            free, pack = limit, len(made)
            made.append([])
        made[pack].append(place)
        insort(room, (free - lengths[place], pack))
    return made


def packed(examples: Sequence[LabelledIds], limit: int) -> list[LabelledIds]:
    """Rows of {input_ids, labels, seq_lengths}: the last says where one document ends and the next begins."""
    return [
        {
            "input_ids": [token for place in pack for token in examples[place]["input_ids"]],
            "labels": [label for place in pack for label in examples[place]["labels"]],
            "seq_lengths": [len(examples[place]["input_ids"]) for place in pack],
        }
        for pack in packs([len(example["input_ids"]) for example in examples], limit)
    ]
