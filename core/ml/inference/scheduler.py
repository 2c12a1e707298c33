"""What is computed in each step: a token of every answer, and as much of new prompts as fits."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import GraftError
from core.ml import base_model
from core.ml.inference import memory, sharing
from core.ml.inference.answering import Answering, failed
from core.ml.inference.batch.model import Batched, Row
from core.ml.inference.sampling import Choice, Sampler
from core.ml.inference.store.adapters import Adapters
from core.ml.inference.store.prefixes import Prefixes

logger = logging.getLogger(__name__)

# Others may overtake one whose adapter has to be read, but not for longer.
_PATIENCE_SECONDS = 2
_FEWEST_STEP_TOKENS = 16
# Steps in a row that went well, after which one may be larger again.
_GOOD_STEPS = 100
# Steps in a row of which every answer failed: then it is not the answers.
_FAILURES = 3
# Of the memory that is free beside the base model: keys and values of the answers being written.
_CACHE_SHARE_GPU = 0.6
_CACHE_SHARE_CPU = 0.25


class EngineBroken(Exception):
    """Nothing can be computed any more."""


@dataclass(frozen=True)
class Limits:
    """Bytes of adapters, of kept prompts and of the answers being written (None: a share of what is free); answers at a
    time and waiting; tokens of a step beside one for each answer; seconds of an answer, and of idleness after which the
    model leaves memory."""

    adapter_bytes: int = 2**30
    prefix_bytes: int = 2**28
    cache_bytes: int | None = None
    running: int = 32
    waiting: int = 128
    step_tokens: int = 512
    answer_seconds: float = 600
    idle_seconds: float = 0


class Scheduler:
    """The answers of one base model. All of it runs in one thread."""

    def __init__(self, model: Batched, adapters: Adapters, prefixes: Prefixes, limits: Limits) -> None:
        self.model, self.adapters, self.prefixes, self.limits = model, adapters, prefixes, limits
        self.step_tokens = limits.step_tokens
        # Tokens that all answers together may keep, reserved as they begin, so that none runs out of it.
        self.room = self.free = self._measured()
        self.running: list[Answering] = []
        self._failures = self._good = 0
        # There was no memory for one more beside those running: until one of them is over there is none.
        self._short = False

    def _measured(self) -> int:
        """In tokens."""
        share = _CACHE_SHARE_GPU if torch.cuda.is_available() else _CACHE_SHARE_CPU
        given = self.limits.cache_bytes or int(base_model.free_bytes() * share)
        return given // self.model.token_bytes

    def admit(self, waiting: list[Answering]) -> None:
        """Begin with those of `waiting` for whom there is room, in their order, and take them off the list."""
        held: set[str] = set()
        for one in list(waiting):
            if one.most > self.room and not self.running:
                # Somebody else had the memory when it was measured.
                self.room = self.free = self._measured()
            if one.most > self.room and (not self.running or self.limits.cache_bytes):
                waiting.remove(one)
                one.fail(_too_long(one, self.room, fixed=self.limits.cache_bytes is not None))
                continue
            salt = one.request.salt
            if salt in held or sharing.is_beyond(one, self.running, self.limits.running, self.room):
                # It waits for its own project, in the order of that; others go past it.
                held.add(salt)
                continue
            # One that waits for room is not overtaken: small ones would keep it waiting for ever.
            if self._short or len(self.running) >= self.limits.running or one.most > self.free:
                break
            if one.after is not None and not one.after.new and not one.after.over:
                continue
            if self._begun(one):
                waiting.remove(one)
                continue
            one.reading_since = one.reading_since or time.monotonic()
            if time.monotonic() - one.reading_since > _PATIENCE_SECONDS:
                break

    def _begun(self, one: Answering) -> bool:
        """Whether it began or can never begin; otherwise its adapter, or memory, is still to come."""
        source = one.request.adapter
        try:
            if source is not None:
                one.adapter = self.adapters.take(source)
                if one.adapter is None:
                    return False
            one.sampler = Sampler(one.request.sampling, one.request.prompt, self.model.model.device)
            one.cache = self.model.cache(one.most)
            self.prefixes.fill(one.cache, one.root, one.request.prompt)
        except BaseException as error:  # what Rust panics with is no Exception
            self._give_back(one)
            if base_model.is_out_of_memory(error):
                self._make_room(error)
                if self.running or not one.room_made:
                    self._short = bool(self.running)
                    one.room_made = not self.running
                    return False
            logger.exception("an answer of %s", source.name if source else one.request.base)
            one.fail(failed(error))
            return True
        self.free -= one.most
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
        computed = self._computed(rows)
        for one, logits in computed:
            self._choose(one, logits)
        for one in first if computed else ():
            self._keep(one, one.request.prompt)
        for one in [one for one in self.running if one.over]:
            self._end(one)

    def _rows(self) -> list[tuple[Answering, Row]]:
        """What each answer reads: its last token where it is being written, however many they are; then prompts, one
        after the other, as far as the step goes."""
        left, rows = self.step_tokens, []
        for one in sorted(self.running, key=lambda one: not one.new):
            assert one.cache is not None
            unread = one.unread
            read = unread if one.new else unread[: max(left, 0)]
            if read:
                rows.append((one, Row(one.cache, read, one.adapter, len(read) == len(unread))))
            left -= 0 if one.new else len(read)
        return rows

    def _computed(self, rows: Sequence[tuple[Answering, Row]]) -> list[tuple[Answering, Tensor]]:
        """The logits of each answered row. What breaks for one alone ends that one alone."""
        answered = [one for one, row in rows if row.answered]
        try:
            found = list(zip(answered, self.model.read([row for _, row in rows]), strict=True))
        except Exception as error:
            if base_model.is_out_of_memory(error):
                logger.warning("out of memory with %d tokens in a step: %s", self.step_tokens, error)
                self._make_room(error)
                return self._with_less(rows)
            logger.exception("a step of %d answers", len(rows))
            memory.let_go(error)
            return self._one_by_one(rows)
        self._failures = 0
        self._good += 1
        if self._good >= _GOOD_STEPS and self.step_tokens < self.limits.step_tokens:
            self._good, self.step_tokens = 0, min(self.step_tokens * 2, self.limits.step_tokens)
        return found

    def _make_room(self, error: BaseException) -> None:
        memory.let_go(error)
        self.prefixes.clear()
        self.model.routing.forget()
        torch.cuda.empty_cache()

    def _with_less(self, rows: Sequence[tuple[Answering, Row]]) -> list[tuple[Answering, Tensor]]:
        """The step is done anew, by the next call, with half as many tokens."""
        self._good = 0
        if self.step_tokens <= _FEWEST_STEP_TOKENS:
            return self._one_by_one(rows)
        self.step_tokens //= 2
        return []

    def _one_by_one(self, rows: Sequence[tuple[Answering, Row]]) -> list[tuple[Answering, Tensor]]:
        found, broken = [], None
        for one, row in rows:
            try:
                logits = self._alone(row)
            except Exception as error:  # noqa: BLE001 - it is told to the one whom it concerns
                one.fail(failed(error))
                # Asking for more memory than there is says nothing of the engine.
                broken = broken if base_model.is_out_of_memory(error) else error
            else:
                found += [(one, logits[0])] if row.answered else []
        if any(not one.over for one, _ in rows):
            self._failures = 0
        elif broken is not None:
            self._failures += 1
        if self._failures >= _FAILURES:
            raise EngineBroken(str(broken)) from broken
        return found

    def _alone(self, row: Row) -> Tensor:
        """The logits of one row; where memory is short, with all the room that can be made."""
        try:
            return self.model.read([row])
        except Exception as error:
            if not base_model.is_out_of_memory(error):
                raise
            self._make_room(error)
        return self.model.read([row])

    def _choose(self, one: Answering, logits: Tensor) -> None:
        assert one.sampler is not None
        likeliest, token = logits.max(-1)
        if not torch.isfinite(likeliest):
            one.fail_without_numbers()
            return
        try:
            one.take(Choice(int(token)) if one.request.sampling.plain else one.sampler.choose(logits))
        except BaseException as error:
            logger.exception("the choice of a token")
            one.fail(failed(error))

    def _end(self, one: Answering) -> None:
        self.running.remove(one)
        self.free += one.most
        self._short = False
        # The next prompt of a conversation begins with this one and its answer.
        self._keep(one, one.tokens)
        self._give_back(one)
        if not self.running:
            self.model.routing.forget()

    def _give_back(self, one: Answering) -> None:
        one.cache = None
        if one.adapter is not None and one.request.adapter is not None:
            one.adapter = None
            self.adapters.give_back(one.request.adapter)

    def _keep(self, one: Answering, tokens: Sequence[int]) -> None:
        if one.cache is None or one.failed:
            return
        try:
            self.prefixes.keep(one.cache, one.root, tokens[: one.cache.length])
        except Exception as error:
            if not base_model.is_out_of_memory(error):
                raise
            self._make_room(error)


def _too_long(one: Answering, room: int, *, fixed: bool) -> GraftError:
    return GraftError(
        "prompt_too_long" if fixed else "device_full",
        f"{len(one.request.prompt)} prompt tokens and {one.request.sampling.max_tokens} new ones are more than the "
        f"{room} that the engine has memory for{'' if fixed else ' at the moment'}.",
        status=400 if fixed else 503,
        hint="Ask for fewer tokens, or give the engine more memory: GRAFT_ENGINE_CACHE_BYTES.",
    )
