"""Token ids to text as they come: no half characters, and nothing past a stop string."""

from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Feed it token ids; it gives the text that is certain. `stopped` is set at a stop string."""

    def __init__(self, tokenizer: Any, stop: list[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._ids: list[int] = []
        self._decoded = 0
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decoder.step(self._tokenizer, token) or ""
        self._decoded += len(text)
        return self._release(text)

    def end(self) -> str:
        """What was held back: the start of a stop string, or bytes that never became a character."""
        if self.stopped:
            return ""
        broken = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))[self._decoded :]
        text = self._release(broken)
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

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
