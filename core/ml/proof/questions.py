"""Rows as questions: the prompt's tokens, and the answer that is expected. No torch."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from core.errors import BadRequest
from core.ml import prompts
from core.ml.formats import validate
from core.ml.formats.chat.example import Conversation
from core.ml.prompts import Contract, Encoded
from core.ml.scores.choice import Row
from core.ml.training.data import Rows
from core.ml.training.run import Run, Source


@dataclass(frozen=True)
class Question:
    """`ids` are the tokens before the last answer of a conversation, as in training; `length` its tokens."""

    ids: list[int]
    row: Row
    length: int


def validation(run: Run, rows: Rows, contract: Contract, lines: Sequence[int]) -> dict[int, Question]:
    """The validation rows of these lines, by their lines; not those without an answer."""
    if rows.valid is not None and run.valid is not None:
        return _asked(run.valid, lines, contract, rows.valid.limit)
    return _asked(run.train, lines, contract, rows.data.limit)


def training(run: Run, rows: Rows, contract: Contract, count: int) -> dict[int, Question]:
    """The first `count` training rows, by their lines; not those without an answer."""
    lines = [rows.data.lines[place] for place in rows.train[:count]]
    return _asked(run.train, lines, contract, rows.data.limit)


def _asked(source: Source, lines: Sequence[int], contract: Contract, limit: int) -> dict[int, Question]:
    cut, kept = [], []
    for line, conversation in _conversations(source, set(lines)):
        answers = [
            place
            for place, turn in enumerate(conversation.turns)
            if turn["role"] == "assistant" and place not in conversation.untrained
        ]
        if answers:
            cut.append(conversation._replace(turns=conversation.turns[: answers[-1] + 1]))
            kept.append(line)
    found = {}
    encoding = prompts.encode_all(contract, cut, loss_on="completion")
    for line, conversation, encoded in zip(kept, cut, encoding, strict=True):
        # A template that rewrites earlier turns is none that the whole conversation could be trained with.
        fitting = None if isinstance(encoded, BadRequest) else prompts.truncated(contract, encoded, limit)
        if fitting is not None:
            found[line] = _question(contract, conversation, fitting)
    return found


def _conversations(source: Source, lines: set[int]) -> Iterator[tuple[int, Conversation]]:
    if not lines:
        return
    last = max(lines)
    with source.path.open("rb") as file, closing(validate.conversations(file, source.reading)) as examples:  # type: ignore[type-var]
        for line, example in examples:
            if line in lines and isinstance(example, Conversation):
                yield line, example
            if line >= last:
                return


def _question(contract: Contract, conversation: Conversation, encoded: Encoded) -> Question:
    first = encoded.trained.index(True)
    answer = encoded.ids[first:]
    end = next((place for place, token in enumerate(answer) if token in contract.stop_token_ids), len(answer))
    prompt = "\n".join(turn["content"] for turn in conversation.turns[:-1])
    expected = prompts.text_of(contract, answer[:end]).strip()
    return Question(encoded.ids[:first], Row(prompt, expected), end)
