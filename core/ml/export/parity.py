"""How near two models are to each other: the same prompts through both, next-token distributions compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn import functional

from core.errors import BadRequest, GraftError
from core.ml import prompts
from core.ml.formats import validate
from core.ml.formats.chat.example import Conversation, Example, Turn
from core.ml.inference import greedy
from core.ml.prompts import Contract, Encoded
from core.ml.training.run import Source

SAMPLES = 8
# Longer rows cost time, and more positions memory: each is a whole vocabulary of numbers.
_MAX_TOKENS = 1024
_MAX_POSITIONS = 128
# Rows looked at until there are enough that are short.
_TRIED = 200
_ANSWERS = 4
_ANSWER_TOKENS = 24
_TEXTS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("List three colours.", "1. Red\n2. Green\n3. Blue"),
    ("Write a SQL query that counts the rows of table users.", "SELECT COUNT(*) FROM users;"),
    ("Translate to German: Good morning, how are you?", "Guten Morgen, wie geht es dir?"),
    ("What is 17 + 25?", "17 + 25 = 42."),
    ('Answer in JSON: {"city": "Rome"}', '{"country": "Italy"}'),
    ("Why is the sky blue?", "Because air scatters blue light more than red light."),
    ("Say hello.", "Hello! How can I help you?"),
)


@dataclass(frozen=True)
class Look:
    """What a model says to each sample: log probabilities (positions, vocabulary), and greedy answers as ids."""

    scores: list[torch.Tensor]
    answers: list[list[int]]


def samples(contract: Contract, rows: Source | None) -> tuple[list[Encoded], str]:
    """The first short rows of the data, or a few conversations of our own; and which of them: data set, built in.

    Raises:
        GraftError: `contract_broken`, the prompt contract renders none of them.
    """
    if rows and (found := list(islice(_short(contract, _rows(rows)), SAMPLES))):
        return found, "data set"
    if found := list(_short(contract, _own(contract))):
        return found, "built in"
    raise GraftError("contract_broken", "The adapter's chat template renders no plain question and answer.")


def look(model: Any, contract: Contract, encoded: list[Encoded], *, answers: bool = True) -> Look:
    """Run the samples through the model, one by one, so that no padding has a part in it."""
    model.eval()
    with torch.inference_mode():
        scores = [_scores(model, sample) for sample in encoded]
        asked = [sample for sample in encoded if sample.prompt][:_ANSWERS] if answers else []
        return Look(scores, [_answer(model, contract, sample.ids[: sample.prompt]) for sample in asked])


def compare(reference: Look, other: Look) -> dict[str, float | int]:
    """Kullback-Leibler divergence of `other` from `reference` in nats, and how often both choose the same."""
    divergences, same = [], 0
    for expected, found in zip(reference.scores, other.scores, strict=True):
        # What is not there has no part in the sum; -inf - -inf would be no number.
        terms = expected.exp() * (expected - found)
        divergences.append(torch.where(expected.isneginf(), 0.0, terms).sum(-1))
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    all_positions = torch.cat(divergences)
    pairs = list(zip(reference.answers, other.answers, strict=False))
    return {
        "samples": len(reference.scores),
        "positions": len(all_positions),
        "mean_kl": round(float(all_positions.mean().clamp(min=0)), 6),
        "max_kl": round(float(all_positions.max().clamp(min=0)), 6),
        "top1_agreement": round(same / len(all_positions), 4),
        "answers": len(pairs),
        "answers_equal": sum(one == two for one, two in pairs),
    }


def largest_difference(one: Look, two: Look) -> float:
    """Of any log probability, in nats."""
    pairs = zip(one.scores, two.scores, strict=True)
    return max(float((left - right).abs().max()) for left, right in pairs)


def _scores(model: Any, sample: Encoded) -> torch.Tensor:
    """The log probabilities from which the trained tokens would be drawn."""
    logits = model(input_ids=torch.tensor([sample.ids])).logits[0]
    places = [i - 1 for i, trained in enumerate(sample.trained) if trained and i]
    return functional.log_softmax(logits[places[:_MAX_POSITIONS]].float(), dim=-1)


def _answer(model: Any, contract: Contract, ids: list[int]) -> list[int]:
    (answer,) = greedy.tokens(model, contract, [ids], _ANSWER_TOKENS)
    return answer


def _rows(rows: Source) -> Iterator[Example]:
    with rows.path.open("rb") as file:
        for _, example in islice(validate.conversations(file, rows.reading), _TRIED):
            yield example


def _own(contract: Contract) -> Iterator[Example]:
    for question, answer in _TEXTS:
        if contract.rows == "text":
            yield f"{question} {answer}"
        else:
            turns = [Turn(role="user", content=question), Turn(role="assistant", content=answer)]
            yield Conversation(turns)


def _short(contract: Contract, examples: Iterator[Example]) -> Iterator[Encoded]:
    for encoded in prompts.encode_all(contract, examples):
        if (
            not isinstance(encoded, BadRequest)
            and len(encoded.ids) <= _MAX_TOKENS
            and any(encoded.trained[1:])
        ):
            yield encoded
