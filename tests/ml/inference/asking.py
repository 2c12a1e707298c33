"""Ask an engine and wait for all of the answer."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from core.errors import GraftError
from core.ml.inference.answering import Finish, Piece, Told
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Choice, Sampling


@dataclass
class Heard:
    """One answer as it comes."""

    pieces: list[Piece] = field(default_factory=list)
    finish: Finish | None = None
    error: GraftError | None = None
    over: threading.Event = field(default_factory=threading.Event)
    first: threading.Event = field(default_factory=threading.Event)

    def tell(self, told: Told) -> None:
        if isinstance(told, Piece):
            self.pieces.append(told)
            self.first.set()
            return
        if isinstance(told, Finish):
            self.finish = told
        else:
            self.error = told
        self.over.set()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def choices(self) -> list[Choice]:
        return [choice for piece in self.pieces for choice in piece.choices]

    @property
    def tokens(self) -> list[int]:
        return [choice.token for choice in self.choices]

    def wait(self) -> "Heard":
        assert self.over.wait(60), "no end of the answer"
        if self.error is not None:
            raise self.error
        return self


def ask(
    engine: Engine,
    name: str,
    prompt: list[int],
    sampling: Sampling,
    cancelled: Callable[[], bool] = lambda: False,
    salt: str = "",
) -> Heard:
    """Its tokens can be read: log probabilities are asked for."""
    return asked(engine, name, prompt, [sampling], cancelled, salt)[0]


def asked(
    engine: Engine,
    name: str,
    prompt: list[int],
    samplings: list[Sampling],
    cancelled: Callable[[], bool] = lambda: False,
    salt: str = "",
) -> list[Heard]:
    heard = [Heard() for _ in samplings]
    engine.submit(
        name,
        prompt,
        [one if one.logprobs is not None else replace(one, logprobs=0) for one in samplings],
        lambda number, told: heard[number].tell(told),
        cancelled,
        salt,
    )
    return heard


def reason(heard: Heard) -> str:
    finish = heard.wait().finish
    assert finish is not None
    return finish.reason


def idle(engine: Engine) -> bool:
    """Whether it comes to have nothing to do."""
    for _ in range(1_000):
        state = engine.state()
        if not state["running"] and not state["waiting"]:
            return True
        time.sleep(0.005)
    return False
