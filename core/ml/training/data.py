"""Rows of a data set file to what the trainer is fed: token ids and labels, through the prompt contract."""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from core.errors import BadRequest
from core.ml import prompts
from core.ml.formats import validate
from core.ml.formats.chat.example import Example
from core.ml.prompts import Contract, Encoded, LossOn
from core.ml.training.config import Training
from core.ml.training.run import Source

# What a job of unknown length gets at most; longer rows need an explicit max_length.
AUTO_LENGTH = 2048
_IGNORED = -100
_NAMED = 10


@dataclass
class Tokenised:
    """`examples` of {input_ids, labels}; of each its line and how many of its tokens are the prompt.

    `dropped` are the lines left out as too long, `truncated` those whose prompt was cut. `texts` says that
    the rows are plain texts without turns.
    """

    examples: list[dict[str, list[int]]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    longest: int = 0
    trained_tokens: int = 0
    texts: bool = False


def tokenise(source: Source, contract: Contract, *, context: int, training: Training) -> Tokenised:
    """Every row as it will be trained. `context` are the tokens that the model reads.

    Raises:
        BadRequest: `row_too_long` (policy error), `eos_not_trained` (more than 1 % of the rows never
            show the end of an answer), `no_trained_tokens`, and what `prompts.encode` refuses, with the line.
    """
    limit = min(AUTO_LENGTH, context) if training.max_length == "auto" else training.max_length
    if limit > context:
        raise BadRequest(
            "max_length_too_long",
            f"max_length {limit} is more than the {context} tokens the model reads.",
            param="training.max_length",
        )
    made = Tokenised()
    unfinished: list[int] = []
    for line, encoded in _encoded(source, contract, training.loss_on, made):
        fitting = _fit(contract, line, encoded, limit, training, made)
        if fitting is None:
            continue
        if not prompts.ends_trained(contract, fitting):
            unfinished.append(line)
        _add(made, line, fitting)
    if made.dropped and training.overlength != "drop":
        raise BadRequest(
            "row_too_long",
            f"{len(made.dropped)} rows are longer than {limit} tokens"
            + (" even without their prompt" if training.overlength == "truncate" else "")
            + f" (lines {_some(made.dropped)}).",
            param="training.max_length",
            hint='Raise training.max_length, or set training.overlength to "drop" to leave these rows out.',
        )
    if len(unfinished) > 0.01 * len(made.examples):
        raise BadRequest(
            "eos_not_trained",
            f"{len(unfinished)} of {len(made.examples)} rows do not train the end of the answer "
            f"(lines {_some(unfinished)}), so the model would not learn to stop.",
        )
    if not made.trained_tokens:
        why = f": {len(made.dropped)} rows are longer than {limit} tokens (lines {_some(made.dropped)})"
        raise BadRequest(
            "no_trained_tokens",
            f"No row is left that trains any token{why if made.dropped else ''}.",
            param="training.max_length" if made.dropped else None,
            hint="Raise training.max_length." if made.dropped else None,
        )
    return made


def _encoded(
    source: Source, contract: Contract, loss_on: LossOn, made: Tokenised
) -> Iterator[tuple[int, Encoded]]:
    lines: deque[int] = deque()

    def examples() -> Iterator[Example]:
        with source.path.open("rb") as file:
            for line, example in validate.conversations(file, source.reading):
                lines.append(line)
                made.texts = made.texts or isinstance(example, str)
                yield example

    for encoded in prompts.encode_all(contract, examples(), loss_on=loss_on):
        line = lines.popleft()
        if isinstance(encoded, BadRequest):
            raise encoded.within(f"Line {line}") from encoded
        yield line, encoded


def _fit(
    contract: Contract, line: int, encoded: Encoded, limit: int, training: Training, made: Tokenised
) -> Encoded | None:
    if len(encoded.ids) <= limit:
        return encoded
    cut = prompts.truncated(contract, encoded, limit) if training.overlength == "truncate" else None
    (made.dropped if cut is None else made.truncated).append(line)
    return cut


def _add(made: Tokenised, line: int, encoded: Encoded) -> None:
    made.lines.append(line)
    made.prompts.append(encoded.prompt)
    made.longest = max(made.longest, len(encoded.ids))
    made.trained_tokens += sum(encoded.trained)
    labels = [
        token if trained else _IGNORED for token, trained in zip(encoded.ids, encoded.trained, strict=True)
    ]
    made.examples.append({"input_ids": encoded.ids, "labels": labels})


def shared(train: Tokenised, valid: Tokenised) -> list[int]:
    """The lines of validation rows that are trained too: their loss proves nothing."""
    known = {hash(tuple(example["input_ids"])) for example in train.examples}
    return [
        line
        for line, example in zip(valid.lines, valid.examples, strict=True)
        if hash(tuple(example["input_ids"])) in known
    ]


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


def _some(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:_NAMED])
    return shown + (", …" if len(lines) > _NAMED else "")
