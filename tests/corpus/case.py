"""One file of the corpus with the answer it must get, and the rows that most files are made of."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# The limits under which the corpus is read: small ones, so that its files are small.
LINE_BYTES = 256 * 1024
UNPACKED_BYTES = 128 * 1024**2
ROWS = 5000
COLUMNS = 256
DEPTH = 32


@dataclass(frozen=True)
class Good:
    """The file is kept: so many rows of this format, with exactly these kinds of warnings."""

    rows: int
    format: str
    warnings: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Bad:
    """The file is refused. `line` is that of the first broken row; None where the file as a whole is refused.

    `word` must be in the message or the hint. `count` is the number of broken rows.
    """

    code: str
    line: int | None
    word: str
    count: int = 1
    status: int = 422


@dataclass(frozen=True)
class Case:
    name: str
    content: Callable[[], bytes]
    expected: Good | Bad
    filename: str = "rows.jsonl"
    form: dict[str, str] = field(default_factory=dict)


def good(
    name: str, content: bytes, rows: int, kind: str, *warnings: str, filename: str = "rows.jsonl", **form: str
) -> Case:
    return Case(name, lambda: content, Good(rows, kind, frozenset(warnings)), filename, form)


def bad(
    name: str,
    content: bytes,
    code: str,
    line: int | None,
    word: str,
    *,
    count: int = 1,
    status: int = 422,
    filename: str = "rows.jsonl",
    **form: str,
) -> Case:
    return Case(name, lambda: content, Bad(code, line, word, count, status), filename, form)


def line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def pair(number: int = 1, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}?", "completion": f"the answer {number}"} | more


def user(content: Any = "a question?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


def answer(content: Any = "an answer.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | more


def chat(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(turns)} | more


def among(raw: bytes) -> bytes:
    """A line as the third of four, after a blank one, among good pairs."""
    return line(pair(1)) + b"\n" + raw.rstrip(b"\n") + b"\n" + line(pair(2))


def among_chats(*turns: Any, **more: Any) -> bytes:
    """A conversation as the third of four lines, after a blank one, among good ones."""
    first, last = chat(user("one?"), answer("it is one.")), chat(user("two?"), answer("it is two."))
    return line(first) + b"\n" + line(chat(*turns, **more)) + line(last)
