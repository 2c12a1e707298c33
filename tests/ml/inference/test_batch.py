"""What is read in batches is what a request alone is answered, token for token, in every architecture that is allowed."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from core.ml.inference.answering import Answering, Request
from core.ml.inference.batch.attention import Cache
from core.ml.inference.batch.lora import linear_layers
from core.ml.inference.batch.model import ARCHITECTURES, Batched, Row, supported
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Limits, Scheduler
from core.ml.inference.store import files
from core.ml.inference.store.adapters import Adapters
from core.ml.inference.store.files import Source
from core.ml.inference.store.prefixes import Prefixes
from core.ml.inference.text import TextStream
from tests import tiny
from tests.ml.inference import strong

LENGTHS = (1, 5, 31, 32, 33, 70)
NEW = 16
END = 319
KINDS = [{"r": 4}, {"r": 8, "use_rslora": True}, {"r": 12, "alpha_pattern": {"q_proj": 64, "o_proj": 8}}]


class Case:
    """A model, three adapters, prompts, and what each of the four says to each prompt alone."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        lengths: Sequence[int] = LENGTHS,
        kinds: Sequence[dict[str, Any]] = KINDS,
    ) -> None:
        self.base = strong.model(folder / "base", strong.CONFIGURATIONS[kind])
        self.prompts = [strong.prompt(length) for length in lengths]
        folders = [
            strong.adapter(folder / f"a{number}", self.base, number, **settings)
            for number, settings in enumerate(kinds)
        ]
        layers = linear_layers(strong.loaded(self.base))
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        self.sources = [None, *(files.look(one.name, tiny.NAME, one, shapes) for one in folders)]
        self.alone = {
            (who, place): strong.alone(model, asked, NEW, [END])
            for who, model in enumerate(
                [strong.loaded(self.base), *(strong.loaded(self.base, one) for one in folders)]
            )
            for place, asked in enumerate(self.prompts)
        }

    def scheduler(self, step_tokens: int, room: int = 400, prefix_bytes: int = 0) -> Scheduler:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

        def read(source: Source) -> files.Adapter:
            return files.read(source, torch.device("cpu"), torch.float32)

        kept = Adapters(2**30, read, lambda: None)
        batched = Batched(model)
        limits = Limits(cache_bytes=room * batched.token_bytes, step_tokens=step_tokens)
        return Scheduler(batched, kept, Prefixes(prefix_bytes), limits)

    def ask(self, who: int, place: int, count: int = NEW) -> Answering:
        request = Request(
            tiny.NAME, self.sources[who], self.prompts[place], Sampling(count), deadline=float("inf")
        )
        text = TextStream(tiny.tokenizer(), [])
        return Answering(request, frozenset([END]), text, lambda _told: None, lambda: False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama")


def finish(scheduler: Scheduler, waiting: list[Answering]) -> None:
    for _ in range(10_000):
        scheduler.admit(waiting)
        scheduler.step()
        if not waiting and not scheduler.running:
            return
        if not scheduler.running:
            time.sleep(0.001)  # an adapter is being read
    raise AssertionError("it does not end")


@pytest.mark.parametrize("kind", strong.CONFIGURATIONS)
def test_mixed_answers_are_those_of_a_request_alone(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, kind)
    assert supported(AutoConfig.from_pretrained(case.base))
    assert len({tuple(tokens) for tokens in case.alone.values()}) == len(case.alone)
    for step_tokens in (1, 7, 64, 10_000):
        scheduler = case.scheduler(step_tokens)
        asked = {key: case.ask(*key) for key in random.Random(step_tokens).sample(sorted(case.alone), 24)}
        finish(scheduler, list(asked.values()))
        assert {key: one.new for key, one in asked.items()} == case.alone
        assert scheduler.free == scheduler.room


def test_every_allowed_architecture_is_compared() -> None:
    built = {
        AutoModelForCausalLM.from_config(one).__class__.__name__ for one in strong.CONFIGURATIONS.values()
    }
    assert built == ARCHITECTURES


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_of_a_step_are_not_batched(kind: str) -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    assert not supported(config)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_one_to_four_adapters_in_a_step(llama: Case, count: int) -> None:
    """From two on they are multiplied together."""
    scheduler = llama.scheduler(10_000, room=10_000)
    asked = {(who, place): llama.ask(who, place) for who in range(count) for place in range(3)}
    finish(scheduler, list(asked.values()))
    assert {key: one.new for key, one in asked.items()} == {key: llama.alone[key] for key in asked}


def test_eight_adapters_and_long_prompts(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", lengths=(500, 33, 2), kinds=[{"r": 4 + n % 3} for n in range(8)])
    for step_tokens in (64, 10_000):
        scheduler = case.scheduler(step_tokens, room=6_000)
        asked = {key: case.ask(*key) for key in random.Random(step_tokens).sample(sorted(case.alone), 27)}
        finish(scheduler, list(asked.values()))
        assert {key: one.new for key, one in asked.items()} == case.alone


def test_more_answers_than_a_step_has_tokens_all_go_on(llama: Case) -> None:
    scheduler = llama.scheduler(2, room=10_000)
    asked = {(who, 1): llama.ask(who, 1) for who in range(4)}
    waiting = list(asked.values())
    while min(len(one.new) for one in asked.values()) < 4:
        before = [len(one.new) for one in asked.values()]
        scheduler.admit(waiting)
        scheduler.step()
        for length, one in zip(before, asked.values(), strict=True):
            assert len(one.new) == length + 1 or not length or one.over
    finish(scheduler, waiting)
    assert {key: one.new for key, one in asked.items()} == {key: llama.alone[key] for key in asked}


def test_too_little_memory_for_one_more_has_it_wait(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = llama.scheduler(64, room=10_000)
    first, second = llama.ask(0, 1), llama.ask(1, 2)
    waiting = [first]
    while not first.new:
        scheduler.admit(waiting)
        scheduler.step()

    tried = []

    def full(most: int) -> Cache:
        tried.append(most)
        raise torch.OutOfMemoryError("no memory")

    waiting.append(second)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.model, "cache", full)
        while not tried:  # its adapter is being read
            scheduler.admit(waiting)
            time.sleep(0.01)
        for _ in range(50):
            scheduler.admit(waiting)
        assert waiting == [second]
        assert len(tried) == 1  # each try drops what is known of prompts
        assert not second.over
        finish(scheduler, [])
        scheduler.admit(waiting)
        assert waiting == [second]  # alone, it tries once more when all that can go has gone
        scheduler.admit(waiting)
    assert second.failed
    assert not waiting
    assert scheduler.free == scheduler.room
    assert all(place.users == 0 for place in scheduler.adapters._places.values())


def test_too_little_memory_to_keep_a_prompt_keeps_none(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    scheduler = llama.scheduler(64, room=10_000, prefix_bytes=2**20)
    monkeypatch.setattr(scheduler.prefixes, "keep", full)
    one = llama.ask(0, 5)
    finish(scheduler, [one])
    assert one.new == llama.alone[0, 5]


def test_a_row_alone_that_finds_no_memory_is_read_once_more_with_room_made(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = llama.scheduler(64, room=10_000, prefix_bytes=2**20)
    finish(scheduler, [llama.ask(0, 5)])
    assert scheduler.prefixes._blocks
    read = scheduler.model.read
    failed = []

    def reads(rows: Sequence[Row]) -> torch.Tensor:
        if len(rows) > 1:
            failed.append("all")
            raise RuntimeError("a kernel")
        if scheduler.prefixes._blocks:
            failed.append("one")
            raise torch.OutOfMemoryError("no memory")
        return read(rows)

    monkeypatch.setattr(scheduler.model, "read", reads)
    first, second = llama.ask(0, 2), llama.ask(0, 3)
    finish(scheduler, [first, second])
    assert failed[:2] == ["all", "one"]
    assert [first.new, second.new] == [llama.alone[0, 2], llama.alone[0, 3]]


def test_steps_grow_again_after_a_shortage(llama: Case) -> None:
    scheduler = llama.scheduler(64, room=10_000)
    scheduler.step_tokens = 16
    for _ in range(30):
        finish(scheduler, [llama.ask(0, 1)])
    assert scheduler.step_tokens == 64


def test_a_choice_that_fails_ends_its_own_answer(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = llama.scheduler(64, room=10_000)
    good, bad = llama.ask(0, 1), llama.ask(0, 2)

    def push(_token: int) -> str:
        raise RuntimeError("no text")

    monkeypatch.setattr(bad.text, "push", push)
    finish(scheduler, [good, bad])
    assert good.new == llama.alone[0, 1]
    assert bad.failed


def test_stacks_are_dropped_with_most_of_their_adapters(llama: Case) -> None:
    scheduler = llama.scheduler(10_000, room=10_000)
    asked = [llama.ask(who, 1) for who in (1, 2, 3)]
    for one in asked[1:]:
        one.request = replace(one.request, sampling=Sampling(3))
    finish(scheduler, asked[:])
    assert scheduler.model.routing._seats == []
    finish(scheduler, [llama.ask(1, 1)])
    assert scheduler.model.routing._stacks == {}


def test_answers_come_and_go_at_any_step(llama: Case) -> None:
    numbers = random.Random(3)
    scheduler = llama.scheduler(24)
    asked = {key: llama.ask(*key) for key in llama.alone}
    gone = set(numbers.sample(sorted(asked), 6))
    waiting: list[Answering] = []
    left = list(asked.items())
    numbers.shuffle(left)
    while left or waiting or scheduler.running:
        if left and numbers.random() < 0.4:
            waiting.append(left.pop()[1])
        for key in gone:
            if len(asked[key].new) >= 3:
                asked[key].cancelled = lambda: True
        scheduler.admit(waiting)
        scheduler.step()
    for key, one in asked.items():
        assert one.new == (llama.alone[key][: len(one.new)] if key in gone else llama.alone[key])
    assert all(len(asked[key].new) < NEW for key in gone)
    assert scheduler.free == scheduler.room


def test_what_is_known_of_a_prompt_changes_no_token(llama: Case) -> None:
    for budget in (2**16, 2**24):
        scheduler = llama.scheduler(24, prefix_bytes=budget)
        for _ in range(2):
            asked = {key: llama.ask(*key) for key in llama.alone}
            finish(scheduler, list(asked.values()))
            assert {key: one.new for key, one in asked.items()} == llama.alone
    # The second time: two blocks of 70 tokens, one of 33; of 32 the last token has to be read.
    assert [asked[0, place].cached for place in range(len(LENGTHS))] == [0, 0, 0, 0, 32, 64]


def test_the_model_is_given_back_as_it_was(llama: Case) -> None:
    model = strong.loaded(llama.base)
    before = strong.alone(model, llama.prompts[3], NEW, [END])
    names = [name for name, _ in model.named_modules()]
    batched = Batched(model)
    batched.close()
    assert [name for name, _ in model.named_modules()] == names
    assert strong.alone(model, llama.prompts[3], NEW, [END]) == before
