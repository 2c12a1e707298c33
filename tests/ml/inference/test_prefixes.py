"""Beginnings of prompts that are known again, and only where everything they depend on is the same."""

import torch

from core.ml.inference.batch.attention import Cache
from core.ml.inference.store.prefixes import BLOCK, Prefixes

TOKENS = list(range(3 * BLOCK + 5))
SHAPE = (2, 2, 1, 3 * BLOCK + 5, 4)
BLOCK_BYTES = 2 * 2 * 1 * BLOCK * 4 * 4


def full(seed: int = 0) -> Cache:
    cache = Cache(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))
    cache.length = len(TOKENS)
    return cache


def filled(prefixes: Prefixes, root: str = "a", tokens: list[int] = TOKENS) -> Cache:
    cache = Cache(torch.zeros(SHAPE))
    prefixes.fill(cache, root, tokens)
    return cache


def test_whole_blocks_are_known_again() -> None:
    prefixes = Prefixes(2**20)
    prefixes.keep(full(), "a", TOKENS)
    cache = filled(prefixes)
    assert cache.length == 3 * BLOCK
    assert torch.equal(cache.tensor[:, :, :, : 3 * BLOCK], full().tensor[:, :, :, : 3 * BLOCK])
    assert not cache.tensor[:, :, :, 3 * BLOCK :].any()


def test_the_last_token_is_always_read() -> None:
    prefixes = Prefixes(2**20)
    prefixes.keep(full(), "a", TOKENS)
    assert filled(prefixes, tokens=TOKENS[: 2 * BLOCK]).length == BLOCK
    assert filled(prefixes, tokens=TOKENS[: 2 * BLOCK + 1]).length == 2 * BLOCK
    assert filled(prefixes, tokens=TOKENS[:1]).length == 0


def test_another_root_or_another_beginning_knows_nothing() -> None:
    prefixes = Prefixes(2**20)
    prefixes.keep(full(), "a", TOKENS)
    assert filled(prefixes, "b").length == 0
    assert filled(prefixes, tokens=[7, *TOKENS[1:]]).length == 0
    changed = [*TOKENS[:BLOCK], 999, *TOKENS[BLOCK + 1 :]]
    assert filled(prefixes, tokens=changed).length == BLOCK


def test_later_changes_of_a_cache_do_not_reach_what_was_kept() -> None:
    prefixes, cache = Prefixes(2**20), full()
    prefixes.keep(cache, "a", TOKENS)
    cache.tensor.zero_()
    assert torch.equal(filled(prefixes).tensor[0, 0, 0, 0], full().tensor[0, 0, 0, 0])


def test_a_budget_holds_the_beginnings_of_the_latest() -> None:
    prefixes = Prefixes(3 * BLOCK_BYTES)
    prefixes.keep(full(), "a", TOKENS)
    prefixes.keep(full(), "b", TOKENS[: 2 * BLOCK])
    assert filled(prefixes, "b").length == 2 * BLOCK
    assert filled(prefixes, "a").length == BLOCK
    assert prefixes._room == 0
    prefixes.clear()
    assert prefixes._room == 3 * BLOCK_BYTES
    assert filled(prefixes, "b").length == 0


def test_a_prompt_longer_than_the_budget_keeps_its_beginning() -> None:
    prefixes = Prefixes(2 * BLOCK_BYTES)
    prefixes.keep(full(), "a", TOKENS)
    assert filled(prefixes).length == 2 * BLOCK
    nothing = Prefixes(0)
    nothing.keep(full(), "a", TOKENS)
    assert filled(nothing).length == 0
