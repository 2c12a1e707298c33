"""What is planned for a device: the fastest layout that fits into its memory."""

from array import array
from dataclasses import replace
from typing import Any

import pytest

from core.ml.training import plan
from core.ml.training.config import Spec, settle
from core.ml.training.data import Rows, Tokenised
from core.ml.training.plan import Device, Plan
from core.ml.training.spec import memory

GIGABYTE = 10**9
SMALL = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def planned(free: float, length: int = 256, *, cuda: bool = False, **spec: Any) -> Plan:
    rows = Rows(
        Tokenised(2048, lengths=array("i", [length] * 40), lines=array("q", range(40)), trained=array("i", [20 * length // 40] * 40)),
        range(40), [], None, [],
    )  # fmt: skip
    device = Device("bfloat16", cuda, int(free * GIGABYTE))
    return plan.made(settle(Spec.model_validate(spec)), rows, device, memory.shape_of(SMALL))


def layout(made: Plan) -> tuple[Any, bool, Any]:
    return made.spec.training.batch_size, made.kept, made.spec.training.gradient_checkpointing


def test_the_weights_of_a_shape_are_counted() -> None:
    shape = memory.shape_of(SMALL)
    assert shape is not None
    assert (shape.linear, shape.embedding) == (106_168_320, 28_311_552)
    # Of each layer r times inputs and outputs: q, k, v, o, gate, up, down.
    assert shape.adapter(16, "all-linear") == 30 * 16 * (1152 + 768 + 768 + 1152 + 2112 + 2112 + 2112)
    assert shape.adapter(8, ["q_proj"]) == 30 * 8 * 1152


@pytest.mark.parametrize("config", [{}, SMALL | {"num_local_experts": 8}, {"hidden_size": 4}])
def test_nothing_is_reckoned_for_other_models(config: dict[str, Any]) -> None:
    assert memory.shape_of(config) is None


def test_much_memory_takes_the_whole_step_at_once_with_weights_kept() -> None:
    assert layout(planned(20)) == (8, True, False)


def test_less_memory_gives_up_one_thing_after_the_other() -> None:
    seen = [layout(planned(free)) for free in (20, 2.5, 1.5, 0.1)]
    assert seen[0] == (8, True, False)
    assert seen[1][2] is False
    assert seen[1][0] < 8
    assert seen[2][2] is True
    # The smallest there is, even where it may not fit: the reckoning can be wrong.
    assert seen[3] == (1, False, True)
    sizes = [planned(free).memory_bytes or 0 for free in (20, 2.5, 1.5, 0.1)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_run_grows_with_the_shapes_it_meets() -> None:
    one, thirty, many = (
        planned(20, training={"max_steps": steps}).memory_bytes or 0 for steps in (1, 30, 1000)
    )
    assert one < thirty == many < one + 400_000_000


def test_an_attempt_that_goes_on_keeps_its_weights_as_they_were() -> None:
    rows = Rows(
        Tokenised(2048, lengths=array("i", [64] * 8), lines=array("q", range(8)), trained=array("i", [9] * 8)),
        range(8), [], None, [],
    )  # fmt: skip
    device = Device("bfloat16", cuda=False, free_bytes=20 * GIGABYTE)
    shape = memory.shape_of(SMALL)
    for kept in (True, False):
        assert plan.made(settle(Spec()), rows, device, shape, kept=kept).kept is kept
    # Dequantised they take half a gigabyte: what cannot be held is given up, whatever it was before.
    small = replace(device, free_bytes=GIGABYTE // 2)
    assert plan.made(settle(Spec()), rows, small, shape, kept=True).kept is False


def test_packed_rows_take_the_memory_of_whole_packs() -> None:
    packed = {"packing": True, "max_length": 2048}
    one, many = (planned(10, 200, cuda=True, training=training) for training in ({}, packed))
    assert (one.memory_bytes or 0) < (many.memory_bytes or 0) < 8 * GIGABYTE
    assert many.spec.training.batch_size == 2


def test_what_was_asked_for_stays() -> None:
    made = planned(0.1, training={"batch_size": 4, "gradient_checkpointing": False})
    assert layout(made) == (4, False, False)


def test_a_plan_leaves_no_auto() -> None:
    made = planned(20, cuda=True).spec.model_dump()
    assert "auto" not in str(made)


def test_steps_do_not_depend_on_the_layout() -> None:
    assert {planned(free, training={"epochs": 2}).total_steps for free in (20, 2.2, 0.1)} == {10}


@pytest.mark.parametrize(
    ("count", "effective", "tokens"),
    [(40, 8, 80), (9, 8, 45), (5, 8, 50), (40, 64, 400), (20, 16, 100)],
)
def test_the_tokens_of_a_step_are_those_of_an_epoch_over_its_steps(
    count: int, effective: int, tokens: float
) -> None:
    lengths, lines, trained = array("i", [10] * count), array("q", range(count)), array("i", [5] * count)
    rows = Rows(Tokenised(2048, lengths=lengths, lines=lines, trained=trained), range(count), [], None, [])
    spec = settle(Spec.model_validate({"training": {"effective_batch_size": effective}}))
    assert plan.tokens_of_step(spec, rows) == tokens
