"""What is computed in each step: a token of every answer, and as much of new prompts as fits."""

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import BadRequest, GraftError
from core.ml.inference.answering import Answering, failed
from core.ml.inference.batch.model import Batched, Row
from core.ml.inference.sampling import Choice, Sampler
from core.ml.inference.store.adapters import Adapters
from core.ml.inference.store.prefixes import Prefixes

logger = logging.getLogger(__name__)

# Others may overtake one whose adapter has to be read, but not for longer.
_PATIENCE_SECONDS = 2
_FEWEST_STEP_TOKENS = 16
# Steps in a row of which every answer failed: then it is not the answers.
_FAILURES = 3


class EngineBroken(Exception):
    """Nothing can be computed any more."""


class Scheduler:
    """The answers of one base model. All of it runs in one thread."""

    def __init__(
        self,
        model: Batched,
        adapters: Adapters,
        prefixes: Prefixes,
        *,
        room: int,
        running: int,
        step_tokens: int,
    ) -> None:
        """`room`: tokens that all answers together may keep, reserved as they begin, so that none runs out of it;
        `running`: answers at a time; `step_tokens`: tokens that a step reads at most."""
        self.model, self.adapters, self.prefixes = model, adapters, prefixes
        self.room, self.most_running, self.step_tokens = room, running, step_tokens
        self.free = room
        self.running: list[Answering] = []
        self._failures = 0

    def admit(self, waiting: list[Answering]) -> None:
        """Begin with those of `waiting` for whom there is room, in their order, and take them off the list."""
        for one in list(waiting):
            if one.most > self.room:
                waiting.remove(one)
                one.fail(_too_long(one, self.room))
                continue
            # One that waits for room is not overtaken: small ones would keep it waiting for ever.
            if len(self.running) >= self.most_running or one.most > self.free:
                break
            if one.after is not None and not one.after.new and not one.after.over:
                continue
            if self._begun(one):
                waiting.remove(one)
            elif time.monotonic() - one.since > _PATIENCE_SECONDS:
                break

    def _begun(self, one: Answering) -> bool:
        """Whether it began or can never begin; otherwise its adapter is still to come."""
        source = one.request.adapter
        try:
            if source is not None and one.adapter is None:
                one.adapter = self.adapters.take(source)
                if one.adapter is None:
                    return False
        except Exception as error:
            logger.exception("adapter %s", source.name if source else None)
            one.fail(failed(error))
            return True
        self.free -= one.most
        one.cache = self.model.cache(one.most)
        one.sampler = Sampler(one.request.sampling, one.request.prompt, self.model.model.device)
        self.prefixes.fill(one.cache, one.root, one.request.prompt)
        one.cached = one.cache.length
        self.running.append(one)
        return True

    def step(self) -> None:
        """One pass of the model.

        Raises:
            EngineBroken: every answer of several steps failed.
        """
        for one in [one for one in self.running if one.leave()]:
            self._end(one)
        rows = self._rows()
        if not rows:
            return
        first = [one for one, row in rows if not one.new and row.answered]
        for one, logits in self._computed(rows):
            self._choose(one, logits)
        for one in first:
            self._keep(one, one.request.prompt)
        for one in [one for one in self.running if one.over]:
            self._end(one)

    def _rows(self) -> list[tuple[Answering, Row]]:
        """What each answer reads: those being written first, then prompts, one after the other."""
        left, rows = self.step_tokens, []
        for one in sorted(self.running, key=lambda one: not one.new):
            if left <= 0:
                break
            assert one.cache is not None
            unread = one.unread
            read = unread[:left]
            rows.append((one, Row(one.cache, read, one.adapter, len(read) == len(unread))))
            left -= len(read)
        return rows

    def _computed(self, rows: Sequence[tuple[Answering, Row]]) -> list[tuple[Answering, Tensor]]:
        """The logits of each answered row. What breaks for one alone ends that one alone."""
        answered = [one for one, row in rows if row.answered]
        try:
            found = list(zip(answered, self.model.read([row for _, row in rows]), strict=True))
        except torch.OutOfMemoryError as error:
            logger.warning("out of memory with %d tokens in a step: %s", self.step_tokens, error)
            return self._with_less(rows, error)
        except Exception as error:
            logger.exception("a step of %d answers", len(rows))
            return self._alone(rows, error)
        self._failures = 0
        return found

    def _with_less(
        self, rows: Sequence[tuple[Answering, Row]], error: Exception
    ) -> list[tuple[Answering, Tensor]]:
        """The step is done anew, by the next call, with half as many tokens."""
        self.prefixes.clear()
        torch.cuda.empty_cache()
        if self.step_tokens <= _FEWEST_STEP_TOKENS:
            return self._alone(rows, error)
        self.step_tokens //= 2
        return []

    def _alone(
        self, rows: Sequence[tuple[Answering, Row]], error: Exception
    ) -> list[tuple[Answering, Tensor]]:
        found = []
        for one, row in rows:
            try:
                if len(rows) == 1:
                    raise error
                logits = self.model.read([row])
            except Exception as alone:  # noqa: BLE001 - it is told to the one whom it concerns
                one.fail(failed(alone))
            else:
                found += [(one, logits[0])] if row.answered else []
        self._failures = 0 if any(not one.over for one, _ in rows) else self._failures + 1
        if self._failures >= _FAILURES:
            raise EngineBroken(str(error)) from error
        return found

    def _choose(self, one: Answering, logits: Tensor) -> None:
        assert one.sampler is not None
        likeliest, token = logits.max(-1)
        if not torch.isfinite(likeliest):
            one.fail(GraftError("engine_error", "The model computed no numbers for this prompt.", status=502))
            return
        one.take(Choice(int(token)) if one.request.sampling.plain else one.sampler.choose(logits))

    def _end(self, one: Answering) -> None:
        self.running.remove(one)
        self.free += one.most
        # The next prompt of a conversation begins with this one and its answer.
        self._keep(one, one.tokens)
        one.cache = None
        if one.adapter is not None and one.request.adapter is not None:
            one.adapter = None
            self.adapters.give_back(one.request.adapter)

    def _keep(self, one: Answering, tokens: Sequence[int]) -> None:
        if one.cache is not None and not one.failed:
            self.prefixes.keep(one.cache, one.root, tokens[: one.cache.length])


def _too_long(one: Answering, room: int) -> BadRequest:
    return BadRequest(
        "prompt_too_long",
        f"{len(one.request.prompt)} prompt tokens and {one.request.sampling.max_tokens} new ones are more than the "
        f"{room} that the engine has memory for.",
        status=400,
        hint="Ask for fewer tokens, or give the engine more memory: GRAFT_ENGINE_CACHE_BYTES.",
    )
