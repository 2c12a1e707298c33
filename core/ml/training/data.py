"""Rows of a data set file to what the trainer is fed: token ids and labels, through the prompt contract."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.errors import BadRequest
from core.ml import prompts
from core.ml.formats import chat, validate
from core.ml.prompts import Contract, LossOn
from core.ml.training.config import Training
from core.ml.training.run import Source

# What a job of unknown length gets at most; longer rows need an explicit max_length.
AUTO_LENGTH = 2048
_IGNORED = -100
_NAMED = 10


@dataclass(frozen=True)
class Tokenised:
    """`examples` of {input_ids, labels} and how many tokens of each are its prompt; `dropped` are the lines left out as too long."""

    examples: list[dict[str, list[int]]]
    prompts: list[int]
    dropped: list[int]
    longest: int
    trained_tokens: int


def tokenise(
    source: Source, contract: Contract, *, loss_on: LossOn, context: int, training: Training
) -> Tokenised:
    """Every row as it will be trained.

    Raises:
        BadRequest: `row_too_long` (policy error), `eos_not_trained` (more than 1 % of the rows never
            show the end of an answer), `no_trained_tokens`.
    """
    limit = min(AUTO_LENGTH, context) if training.max_length == "auto" else training.max_length
    if limit > context:
        raise BadRequest(
            "max_length_too_long",
            f"max_length {limit} is more than the {context} tokens the model reads.",
            param="training.max_length",
        )
    examples: list[dict[str, list[int]]] = []
    prompt_lengths: list[int] = []
    too_long: list[int] = []
    unfinished: list[int] = []
    trained_tokens = longest = 0
    for line, messages in _conversations(source):
        encoded = prompts.encode(contract, messages, loss_on=loss_on)
        if len(encoded.ids) > limit:
            too_long.append(line)
            continue
        if not prompts.ends_trained(contract, encoded):
            unfinished.append(line)
        prompt_lengths.append(encoded.prompt)
        longest = max(longest, len(encoded.ids))
        trained_tokens += sum(encoded.trained)
        labels = [
            token if trained else _IGNORED
            for token, trained in zip(encoded.ids, encoded.trained, strict=True)
        ]
        examples.append({"input_ids": encoded.ids, "labels": labels})
    if too_long and training.overlength == "error":
        raise BadRequest(
            "row_too_long",
            f"{len(too_long)} rows are longer than {limit} tokens (lines {_some(too_long)}).",
            param="training.max_length",
            hint='Raise training.max_length, or set training.overlength to "drop" to leave these rows out.',
        )
    if len(unfinished) > 0.01 * len(examples):
        raise BadRequest(
            "eos_not_trained",
            f"{len(unfinished)} of {len(examples)} rows do not train the end of the answer (lines {_some(unfinished)}), "
            "so the model would not learn to stop.",
        )
    if not trained_tokens:
        raise BadRequest("no_trained_tokens", "No row is left that trains any token.")
    return Tokenised(examples, prompt_lengths, too_long, longest, trained_tokens)


def split(tokenised: Tokenised, fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Training and validation examples. Rows with the same prompt stay on the same side."""
    train: list[Any] = []
    held_back: list[Any] = []
    for example, length in zip(tokenised.examples, tokenised.prompts, strict=True):
        prompt = repr((seed, example["input_ids"][:length])).encode()
        share = int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest()) / 2**64
        (held_back if share < fraction else train).append(example)
    if not train or not held_back:
        raise BadRequest(
            "validation_empty",
            f"A validation fraction of {fraction} leaves one side of {len(tokenised.examples)} rows empty.",
            param="validation.fraction",
            hint="Use more rows or another fraction.",
        )
    return train, held_back


def _conversations(source: Source) -> Iterator[tuple[int, list[chat.Turn]]]:
    with source.path.open("rb") as file:
        yield from validate.conversations(file, source.reading)


def _some(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:_NAMED])
    return shown + (", …" if len(lines) > _NAMED else "")
