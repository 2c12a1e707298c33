"""Adapters that each answer in a way of their own, and what transformers and peft alone answer with them in float32."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any

from tests.ml.inference import strong

TOKENS = 16
# Some share whole blocks of their beginnings.
PROMPTS = [strong.prompt(20), *(strong.prompt(70)[:-6] + strong.prompt(6, seed) for seed in range(3))]
VERSIONS = 2
_END = 2
# So many the tokenizer of the tiny model has.
_TEXTS = 306


@dataclass
class Canaries:
    """The tokens that each version of each adapter (None: the base) answers to each prompt; text where it was seen."""

    tokens: dict[tuple[str | None, int, int], list[int]] = field(default_factory=dict)
    texts: dict[tuple[int, ...], str] = field(default_factory=dict)


def make(folder: Path, names: list[str]) -> tuple[Path, Canaries]:
    """The base model, `VERSIONS` of each adapter, and what they answer: no two the same to any prompt."""
    base, canaries, seeds = strong.model(folder / "base", strong.CONFIGURATIONS["llama"]), Canaries(), count()
    taken = set[tuple[int, ...]]()
    _learn(canaries, None, 0, strong.loaded(base), taken)
    for name, version in product(names, range(VERSIONS)):
        path = folder / "storage" / f"{name}-{version}"
        while not _learn(
            canaries, name, version, strong.loaded(base, strong.adapter(path, base, next(seeds))), taken
        ):
            pass
    return base, canaries


def _learn(
    canaries: Canaries, name: str | None, version: int, model: Any, taken: set[tuple[int, ...]]
) -> bool:
    """Write its answers down, and among those `taken`; False where another answers so already."""
    answers = [written(strong.alone(model, prompt, TOKENS, [_END])) for prompt in PROMPTS]
    new = {(number, *tokens) for number, tokens in enumerate(answers)}
    if new & taken:
        return False
    canaries.tokens |= {(name, version, number): tokens for number, tokens in enumerate(answers)}
    taken |= new
    return True


def written(tokens: Iterable[int]) -> list[int]:
    """Without the end token, and those that the model has beyond its tokenizer's: without a text they are no part of an
    answer, and at its end not told of."""
    return [token for token in tokens if token != _END and token < _TEXTS]
