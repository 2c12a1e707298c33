"""Which scores fit the data: what kind of answers these are. No torch, no numpy: the API asks, too."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from core import strict_json
from core.ml.formats.chat.example import Conversation
from core.ml.scores import sql

Metric = Literal["exact_match", "label_accuracy", "json_validity", "sql_execution", "rouge"]

# What counts as a short answer, in characters; and what is too long to be looked at.
_SHORT, _MOST = 64, 100_000
_FENCE = re.compile(r"\A\s*```(?:json)?[^\S\n]*\n(.*?)```\s*\Z", re.IGNORECASE | re.DOTALL)


class Row(NamedTuple):
    """A question as text and the answer that is expected."""

    prompt: str
    expected: str


def last_answer(conversation: Conversation) -> Row | None:
    """Its last answer that is trained and has words, and what stands before it; None of texts without end."""
    turns = conversation.turns
    for place in range(len(turns) - 1, -1, -1):
        turn = turns[place]
        if turn["role"] == "assistant" and place not in conversation.untrained and turn["content"]:
            row = Row("\n".join(before["content"] for before in turns[:place]), turn["content"])
            return row if len(row.prompt) + len(row.expected) <= _MOST else None
    return None


def chosen(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that fit the data, the most telling first.

    SQL where prompts hold tables and answers are queries; labels where few short answers come again and again;
    JSON where answers are objects or arrays; else the words in common, and the whole of it for short answers.
    """
    if not rows:
        return []
    answers = [row.expected.strip() for row in rows]
    if (
        _share(bool(sql.tables(row.prompt)) for row in rows) >= 0.9
        and _share(map(sql.is_query, answers)) >= 0.9
    ):
        return ["sql_execution", "exact_match"]
    short = all(len(answer) <= _SHORT for answer in answers)
    if short and 4 * len(set(answers)) <= len(answers):
        return ["label_accuracy"]
    if _share(isinstance(json_of(answer), dict | list) for answer in answers) >= 0.95:
        return ["json_validity"]
    return ["rouge", "exact_match"] if short else ["rouge"]


def json_of(text: str) -> Any:
    """The value of a text that is JSON, in a Markdown fence or not; None for any other, and for null."""
    fenced = _FENCE.match(text)
    try:
        return strict_json.loads(fenced[1] if fenced else text, depth=strict_json.DEPTH)
    except ValueError:
        return None


def _share(found: Iterable[bool]) -> float:
    every = list(found)
    return sum(every) / len(every)
