"""Token ids to text as they come: no half characters, and nothing past a stop string."""

from collections.abc import Sequence
from typing import Any

# So many of the prompt's last tokens decide how the next one is written.
_CONTEXT = 6
_HALF = "\ufffd"
# A character is four bytes at most: of so many tokens the first are none.
_MOST_UNTOLD = 16


class TextStream:
    """Feed it token ids; it gives the text that is certain. `stopped` is set at a stop string; `length` counts the
    characters that are whole, those that are held back among them."""

    def __init__(self, tokenizer: Any, stop: list[str], before: Sequence[int] = ()) -> None:
        """`before`: the tokens of the prompt. Some tokenizers write the space before a word only after other text."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._ids = list(before[-_CONTEXT:])
        # The last piece was told of the tokens between these two; those after them make no whole characters yet.
        self._begin, self._told = 0, len(self._ids)
        self._stop = stop
        self._held = ""
        self.stopped = False
        self.length = 0

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._fresh())

    def end(self) -> str:
        """What was held back: the start of a stop string, or bytes that never became a character."""
        if self.stopped:
            return ""
        text = self._release(self._fresh(broken=True))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _fresh(self, *, broken: bool = False) -> str:
        """The text that the untold tokens make, if it is whole characters, or all the same.

        The tokens of the last piece are decoded with and without the new ones, as text-generation servers do it: the
        library's own decoder that goes on fails on bytes that are no text.
        """
        before, after = self._text(self._told), self._text(len(self._ids))
        broken |= len(self._ids) - self._told >= _MOST_UNTOLD
        if after == before:
            self._told = len(self._ids)  # a mark, which is no text
        # A character that the prompt begins and the answer ends is the answer's.
        known = len(before if after.startswith(before) else before.rstrip(_HALF))
        if len(after) <= known or (after.endswith(_HALF) and not broken):
            return ""
        self._begin, self._told = self._told, len(self._ids)
        self.length += len(after) - known
        return after[known:]

    def _text(self, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._begin : end], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
