"""Log probabilities as OpenAI's clients read them, from an engine's, whose tokens are named `token_id:…`."""

import codecs
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from api.engine import refusals
from api.engine.answers import Logprobs
from core.ml import tokens

Json = dict[str, Any]

_NAMED = re.compile(r"token_id:\d{1,9}", re.ASCII)


def of_chat(tokenizer: Any, told: Logprobs | None) -> Json | None:
    if told is None:
        return None
    read = _reader(tokenizer)

    def entry(name: str, logprob: float) -> Json:
        text, raw = read(name)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    content = [
        {
            **entry(name, logprob),
            "top_logprobs": [entry(*pair) for pair in sorted(top.items(), key=lambda pair: -pair[1])],
        }
        for name, logprob, top in _each(told)
    ]
    return {"content": content, "refusal": None}


class OfCompletion:
    """Those of one output in the older form, whole or piece by piece: there a token begins where the text ends that is
    whole characters before it."""

    def __init__(self, tokenizer: Any) -> None:
        self._read = _reader(tokenizer)
        self._unwritten = {name for name, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def told(self, told: Logprobs | None, end: int) -> Json | None:
        """Of the next tokens; `end`: where the text ends that is there with them."""
        if told is None:
            return None
        return {
            "tokens": [self._label(name) for name in told["tokens"]],
            "token_logprobs": told["token_logprobs"],
            "top_logprobs": [self._top(*one) for one in _each(told)],
            "text_offset": [min(self._begin(name), end) for name in told["tokens"]],
        }

    def _begin(self, name: str) -> int:
        begin = self._at
        if _id(name) not in self._unwritten:
            self._at += len(self._decoder.decode(self._read(name)[1]))
        return begin

    def _top(self, chosen: str, logprob: float, top: Json) -> Json:
        """With the chosen token, also where it is none of the likeliest; of two tokens that read the same, one by its id."""
        found: Json = {}
        for name, value in {chosen: logprob, **top}.items():
            label = self._label(name)
            found[name if label in found else label] = value
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def _label(self, name: str) -> str:
        """As OpenAI writes what is no text by itself: `bytes:\\xf0\\x9f`."""
        text, raw = self._read(name)
        if text.encode() == raw:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _each(told: Logprobs) -> Iterator[tuple[str, float, Json]]:
    """The tokens with their likeliest, of which engines say null where they were asked for none."""
    tops = told.get("top_logprobs") or [None] * len(told["tokens"])
    return zip(told["tokens"], told["token_logprobs"], (top or {} for top in tops), strict=True)


def _reader(tokenizer: Any) -> Callable[[str], tuple[str, bytes]]:
    """Text and bytes of a named token; the same few are likely all through an answer."""
    return cache(lambda name: tokens.text_and_bytes(tokenizer, _id(name)))


def _id(name: str) -> int:
    """Raises GraftError `engine_error`: the engine does not name tokens by their ids."""
    if not _NAMED.fullmatch(name):
        raise refusals.no_completion("the tokens of its log probabilities are not named by their ids")
    return int(name.removeprefix("token_id:"))
