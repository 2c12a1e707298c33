"""Whether an adapter is at work, by the log probabilities that an engine tells with it and without."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any, Literal

# Engines that batch tell other last digits at times, of some answers and not of others: an adapter has to change more.
_CLEARLY = 2.0

Verdict = Literal["at work", "inert", "unclear"]
Told = Mapping[str, Any] | None


def verdict(adapter: Sequence[Told], base: Sequence[Told]) -> Verdict:
    """`adapter`, `base`: the `logprobs` of the same greedy completion, several of each, in the form of OpenAI's completions.

    "inert" is said where one of the adapter's is one of the base model's, "unclear" where they differ no more than twice
    as much from each other as those of one of them do among themselves.
    """
    effect = min(_distance(*pair) for pair in product(adapter, base))
    if effect == 0:
        return "inert"
    noise = max(_distance(*pair) for told in (adapter, base) for pair in combinations(told, 2))
    return "at work" if effect > _CLEARLY * noise else "unclear"


def _distance(one: Told, other: Told) -> float:
    """The mean difference of the likeliest tokens' log probabilities, as far as both continue the same text; infinite where
    no token is among the likeliest of both."""
    apart: list[float] = []
    for this, that in zip(_tops(one), _tops(other), strict=False):
        shared = this.keys() & that.keys()
        if not shared:
            return float("inf")
        apart += [abs(this[token] - that[token]) for token in shared]
        if max(this, key=this.__getitem__) != max(that, key=that.__getitem__):
            break
    return sum(apart) / max(len(apart), 1)


def _tops(told: Told) -> list[dict[str, float]]:
    """Up to the first place of which nothing is told."""
    tops: list[dict[str, float]] = []
    for top in (told or {}).get("top_logprobs") or []:
        if not top:
            break
        tops.append(top)
    return tops
