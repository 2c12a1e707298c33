"""The engine: one base model in memory, many adapters beside it, the answers of all of them written together.

Knows no HTTP. A caller gives token ids and hears of text through a callback. One thread computes; everything else is
done in the callers' threads, or in that which reads adapters.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from core.errors import GraftError, NotFound
from core.ml import base_model, catalogue
from core.ml.base_model import Precision
from core.ml.catalogue import Catalogue
from core.ml.inference import bases, compat, memory, sharing
from core.ml.inference.answering import Answering, Request, Told, device_busy, failed, unavailable
from core.ml.inference.bases import Base
from core.ml.inference.batch.model import Batched
from core.ml.inference.memory import Shared
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Limits, Scheduler
from core.ml.inference.store import files
from core.ml.inference.store.adapters import Adapters
from core.ml.inference.store.files import Source
from core.ml.inference.store.prefixes import Prefixes
from core.ml.inference.text import TextStream

logger = logging.getLogger(__name__)

# How long to look away while nothing is asked, where somebody else may want the device; and while an adapter is read.
_LOOK_SECONDS, _ADAPTER_SECONDS = 0.2, 0.01
_CLOSED = "it is closed"


class Engine:
    """Thread-safe."""

    def __init__(
        self,
        models: Catalogue,
        precision: Precision,
        limits: Limits | None = None,
        broke: Callable[[], None] = lambda: None,
        shared: Shared | None = None,
    ) -> None:
        """`broke` is called, in the engine's thread, when it can do nothing more and all who waited were told; `shared`:
        the device, where others need it too."""
        self.limits = limits or Limits()
        self._shared = shared
        self.broken: str | None = None
        self._catalogue, self._precision, self._broke = models, precision, broke
        self._bases: dict[str, Base] = {}
        self._looking = threading.Lock()
        self._sources: dict[str, Source] = {}
        self._adapters = Adapters(self.limits.adapter_bytes, partial(files.read_for, precision), self._wake)
        self._prefixes = Prefixes(self.limits.prefix_bytes)
        # The base model in memory, whether kept from the fused kernel; its scheduler unless peft has it; what peft writes.
        self._held: str | None = None
        self._model: Any = None
        self._unfused = False
        self._scheduler: Scheduler | None = None
        self._alone: Answering | None = None
        # Guards what follows, and wakes the thread.
        self._changed = threading.Condition()
        self._waiting: list[Answering] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def register(self, name: str, base: str, folder: Path) -> None:
        """Make an adapter known. A name that is known already means the new content from now on; answers that have begun
        go on with the old.

        Raises:
            Conflict: `adapter_mismatch`, its tensors or its base model do not fit.
            FileNotFoundError: a file is missing.
        """
        self._sources[name] = files.look(name, base, folder, self._base(base).layers)

    def _base(self, name: str) -> Base:
        """Looked at once, however many ask at a time."""
        if name not in self._bases:
            with self._looking:
                if name not in self._bases:
                    self._bases[name] = bases.look(self._catalogue, name)
        return self._bases[name]

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
            text = TextStream(base.tokenizer, list(one.stop), bases.before(base, prompt))
            ends = base.ends | set(one.stop_token_ids)
            after = asked[0] if asked else None
            asked.append(Answering(request, ends, text, partial(tell, number), cancelled, after))
        with self._changed:
            if self.broken is not None or self._closing:
                raise unavailable(self.broken or _CLOSED)
            sharing.check_queue(self._waiting, len(asked), salt, self.limits.waiting)
            self._waiting += asked
            self._changed.notify()

    def close(self, *, wait: bool = True) -> None:
        """Whoever still waits for an answer is told, at once or, where it is being written, with the next token."""
        with self._changed:
            self._closing, left, self._waiting = True, self._waiting, []
            self._changed.notify()
        for one in left:
            one.fail(unavailable(_CLOSED))
        if wait:
            self._thread.join()

    def state(self) -> dict[str, Any]:
        """What it holds and does."""
        scheduler = self._scheduler
        return {
            "base_model": self._held,
            "running": int(self._alone is not None) + (len(scheduler.running) if scheduler else 0),
            "waiting": len(self._waiting),
            "adapters": len(self._adapters),
        }

    def _run(self) -> None:
        try:
            while self._wait():
                self._step()
        except BaseException as error:  # also what Rust panics with: nobody else would tell those who wait
            logger.exception("the engine broke")
            self._end(f"it broke, and is started anew: {type(error).__name__}: {error}")
            self._broke()
        else:
            self._end(_CLOSED)

    def _end(self, why: str) -> None:
        """Nothing is answered any more, and whoever waits is told."""
        with self._changed:
            self.broken = why
            left, self._waiting = self._waiting, []
        for one in [*left, *(self._scheduler.running if self._scheduler else [])]:
            one.fail(unavailable(why))

    def _wait(self) -> bool:
        """Until there is something to do; False when the engine is closed. Idle, the memory goes back."""
        idle, limit = time.monotonic(), self.limits.idle_seconds
        with self._changed:
            while not (self._closing or self._waiting or self._running()):
                if self._held and (self._wanted() or (limit and time.monotonic() - idle > limit)):
                    self._release()
                self._changed.wait(_LOOK_SECONDS if limit or self._shared else None)
            return not self._closing

    def _wanted(self) -> bool:
        return self._shared is not None and self._shared.wanted()

    def _running(self) -> bool:
        return bool(self._scheduler and self._scheduler.running)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _look_up(self) -> None:
        """See who does not wait any more, or must not."""
        if self._closing and self._alone is not None:
            self._alone.fail(unavailable(_CLOSED))
        with self._changed:
            # Where others want the device, begin nothing new: what is being written is finished, then the memory goes back.
            for one in self._waiting if self._wanted() else ():
                one.fail(device_busy())
            self._waiting = [one for one in self._waiting if not one.leave()]

    def _step(self) -> None:
        self._look_up()
        head = next(iter(self._waiting), None)
        if self._held and not self._running() and self._wanted():
            # Not only while nobody asks: those who ask again and again would keep the device for ever.
            self._release()
            return
        if head is not None and not self._running():
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
            self._hold(head.request)
            if not self._apart(head):
                if self._scheduler is None:
                    # Under a name of its own the model would outlive its release here.
                    self._scheduler = Scheduler(
                        Batched(self._model), self._adapters, self._prefixes, self.limits
                    )
                return
            if self._scheduler is not None:
                self._scheduler.model.close()
                self._scheduler = None
            self._withdraw(head)
            head.path, self._alone = "compat", head
            compat.answer(self._model, head, self._look_up)
        except BaseException as error:
            logger.exception("%s", head.request.base)
            self._withdraw(head)
            head.fail(failed(error))
            if not isinstance(error, GraftError) or self._model is None or not compat.is_bare(self._model):
                # Whatever half of it is in memory must not answer anybody.
                memory.let_go(error)
                self._release()
            if isinstance(error, torch.AcceleratorError) and not base_model.is_out_of_memory(error):
                raise  # the device takes nothing more from this process
        finally:
            self._alone = None

    def _withdraw(self, one: Answering) -> None:
        with self._changed:
            self._waiting = [other for other in self._waiting if other is not one]

    def _hold(self, request: Request) -> None:
        """Its base model; with the fused kernel, which is faster, unless its adapter forbids that."""
        unfused = request.adapter is not None and request.adapter.unfused
        held = self._held == request.base
        if held and not (base_model.is_fused(self._model) if unfused else self._unfused):
            return
        self._release()
        if self._shared is not None:
            self._shared.hold()
            if self._shared.wanted():
                raise device_busy()
        self._model = bases.load(self._catalogue, request.base, self._precision)
        self._unfused = unfused and base_model.is_fused(self._model)
        if self._unfused:
            base_model.unfuse(self._model)
        self._held = request.base

    def _release(self) -> None:
        """Give all memory back. Nothing may be running."""
        self._held = self._model = self._scheduler = None
        self._adapters.clear()
        self._prefixes.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._shared is not None:
            self._shared.give_back()
