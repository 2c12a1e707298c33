"""How good answers are: each metric compares what a model answered with what was expected. No torch.

A request names metrics; a metric gives one or two scores, all from 0 to 1, more is better:

exact_match     exact_match: the same text, white space aside
label_accuracy  label_accuracy: the same label, case and white space aside; macro_f1: mean F1 of the expected labels
json_validity   json_valid: the whole answer is JSON; field_f1: F1 of its (path, value) pairs, lists in any order, with
                what is empty as a value
sql_execution   sql_execution: the query gives the expected one's rows on made-up tables
rouge           rouge_l: ROUGE-L F1 over words; over signs where a text has no word
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer

from core.ml.scores import sql
from core.ml.scores.choice import Metric, Row, json_of

Values = NDArray[np.float64]

RESAMPLES = 1_000
_CONFIDENCE = 0.95
# A word with its marks, or one letter of a writing without spaces.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}&&\p{L}]"
_WORDS = regex.compile(rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{N}}_])+", regex.V1)


class Scored(NamedTuple):
    """A score of base and adapter on the same rows; `interval` holds the difference in 95 of 100 resamplings.

    `left_out` counts rows that cannot be scored, whatever the answer.
    """

    name: str
    base: float
    adapter: float
    difference: float
    interval: tuple[float, float]
    rows: int
    left_out: int = 0

    def as_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "base": self.base,
            "adapter": self.adapter,
            "difference": self.difference,
            "interval": list(self.interval),
            "rows": self.rows,
        }
        return made | ({"left_out": self.left_out} if self.left_out else {})


def compare(metric: Metric, rows: Sequence[Row], base: Sequence[str], adapter: Sequence[str]) -> list[Scored]:
    """The scores of a metric, for answers of base and adapter to the same rows."""
    if metric == "label_accuracy":
        return _labels([row.expected for row in rows], base, adapter)
    return [
        scored
        for name, score in _EACH[metric].items()
        if (scored := _each(name, score, rows, base, adapter)) is not None
    ]


def _each(
    name: str, score: "_Score", rows: Sequence[Row], base: Sequence[str], adapter: Sequence[str]
) -> Scored | None:
    """The mean of a score of single rows; None where no row can be scored."""
    pairs = [
        (score(row, one), score(row, other)) for row, one, other in zip(rows, base, adapter, strict=True)
    ]
    kept = [(one, other) for one, other in pairs if one is not None and other is not None]
    if not kept:
        return None
    scored = paired(name, [one for one, _ in kept], [other for _, other in kept])
    return scored._replace(left_out=len(pairs) - len(kept))


def paired(
    name: str,
    base: Sequence[float] | Values,
    adapter: Sequence[float] | Values,
    statistic: Callable[[Values], float] = np.mean,
) -> Scored:
    """Base against adapter, row by row; the interval by paired bootstrap with a fixed seed. `statistic` makes one number of
    some rows' values."""
    one, other = np.asarray(base, dtype=float), np.asarray(adapter, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(one), (RESAMPLES, len(one)))
    differences = [statistic(other[pick]) - statistic(one[pick]) for pick in picks]
    tail = (1 - _CONFIDENCE) / 2
    low, high = (float(edge) for edge in np.quantile(differences, [tail, 1 - tail]))
    first, second = float(statistic(one)), float(statistic(other))
    return Scored(name, first, second, second - first, (low, high), len(one))


def _labels(expected: Sequence[str], base: Sequence[str], adapter: Sequence[str]) -> list[Scored]:
    wanted = [_label(text) for text in expected]
    known = {label: code for code, label in enumerate(dict.fromkeys(wanted))}
    # Column 0 the expected label, column 1 the answered one; -1: an answer that is no label.
    coded = [
        np.array(
            [(known[label], known.get(_label(text), -1)) for label, text in zip(wanted, texts, strict=True)]
        )
        for texts in (base, adapter)
    ]
    right = [(pairs[:, 0] == pairs[:, 1]).astype(float) for pairs in coded]
    return [
        paired("label_accuracy", right[0], right[1]),
        paired("macro_f1", coded[0], coded[1], statistic=macro_f1),
    ]


def macro_f1(pairs: NDArray[Any]) -> float:
    """Mean F1 of the labels that are expected; `pairs` are rows of (expected, answered) codes, -1 for no label."""
    expected, answered = pairs[:, 0].astype(int), pairs[:, 1].astype(int)
    size = int(expected.max()) + 1
    right = np.bincount(expected[expected == answered], minlength=size)
    asked = np.bincount(expected, minlength=size)
    said = np.bincount(answered[(answered >= 0) & (answered < size)], minlength=size)
    there = asked > 0
    return float(np.mean(2 * right[there] / (asked[there] + said[there])))


def _label(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def _exact(row: Row, answer: str) -> float:
    return float(answer.split() == row.expected.split())


def _sql(row: Row, answer: str) -> float | None:
    same = sql.same_results(row.prompt, row.expected, answer)
    return None if same is None else float(same)


def _valid(row: Row, answer: str) -> float | None:
    return None if json_of(row.expected) is None else float(json_of(answer) is not None)


def _field_f1(row: Row, answer: str) -> float | None:
    wanted, given = json_of(row.expected), json_of(answer)
    if wanted is None:
        return None
    if given is None:
        return 0.0
    one, other = Counter(_fields(wanted)), Counter(_fields(given))
    return 2 * (one & other).total() / (one.total() + other.total())


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every value that holds no others, with its path and its kind: 1 is 1.0, but not true."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _fields(item, (*path, name))
    elif isinstance(value, list) and value:
        for item in value:
            yield from _fields(item, (*path, "[]"))
    elif isinstance(value, str):
        yield path, "text", " ".join(value.split())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, "number", value
    else:
        yield path, "other", repr(value)


class _Words:
    """Every writing has words; the library's own tokenizer knows ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = _WORDS.findall(text.casefold())
        return words or list("".join(text.split()))


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())


def _rouge(row: Row, answer: str) -> float:
    return float(_ROUGE.score(row.expected, answer)["rougeL"].fmeasure)


# One row's score; None: it cannot be scored, whatever the answer.
_Score = Callable[[Row, str], float | None]
_EACH: dict[str, dict[str, _Score]] = {
    "exact_match": {"exact_match": _exact},
    "json_validity": {"json_valid": _valid, "field_f1": _field_f1},
    "sql_execution": {"sql_execution": _sql},
    "rouge": {"rouge_l": _rouge},
}
