"""Text as it comes: no half characters, nothing past a stop string, nothing lost at the end."""

import pytest

from core.ml.inference.text import TextStream
from tests import tiny


def feed(text: str, stop: list[str] | None = None, cut: int | None = None) -> tuple[list[str], TextStream]:
    tokenizer = tiny.tokenizer()
    stream = TextStream(tokenizer, stop or [])
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"][:cut]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    return pieces, stream


@pytest.mark.parametrize("text", ["plain words", " leading space", "é日本🙂", "a\n\nb", "x" * 50])
def test_the_pieces_are_the_text(text: str) -> None:
    pieces, _ = feed(text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_cut_in_the_middle_is_shown_as_such() -> None:
    pieces, _ = feed("ab🙂", cut=4)
    assert "".join(pieces).startswith("ab\ufffd")


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("aab", ["ab"], "a"),
        ("ababac tail", ["abac"], "ab"),
        ("first;second", ["second", ";"], "first"),
        ("ends with EN", ["END"], "ends with EN"),
        ("END", ["END"], ""),
    ],
)
def test_nothing_of_a_stop_string_shows(text: str, stop: list[str], kept: str) -> None:
    pieces, stream = feed(text, stop)
    assert "".join(pieces) == kept
    assert stream.stopped == (kept != text)
