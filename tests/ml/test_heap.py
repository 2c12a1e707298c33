"""What a run's tensors leave of the C library's heap."""

import pytest
import torch
from transformers import TrainerState

from core.ml.training.loop.heap import Heap
from core.ml.training.loop.reporter import memory_bytes

MEGABYTE = 1024 * 1024


def holes() -> list[torch.Tensor]:
    """Every hundredth of 4,000 blocks of 64 KB: what lies between them is free, and belongs to the process."""
    blocks = [torch.ones(16 * 1024) for _ in range(4_000)]
    return blocks[::100]


def end(heap: Heap, step: int) -> None:
    heap.on_step_end(None, TrainerState(global_step=step), None)


def test_more_than_planned_is_given_back() -> None:
    before = memory_bytes()
    kept = holes()
    taken = memory_bytes()
    assert taken > before + 200 * MEGABYTE
    end(Heap(before, 400 * MEGABYTE), 1)
    assert memory_bytes() > taken - 20 * MEGABYTE
    end(Heap(before, 100 * MEGABYTE), 1)
    assert memory_bytes() < before + 50 * MEGABYTE
    assert all(bool((block == 1).all()) for block in kept)


def test_it_is_not_done_at_every_step_where_the_run_really_needs_more() -> None:
    heap = Heap(memory_bytes(), 10 * MEGABYTE)
    before = memory_bytes()
    for step in (1, 2, 3):
        kept = holes()
        end(heap, step)
        assert (memory_bytes() < before + 50 * MEGABYTE) is (step < 3), step
    assert kept


def test_without_a_plan_the_first_step_is_the_measure() -> None:
    heap = Heap(memory_bytes(), None)
    end(heap, 1)
    assert heap.most == pytest.approx(1.25 * memory_bytes(), rel=0.02)
