"""The engine: one base model in memory, many adapters beside it, the answers of all of them written together.

Knows no HTTP. A caller gives token ids and hears of text through a callback. One thread computes; everything else is
done in the callers' threads, or in that which reads adapters.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from core.errors import GraftError, NotFound
from core.ml import base_model, catalogue
from core.ml.base_model import Precision
from core.ml.catalogue import Catalogue
from core.ml.inference import bases, compat
from core.ml.inference.answering import Answering, Request, Told, failed
from core.ml.inference.batch.lora import Adapter
from core.ml.inference.batch.model import Batched
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Scheduler
from core.ml.inference.store import adapters
from core.ml.inference.store.adapters import Adapters, Source
from core.ml.inference.store.prefixes import Prefixes
from core.ml.inference.text import TextStream

logger = logging.getLogger(__name__)

# Of the memory that is free beside the base model: keys and values of the answers being written.
_CACHE_SHARE_GPU = 0.6
_CACHE_SHARE_CPU = 0.25
# How long to look away while an adapter is being read.
_ADAPTER_SECONDS = 0.01


@dataclass(frozen=True)
class Limits:
    """Bytes of adapters, of kept prompts and of the answers being written (None: a share of what is free); answers at a
    time and waiting; tokens of a step; seconds of an answer, and of idleness after which the model leaves memory."""

    adapter_bytes: int = 2**30
    prefix_bytes: int = 2**28
    cache_bytes: int | None = None
    running: int = 32
    waiting: int = 128
    step_tokens: int = 512
    answer_seconds: float = 600
    idle_seconds: float = 0


class Engine:
    """Thread-safe."""

    def __init__(
        self,
        models: Catalogue,
        precision: Precision,
        limits: Limits | None = None,
        broke: Callable[[], None] = lambda: None,
    ) -> None:
        """`broke` is called, in the engine's thread, when it can do nothing more and all who waited were told."""
        self.limits = limits or Limits()
        self.broken: str | None = None
        self._catalogue, self._precision, self._broke = models, precision, broke
        self._base = cache(partial(bases.look, models))
        self._sources: dict[str, Source] = {}
        self._adapters = Adapters(self.limits.adapter_bytes, self._read, self._wake)
        self._prefixes = Prefixes(self.limits.prefix_bytes)
        # The base model in memory, and its scheduler unless peft has it.
        self._held: str | None = None
        self._model: Any = None
        self._scheduler: Scheduler | None = None
        # Guards what follows, and wakes the thread.
        self._changed = threading.Condition()
        self._waiting: list[Answering] = []
        self._asleep = threading.Event()
        self._tired = self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def register(self, name: str, base: str, folder: Path) -> None:
        """Make an adapter known. A name that is known already means the new content from now on; answers that have begun
        go on with the old.

        Raises:
            Conflict: `adapter_mismatch`, its tensors or its base model do not fit.
            FileNotFoundError: a file is missing.
        """
        self._sources[name] = adapters.look(name, base, folder, self._base(base).layers)

    def knows(self, name: str) -> bool:
        """Whether a completion can name this: a registered adapter, or a base model that is here."""
        if name in self._sources:
            return True
        try:
            return catalogue.find(self._catalogue, name).ready
        except NotFound:
            return False

    def submit(
        self,
        name: str,
        prompt: list[int],
        sampling: Sequence[Sampling],
        tell: Callable[[int, Told], None],
        cancelled: Callable[[], bool],
        salt: str = "",
    ) -> None:
        """Ask for answers to a prompt, one for each sampling; `tell` hears of them by their number. Prompts are known
        again only under the same `salt`.

        Raises:
            BadRequest: token ids outside the vocabulary, or more than the model reads.
            GraftError: `engine_full`, or `engine_unavailable` where it is broken.
        """
        source = self._sources.get(name)
        base_name = source.base if source else name
        base = self._base(base_name)
        deadline = time.monotonic() + self.limits.answer_seconds
        asked: list[Answering] = []
        for number, one in enumerate(sampling):
            bases.check(base, prompt, one)
            request = Request(base_name, source, prompt, one, deadline, salt)
            text = TextStream(base.tokenizer, list(one.stop))
            ends = base.ends | set(one.stop_token_ids)
            after = asked[0] if asked else None
            asked.append(Answering(request, ends, text, partial(tell, number), cancelled, after))
        with self._changed:
            if self.broken is not None:
                raise _unavailable(self.broken)
            if len(self._waiting) + len(asked) > self.limits.waiting:
                waiting = len(self._waiting)
                raise GraftError("engine_full", f"{waiting} requests are waiting already.", status=429)
            self._waiting += asked
            self._changed.notify()

    def sleep(self) -> None:
        """Give the memory back once nothing is being written; the next request loads the model anew."""
        with self._changed:
            self._asleep.clear()
            self._tired = True
            self._changed.notify()
        self._asleep.wait()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def state(self) -> dict[str, Any]:
        """What it holds and does."""
        scheduler = self._scheduler
        return {
            "base_model": self._held,
            "running": len(scheduler.running) if scheduler else 0,
            "waiting": len(self._waiting),
            "adapters": len(self._adapters),
        }

    def _run(self) -> None:
        try:
            while self._wait():
                self._step()
        except Exception as error:
            logger.exception("the engine broke")
            with self._changed:
                self.broken = f"{type(error).__name__}: {error}"
                left, self._waiting = self._waiting, []
            for one in [*left, *(self._scheduler.running if self._scheduler else [])]:
                one.fail(_unavailable(self.broken))
            self._broke()
        self._asleep.set()

    def _wait(self) -> bool:
        """Until there is something to do; False when the engine is closed."""
        with self._changed:
            while not self._closing and not self._busy():
                if self._tired or not self._changed.wait(self.limits.idle_seconds or None):
                    self._release()
            return not self._closing

    def _busy(self) -> bool:
        return bool(self._waiting) or bool(self._scheduler and self._scheduler.running)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _step(self) -> None:
        with self._changed:
            self._waiting = [one for one in self._waiting if not one.leave()]
            head = self._waiting[0] if self._waiting else None
        running = self._scheduler is not None and bool(self._scheduler.running)
        if head is not None and not running:
            self._turn_to(head)
        if self._scheduler is None:
            return
        with self._changed:
            # Whoever wants another model waits until this one's answers are written, and nobody overtakes him.
            mine = list(takewhile(self._fits, self._waiting))
            others = self._waiting[len(mine) :]
            self._scheduler.admit(mine)
            self._waiting = mine + others
            if not self._scheduler.running:
                self._changed.wait(_ADAPTER_SECONDS)
                return
        self._scheduler.step()

    def _fits(self, one: Answering) -> bool:
        return one.request.base == self._held and not self._apart(one)

    def _apart(self, one: Answering) -> bool:
        source = one.request.adapter
        return not self._base(one.request.base).layers or (source is not None and source.apart)

    def _turn_to(self, head: Answering) -> None:
        """Have the model in memory that the first in the queue asks for; one that peft has to serve is answered."""
        try:
            self._hold(head.request.base)
            if not self._apart(head):
                self._scheduler = self._scheduler or self._batched()
                return
            if self._scheduler is not None:
                self._scheduler.model.close()
                self._scheduler = None
            self._withdraw(head)
            head.path = "compat"
            compat.answer(self._model, head)
        except Exception as error:
            logger.exception("%s", head.request.base)
            self._withdraw(head)
            # Whatever half of it is in memory must not answer anybody.
            self._release()
            head.fail(failed(error))

    def _withdraw(self, one: Answering) -> None:
        with self._changed:
            self._waiting = [other for other in self._waiting if other is not one]

    def _hold(self, name: str) -> None:
        if self._held == name:
            return
        self._release()
        model = catalogue.find(self._catalogue, name)
        self._model = base_model.load(model, self._precision).eval()
        for layer in self._model.modules():
            # The fused CPU kernel fails on other shapes.
            if isinstance(layer, Linear4bit) and (
                layer.out_features % 32 or layer.in_features % layer.weight.quant_state.blocksize
            ):
                layer.support_avx512bf16_for_cpu = False
        self._held = name

    def _batched(self) -> Scheduler:
        model = Batched(self._model)
        share = _CACHE_SHARE_GPU if torch.cuda.is_available() else _CACHE_SHARE_CPU
        given = self.limits.cache_bytes or int(base_model.free_bytes() * share)
        return Scheduler(
            model,
            self._adapters,
            self._prefixes,
            room=given // model.token_bytes,
            running=self.limits.running,
            step_tokens=self.limits.step_tokens,
        )

    def _release(self) -> None:
        """Give all memory back. Nothing may be running."""
        self._held = self._model = self._scheduler = None
        self._adapters.clear()
        self._prefixes.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._tired = False
        self._asleep.set()

    def _read(self, source: Source) -> Adapter:
        # On a CPU float32 is faster than bfloat16 for so few rows.
        dtype = self._precision.torch_dtype if torch.cuda.is_available() else torch.float32
        return adapters.read(source, base_model.device(), dtype)


def _unavailable(why: str | None) -> GraftError:
    return GraftError("engine_unavailable", f"The engine broke, and is started anew: {why}", status=503)
