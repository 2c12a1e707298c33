"""Text as it comes: no half characters, nothing past a stop string, nothing lost at the end."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from core.ml.inference import bases
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


def byte_fallback() -> Any:
    """As Llama 2, Mistral and Phi 3 have it: words with their space, and single bytes where there is no word."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁a",
        "▁time",
        "Once",
        "▁upon",
    ]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def written(tokenizer: Any, ids: list[int], before: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, [], before or [])
    return [*(stream.push(token) for token in ids), stream.end()]


def test_bytes_that_are_no_text_break_nothing() -> None:
    tokenizer = byte_fallback()
    draw = random.Random(0)
    for _ in range(500):
        ids = [draw.choice([draw.randrange(3, 259), draw.randrange(259, 263)]) for _ in range(30)]
        assert "".join(written(tokenizer, ids))


@pytest.mark.parametrize("text", ["日本語の文", "é🙂é", "naïve"])
def test_characters_of_single_bytes_come_one_by_one(text: str) -> None:
    tokenizer = byte_fallback()
    pieces = written(tokenizer, [3 + byte for byte in text.encode()])
    assert [piece for piece in pieces if piece] == list(text)


def test_a_text_that_goes_on_keeps_the_space_between() -> None:
    tokenizer = byte_fallback()
    once, upon, a, time = (tokenizer.convert_tokens_to_ids(word) for word in ("Once", "▁upon", "▁a", "▁time"))
    assert "".join(written(tokenizer, [a, time], [once, upon])) == " a time"


def test_after_a_mark_of_the_template_text_begins_anew() -> None:
    tokenizer = byte_fallback()
    marks = frozenset(tokenizer.added_tokens_decoder)
    base = bases.Base({}, len(tokenizer), 8, frozenset(), tokenizer, marks)
    once, upon = (tokenizer.convert_tokens_to_ids(word) for word in ("Once", "▁upon"))
    assert bases.before(base, [once, upon]) == [once, upon]
    assert bases.before(base, [once, tokenizer.bos_token_id]) == []


def test_a_character_that_the_prompt_begins_is_not_lost() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("ab🙂c", add_special_tokens=False)["input_ids"]
    for cut in range(3, len(ids) - 1):
        assert "".join(written(tokenizer, ids[cut:], ids[:cut])) == "🙂c"
    assert "".join(written(tokenizer, ids[-1:], ids[:4])) == "c"
    assert "".join(written(tokenizer, [], ids[:4])) == ""


def test_marks_that_are_no_text_do_not_break_the_character_after_them() -> None:
    tokenizer = tiny.tokenizer()
    smile = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(smile) > 1
    pieces = written(tokenizer, [*[tokenizer.eos_token_id] * 40, *smile])
    assert "".join(pieces) == "🙂"


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
