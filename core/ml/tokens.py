"""Text to token ids, whole or in pieces. For core.ml.prompts."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from core.errors import BadRequest
from core.ml.rendering import Marks

# How tokenizers write a byte: by a character each, or one by one.
_BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Characters before a text that goes on: a line break, or a letter where that one merges with the text.
_GUARDS = ("\n", "x")


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with the start token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts without marks; the tokens that the template wrote are tokens, and none are added."""
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def ids_of_rendered(tokenizer: Any, text: str, *, start: bool) -> list[int]:
    """Token ids of what a template wrote, read in one piece as other programs do it; `start` puts the start token first."""
    return ([tokenizer.bos_token_id] if start else []) + ids_of(tokenizer, [text])[0]


def ids_of_pieces(tokenizer: Any, rows: list[list[str]]) -> list[list[list[int]]]:
    """Token ids of the pieces of many texts without marks; every piece but the first as in `continuation`."""
    guard = _GUARDS[0]
    texts = [f"{guard}{piece}" if i else piece for row in rows for i, piece in enumerate(row)]
    known, *rest = ids_of(tokenizer, [guard, *texts])
    found = iter(rest)

    def of(i: int, piece: str) -> list[int]:
        ids = next(found)
        if not i:
            return ids
        return ids[len(known) :] if ids[: len(known)] == known else continuation(tokenizer, piece)

    return [[of(i, piece) for i, piece in enumerate(row)] for row in rows]


def ids_of_marked(tokenizer: Any, text: str, marks: Marks, *, continued: bool = False) -> list[int]:
    """Token ids of one text in which what stands between marks is no token; `continued` as in `continuation`."""
    if any(form in text for mark in marks[:2] for form in (ascii(mark)[1:-1], json.dumps(mark)[1:-1])):
        raise BadRequest(
            "template_error", "The chat template escapes characters, so control tokens in a text get lost."
        )
    pattern = f"{marks.start}({marks.control.pattern}){marks.end}|[{marks.start}{marks.end}]"
    pieces = re.split(pattern, text)
    ids = continuation(tokenizer, pieces[0]) if continued else ids_of(tokenizer, [pieces[0]])[0]
    for i, piece in enumerate(pieces[1:], start=1):
        if piece and i % 2:
            ids += _plain(tokenizer, piece)
        elif piece:
            ids += continuation(tokenizer, piece)
    return ids


def _plain(tokenizer: Any, token: str) -> list[int]:
    """The text of a control token as ordinary text."""
    # Not with split_special_tokens: that switches a tokenizer which other threads are using.
    encode = tokenizer._encode_without_added_tokens
    ids = _after(encode, token)
    if tokenizer.convert_tokens_to_ids(token) in ids:  # an ordinary piece of the vocabulary, too
        ids = _after(encode, token[:1]) + _after(encode, token[1:])
    return ids


def text_and_bytes(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """One token for a reader, and its exact bytes: a part of a character is no text."""
    name = tokenizer.convert_ids_to_tokens(token)
    added, byte_level = _kinds(tokenizer)
    if token in added or name is None:
        text = name or ""
        return text, text.encode()
    if (part := _BYTE.fullmatch(name)) is not None:
        raw = bytes([int(part[1], 16)])
    elif byte_level and all(sign in _BYTES for sign in name):
        raw = bytes(_BYTES[sign] for sign in name)
    else:
        raw = name.replace("\u2581", " ").encode()
    return raw.decode("utf-8", "replace"), raw


@lru_cache(maxsize=16)
def _kinds(tokenizer: Any) -> tuple[frozenset[int], bool]:
    """The ids of its added tokens, and whether the others are bytes. Asked for each token, a tokenizer of 6,000 added tokens
    took 10 ms each time."""
    return frozenset(tokenizer.added_tokens_decoder), _is_byte_level(tokenizer)


def _is_byte_level(tokenizer: Any) -> bool:
    return "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)


def continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on after other text."""

    def encode(whole: str) -> list[int]:
        return list(tokenizer(whole, add_special_tokens=False)["input_ids"])

    return _after(encode, text) if text else []


def _after(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Token ids of a text without the space that some tokenizers add to the start of one.

    It is tokenised after a character that is then removed.
    """
    for guard in _GUARDS:
        known = encode(guard)
        ids = encode(guard + text)
        if ids[: len(known)] == known:
            return ids[len(known) :]
    return encode(text)
