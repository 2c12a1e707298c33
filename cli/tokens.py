"""Previewed rows on a terminal: the tokens that are trained in green, or between marks where there is no colour."""

import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

OPENED, CLOSED = "⟦", "⟧"
# A trained line break at the end of a trained part.
LINE_BREAK = "↵"
# A token that holds a part of a character shows as this.
_PART = "\ufffd"
# What would move the cursor, colour the terminal or turn the writing direction.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def legend(console: Console) -> str:
    return "Green is trained" if _coloured(console) else f"Between {OPENED} and {CLOSED} is trained"


def print_row(console: Console, row: dict[str, Any]) -> None:
    """The text of a row, as it would be trained."""
    text = Text()
    for part, trained in _stretches(row):
        shown = visible(part)
        if trained and not _coloured(console):
            body, line_break = (shown[:-1], "\n") if shown.endswith("\n") else (shown, "")
            shown = f"{OPENED}{body}{LINE_BREAK if line_break else ''}{CLOSED}{line_break}"
        text.append(shown, style="bold green" if trained else "dim")
    console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")


def visible(text: str) -> str:
    """The text with characters that a terminal would obey written as escapes."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def _stretches(row: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(text, trained) of neighbours that are alike; together they are the row's text."""
    stretch, state = "", False
    for text, trained in _parts(row["text"], row["tokens"]):
        if text and trained != state and stretch:
            yield stretch, state
            stretch = ""
        state = trained if text else state
        stretch += text
    if stretch:
        yield stretch, state


def _parts(text: str, tokens: list[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
    """The row's text, cut where its tokens meet.

    Tokens that hold parts of characters have no text of their own: they get what lies before the next that has.
    """
    at, waiting, reach = 0, None, 0
    for token in tokens:
        piece, trained = token["text"], token["trained"]
        reach += len(piece) + 1  # a decoder may leave out the space before a piece
        found = text.find(piece, at, at + reach) if piece and _PART not in piece else -1
        if found < 0:
            waiting = trained if waiting is None else waiting
            continue
        yield text[at:found], trained if waiting is None else waiting
        yield piece, trained
        at, waiting, reach = found + len(piece), None, 0
    yield text[at:], bool(waiting)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a text that others had a hand in: nothing in it is markup, and nothing of it the terminal obeys."""
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)
