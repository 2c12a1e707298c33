"""One answer on its way: what was asked, what was written, and who is told."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from core.errors import GraftError
from core.ml import base_model
from core.ml.inference.batch.attention import Cache
from core.ml.inference.batch.lora import Adapter
from core.ml.inference.sampling import Choice, Sampler, Sampling
from core.ml.inference.store.files import Source
from core.ml.inference.text import TextStream


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the chosen tokens that begin in it."""

    text: str
    choices: Sequence[Choice]


@dataclass(frozen=True)
class Finish:
    """`cached`: tokens of the prompt that were known from earlier prompts; `path`: read in batches, or alone by peft."""

    reason: Literal["stop", "length", "cancelled"]
    tokens: int
    cached: int
    path: Literal["batch", "compat"]


# Pieces, then one finish or one error.
Told = Piece | Finish | GraftError


@dataclass(frozen=True)
class Request:
    """`adapter`: None for the base model. `salt`: prompts are only known again under the same one. `deadline`: by the
    monotonic clock."""

    base: str
    adapter: Source | None
    prompt: list[int]
    sampling: Sampling
    deadline: float
    salt: str = ""


@dataclass(eq=False)
class Answering:
    """The state of one answer. `after`: another answer to the same prompt, which is to read it first; `reading_since`: the
    time from which it waited for its adapter alone; `room_made`: whatever can be dropped was dropped for it."""

    request: Request
    ends: frozenset[int]
    text: TextStream
    tell: Callable[[Told], None]
    cancelled: Callable[[], bool]
    after: "Answering | None" = None
    reading_since: float | None = None
    room_made: bool = False
    new: list[int] = field(default_factory=list)
    path: Literal["batch", "compat"] = "batch"
    cached: int = 0
    over: bool = False
    failed: bool = False
    sampler: Sampler | None = None
    adapter: Adapter | None = None
    cache: Cache | None = None
    # Each with the length of the text before it.
    _untold: list[tuple[int, Choice]] = field(default_factory=list)
    _told: int = 0

    @property
    def most(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    @property
    def tokens(self) -> list[int]:
        return self.request.prompt + self.new

    @property
    def unread(self) -> list[int]:
        """Tokens that the model has not read yet."""
        assert self.cache is not None
        return self.tokens[self.cache.length :]

    @property
    def root(self) -> str:
        """What the keys and values of its tokens depend on, beside the tokens."""
        adapter = self.request.adapter
        return f"{self.request.base}\0{adapter.digest if adapter else ''}\0{self.request.salt}"

    def take(self, choice: Choice) -> None:
        """The next token: tell what it makes certain, and whether it is the last."""
        self.new.append(choice.token)
        ended = choice.token in self.ends
        begin = self.text.length
        piece = "" if ended else self.text.push(choice.token)
        stopped = ended or self.text.stopped
        last = stopped or len(self.new) >= self.request.sampling.max_tokens
        if last:
            piece += self.text.end()
        # A stop string may stand in what was held back.
        stopped = stopped or self.text.stopped
        if self.request.sampling.logprobs is not None:
            self._untold.append((begin, choice))
        self._told += len(piece)
        # Tokens of a stop string, and one that ends the answer, are none of the text.
        certain = [one for at, one in self._untold if at < self._told or (last and not stopped)]
        if piece or certain:
            self._untold = self._untold[len(certain) :]
            self.tell(Piece(piece, certain))
        if last:
            self.finish("stop" if stopped else "length")

    def finish(self, reason: Literal["stop", "length", "cancelled"]) -> None:
        self.over = True
        self.tell(Finish(reason, len(self.new), self.cached, self.path))

    def fail(self, error: GraftError) -> None:
        self.over = self.failed = True
        self.tell(error)

    def fail_without_numbers(self) -> None:
        self.fail(GraftError("engine_error", "The model computed no numbers for this prompt.", status=502))

    def leave(self) -> bool:
        """Whether it is over, or nobody waits for it any more; then that is told."""
        if self.over:
            return True
        if self.cancelled():
            self.finish("cancelled")
        elif time.monotonic() > self.request.deadline:
            self.fail(GraftError("deadline_exceeded", "The answer took longer than it may take.", status=504))
        return self.over


def device_busy() -> GraftError:
    message = "A training takes the memory that it needs at the moment. Ask again in some seconds."
    return GraftError("device_busy", message, status=503)


def unavailable(why: str | None) -> GraftError:
    hint = "Ask again in some seconds. GET /health/ready shows its state."
    return GraftError("engine_unavailable", f"The engine is not there: {why}.", status=503, hint=hint)


def failed(error: BaseException) -> GraftError:
    """What the one is told whose answer broke with this."""
    if isinstance(error, GraftError):
        return error
    if base_model.is_out_of_memory(error):
        message = "There is no memory for this answer beside what runs on this machine."
        return GraftError("device_full", message, status=503)
    return GraftError(
        "engine_error", f"The engine failed on this request: {type(error).__name__}: {error}", status=502
    )
