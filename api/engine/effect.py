"""Whether an adapter is at work, by the log probabilities that an engine tells with it and without."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

# Engines that batch tell other last digits each time: an adapter has to change more than that.
_CLEARLY = 2.0

Verdict = Literal["at work", "inert", "unclear"]


def verdict(adapter: Mapping[str, Any] | None, bases: Sequence[Mapping[str, Any] | None]) -> Verdict:
    """`adapter` and the two of `bases`: the `logprobs` of the same greedy completion, in the form of OpenAI's completions.

    "inert" is said where its numbers are those of the base model, "unclear" where the adapter differs no more than twice as much
    from the base model as that does from itself.
    """
    one, other = bases
    noise = _distance(one, other)
    effect = min(_distance(adapter, one), _distance(adapter, other))
    if effect == 0:
        return "inert"
    return "at work" if effect > _CLEARLY * noise else "unclear"


def _distance(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> float:
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


def _tops(told: Mapping[str, Any] | None) -> list[dict[str, float]]:
    return (told or {}).get("top_logprobs") or []
