"""Token ids to text as they come: no half characters, and nothing past a stop string."""

from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Feed it token ids; it gives the text that is certain. `stopped` is set at a stop string."""

    def __init__(self, tokenizer: Any, stop: list[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._release(self._decoder.step(self._tokenizer, token) or "")

    def end(self) -> str:
        """What was held back because it could have become a stop string."""
        rest, self._held = self._held, ""
        return "" if self.stopped else rest

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
