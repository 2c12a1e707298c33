"""Rows of a data set file to what the trainer is fed: token ids and labels, through the prompt contract.

No torch: the API counts with it what a job would use.
"""

import math
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from core.errors import BadRequest, GraftError
from core.hashes import key64
from core.ml import prompts
from core.ml.formats import validate
from core.ml.formats.chat.example import Example
from core.ml.prompts import Contract, Encoded, LossOn
from core.ml.scores import choice
from core.ml.scores.choice import Row
from core.ml.training import split
from core.ml.training.config import Training
from core.ml.training.run import Run, Source
from core.ml.training.spec import support

# What a job of unknown length gets at most; longer rows need an explicit max_length.
AUTO_LENGTH = 2048
# What `check_loss` is measured on: so few rows that whoever loads the files anew can measure it again.
CHECKED_ROWS = 16
# Of the rows, that "auto" takes whole where the rest may be dropped or cut; in steps, so that a little more is no loss.
_NEARLY_ALL = 0.99
_ROUND = 64
_IGNORED = -100
# Enough to tell what kind of answers these are, and to see most labels.
_ANSWERS = 500
_NAMED = 10
_VALIDATION = "In the validation data set"

LabelledIds = dict[str, list[int]]


@dataclass
class Tokenised:
    """`examples` of {input_ids, labels}, where they are kept; of each its line, its tokens, how many of them are
    trained, and the keys of the row and of its prompt: equal rows have equal keys.

    `dropped` are the lines left out as too long, `truncated` those whose prompt was cut. `texts` says that
    the rows are plain texts without turns. `answers` are the last ones of the first 500 conversations.
    """

    limit: int
    examples: list[LabelledIds] = field(default_factory=list)
    lines: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    prompt_keys: "array[int]" = field(default_factory=lambda: array("Q"))
    dropped: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)
    trained: "array[int]" = field(default_factory=lambda: array("i"))
    texts: bool = False
    answers: list[Row] = field(default_factory=list)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained)


@dataclass(frozen=True)
class Rows:
    """What a run trains on and what it holds back: places in `data`, or a data set of its own.

    `in_both` are the lines of validation rows that are trained too, or were by the adapter to continue from: their loss
    proves nothing.
    """

    data: Tokenised
    train: Sequence[int]
    held_back: Sequence[int]
    valid: Tokenised | None
    in_both: list[int]

    @property
    def train_examples(self) -> list[LabelledIds]:
        return [self.data.examples[i] for i in self.train]

    @property
    def valid_examples(self) -> list[LabelledIds]:
        return self.valid.examples if self.valid else [self.data.examples[i] for i in self.held_back]

    @property
    def valid_count(self) -> int:
        return len(self.valid.lines) if self.valid else len(self.held_back)


def rows_of(run: Run, contract: Contract, *, context: int, count_until: float | None = None) -> Rows:
    """The rows of a run, tokenised and divided. `problems` judges them. `context` are the tokens that the model reads.

    With a moment `count_until` of `time.monotonic` they are only counted, and not after it.

    Raises:
        BadRequest: `max_length_too_long`, `validation_of_other_kind`, and what `prompts.encode` refuses, with the line.
        TimeoutError: there were rows left to be counted.
    """
    training = run.spec.training
    limit = _limit(run.train, contract, context, training, count_until)
    data = _tokenised(run.train, contract, limit, training, count_until)
    if run.valid is not None:
        try:
            valid = _tokenised(run.valid, contract, limit, training, count_until)
        except BadRequest as error:
            raise error.within(_VALIDATION) from error
        if data.lines and valid.lines:
            support.check_kinds(training.loss_on, trained_texts=data.texts, valid_texts=valid.texts)
        shared = split.shared(valid.keys, data.keys)
        both = valid.lines if split.trained_before(run) else [valid.lines[place] for place in shared]
        return Rows(data, range(len(data.lines)), [], valid, list(both))
    if run.fraction is not None:
        train, held = split.divided(data.prompt_keys, run.fraction, run.spec.seed)
        seen = split.trained_before(run, [data.prompt_keys[place] for place in held])
        return Rows(data, train, held, None, [data.lines[place] for place in held] if seen else [])
    return Rows(data, range(len(data.lines)), [], None, [])


def checked_rows(run: Run, contract: Contract, *, context: int) -> Rows:
    """`rows_of`; raises the first of their `problems`, too."""
    rows = rows_of(run, contract, context=context)
    if found := problems(rows, run):
        raise found[0]
    return rows


def problems(rows: Rows, run: Run) -> list[GraftError]:
    """Why these rows cannot be trained: `row_too_long` (policy error), `eos_not_trained` (more than 1 % of the
    rows never show the end of an answer), `no_trained_tokens`, `validation_empty`."""
    training = run.spec.training
    found: list[GraftError] = [*_problems(rows.data, training)]
    if rows.valid is not None:
        found += [problem.within(_VALIDATION) for problem in _problems(rows.valid, training)]
    if run.fraction is not None and rows.data.trained_tokens and not (rows.train and rows.held_back):
        found.append(
            BadRequest(
                "validation_empty",
                f"Of {len(rows.data.lines)} rows none can be held back: rows with the same prompt stay together"
                + (f", and {_rows(rows.data.dropped, 'too long')}." if rows.data.dropped else "."),
                param="validation.fraction",
                hint="Use more rows, give the validation rows as a data set of their own, or leave validation out.",
            )
        )
    return found


def _limit(
    source: Source, contract: Contract, context: int, training: Training, count_until: float | None
) -> int:
    """Tokens that a row may have. "auto": AUTO_LENGTH; where rows may be dropped or cut, what 99 of 100 rows have,
    as a few very long ones would cost all others memory and time."""
    if training.max_length != "auto":
        if training.max_length > context:
            raise BadRequest(
                "max_length_too_long",
                f"max_length {training.max_length} is more than the {context} tokens the model reads.",
                param="training.max_length",
            )
        return training.max_length
    most = min(AUTO_LENGTH, context)
    if training.overlength == "error":
        return most
    lengths = sorted(
        len(encoded.ids)
        for _, encoded in _encoded(
            source, contract, training.loss_on, Tokenised(most), count_until or math.inf
        )
    )
    if not lengths:
        return most
    usual = lengths[math.ceil(_NEARLY_ALL * len(lengths)) - 1]
    return min(math.ceil(usual / _ROUND) * _ROUND, most)


def _tokenised(
    source: Source, contract: Contract, limit: int, training: Training, count_until: float | None
) -> Tokenised:
    made = Tokenised(limit)
    for line, encoded in _encoded(source, contract, training.loss_on, made, count_until or math.inf):
        fitting = _fit(contract, line, encoded, training, made)
        if fitting is None:
            continue
        if not prompts.ends_trained(contract, fitting):
            made.unfinished.append(line)
        _add(made, line, fitting, encoded)
        if count_until is None:
            labels = [
                token if trained else _IGNORED
                for token, trained in zip(fitting.ids, fitting.trained, strict=True)
            ]
            made.examples.append({"input_ids": fitting.ids, "labels": labels})
    return made


def _problems(made: Tokenised, training: Training) -> Iterator[BadRequest]:
    long = _rows(made.dropped, f"longer than {made.limit} tokens")
    if made.dropped and training.overlength != "drop":
        even_so = " even without their prompt" if training.overlength == "truncate" else ""
        yield BadRequest(
            "row_too_long",
            f"{long}{even_so} (lines {_some(made.dropped)}).",
            param="training.max_length",
            hint='Raise training.max_length, or set training.overlength to "drop" to leave these rows out.',
        )
    if len(made.unfinished) > 0.01 * len(made.lines):
        yield BadRequest(
            "eos_not_trained",
            f"{len(made.unfinished)} of {len(made.lines)} rows do not train the end of the answer "
            f"(lines {_some(made.unfinished)}), so the model would not learn to stop.",
        )
    if not made.trained_tokens:
        yield BadRequest(
            "no_trained_tokens",
            "No row is left that trains any token"
            + (f": {long} (lines {_some(made.dropped)})." if made.dropped else "."),
            param="training.max_length" if made.dropped else None,
            hint="Raise training.max_length." if made.dropped else None,
        )


def _encoded(
    source: Source, contract: Contract, loss_on: LossOn, made: Tokenised, until: float
) -> Iterator[tuple[int, Encoded]]:
    lines: deque[int] = deque()

    def examples() -> Iterator[Example]:
        with source.path.open("rb") as file:
            for line, example in validate.conversations(file, source.reading):
                if time.monotonic() > until:
                    raise TimeoutError
                lines.append(line)
                if isinstance(example, str):
                    made.texts = True
                elif len(made.answers) < _ANSWERS and (answer := choice.last_answer(example)) is not None:
                    made.answers.append(answer)
                yield example

    for encoded in prompts.encode_all(contract, examples(), loss_on=loss_on):
        line = lines.popleft()
        if isinstance(encoded, BadRequest):
            raise encoded.within(f"Line {line}") from encoded
        yield line, encoded


def _fit(
    contract: Contract, line: int, encoded: Encoded, training: Training, made: Tokenised
) -> Encoded | None:
    if len(encoded.ids) <= made.limit:
        return encoded
    cut = prompts.truncated(contract, encoded, made.limit) if training.overlength == "truncate" else None
    (made.dropped if cut is None else made.truncated).append(line)
    return cut


def _add(made: Tokenised, line: int, fitting: Encoded, whole: Encoded) -> None:
    """`whole` is the row before it was cut: what is left of equal prompts depends on their answers."""
    made.lines.append(line)
    made.lengths.append(len(fitting.ids))
    made.keys.append(key64(array("i", fitting.ids).tobytes()))
    made.prompt_keys.append(key64(array("i", whole.ids[: whole.prompt]).tobytes()))
    made.trained.append(sum(fitting.trained))


def _rows(lines: Sequence[int], what: str) -> str:
    return f"1 row is {what}" if len(lines) == 1 else f"{len(lines)} rows are {what}"


def _some(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:_NAMED])
    return shown + (", …" if len(lines) > _NAMED else "")
