"""What a run's tensors leave of the C library's heap."""

import ctypes

import pytest
import torch
from transformers import TrainerState

from core.ml.training.loop.heap import Heap, taken

MEGABYTE = 1024 * 1024


@pytest.fixture(autouse=True)
def no_holes_yet() -> None:
    """What earlier tests left free in this process would take the blocks, and nothing would grow."""
    ctypes.CDLL(None).malloc_trim(0)


def holes() -> list[torch.Tensor]:
    """Every hundredth of 4,000 blocks of 64 KB: what lies between them is free, and belongs to the process."""
    blocks = [torch.ones(16 * 1024) for _ in range(4_000)]
    return blocks[::100]


def end(heap: Heap, step: int) -> None:
    heap.on_step_end(None, TrainerState(global_step=step), None)


def test_more_than_planned_is_given_back() -> None:
    before = taken()
    kept = holes()
    grown = taken()
    assert grown > before + 200 * MEGABYTE
    end(Heap(before, 400 * MEGABYTE), 1)
    assert taken() > grown - 20 * MEGABYTE
    end(Heap(before, 100 * MEGABYTE), 1)
    assert taken() < before + 50 * MEGABYTE
    assert all(bool((block == 1).all()) for block in kept)


def test_every_few_steps_at_most() -> None:
    heap, before = Heap(taken(), 10 * MEGABYTE), taken()
    for step in range(1, 7):
        kept = holes()
        end(heap, step)
        assert (taken() < before + 50 * MEGABYTE) is (step in (1, 5)), step
        assert kept


def test_without_a_plan_the_first_step_is_the_measure() -> None:
    heap = Heap(taken(), None)
    end(heap, 1)
    assert heap.most == pytest.approx(1.25 * taken(), rel=0.02)
