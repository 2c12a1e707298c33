from typing import Any

import pytest
from pydantic import ValidationError

from core.ml.training.config import Spec, Training, settle


@pytest.mark.parametrize(
    "spec",
    [
        {"seed": -1},
        {"seed": 2**31},
        {"lora": {"r": 0}},
        {"lora": {"r": 257}},
        {"lora": {"alpha": 0}},
        {"lora": {"dropout": 1}},
        {"quantization": {"bits": 3}},
        {"quantization": {"type": "int4"}},
        {"training": {"epochs": 0}},
        {"training": {"epochs": 101}},
        {"training": {"max_steps": 0}},
        {"training": {"max_steps": 1_000_001}},
        {"training": {"batch_size": 0}},
        {"training": {"batch_size": 257}},
        {"training": {"effective_batch_size": 4097}},
        {"training": {"learning_rate": 0}},
        {"training": {"learning_rate": float("nan")}},
        {"training": {"learning_rate": float("inf")}},
        {"training": {"warmup_ratio": 1}},
        {"training": {"weight_decay": 1.1}},
        {"training": {"max_grad_norm": 0}},
        {"training": {"max_length": 7}},
        {"training": {"max_length": 131_073}},
        {"training": {"overlength": "cut"}},
        {"training": {"loss_on": "everything"}},
        {"evaluation": {"every_steps": 0}},
        {"checkpoints": {"every_steps": 0}},
        {"checkpoints": {"keep": 0}},
    ],
)
def test_values_out_of_bounds_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate(spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"seed": 2**31 - 1},
        {"lora": {"r": 256, "alpha": 1024, "dropout": 0}},
        {"quantization": {"bits": 16}},
        {"training": {"epochs": 100}},
        {"training": {"max_steps": 1_000_000}},
        {"training": {"batch_size": 256, "effective_batch_size": 4096}},
        {"training": {"learning_rate": 1, "weight_decay": 1, "max_length": 8}},
    ],
)
def test_values_at_the_bounds_are_taken(spec: dict[str, Any]) -> None:
    made = Spec.model_validate(spec).model_dump()
    for name, part in spec.items():
        if isinstance(part, dict):
            assert part.items() <= made[name].items()
        else:
            assert made[name] == part


@pytest.mark.parametrize("place", ["", "quantization", "lora", "training", "evaluation", "checkpoints"])
def test_unknown_fields_are_refused_everywhere(place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate({place: {"surprise": 1}} if place else {"surprise": 1})
    assert caught.value.errors()[0]["type"] == "extra_forbidden"


def test_epochs_and_max_steps_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="epochs or max_steps, not both"):
        Training(epochs=1, max_steps=10)


@pytest.mark.parametrize(
    ("batch", "effective", "allowed"), [(4, 8, True), (8, 8, True), (3, 8, False), (16, 8, False)]
)
def test_the_effective_batch_is_a_multiple_of_the_batch(batch: int, effective: int, allowed: bool) -> None:
    if allowed:
        assert Training(batch_size=batch, effective_batch_size=effective).batch_size == batch
        return
    with pytest.raises(ValidationError, match=rf"effective_batch_size \({effective}\) must be a multiple"):
        Training(batch_size=batch, effective_batch_size=effective)


@pytest.mark.parametrize(
    "modules", [".*", "(a+)+$", [".*"], ["q_proj|v_proj"], ["q_proj\n"], [], [""], ["x" * 65]]
)
def test_target_modules_are_names_and_never_patterns(modules: Any) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate({"lora": {"target_modules": modules}})


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
def test_target_modules_may_be_named(modules: Any) -> None:
    assert Spec.model_validate({"lora": {"target_modules": modules}}).lora.target_modules == modules


def test_settle_decides_what_needs_neither_data_nor_device() -> None:
    training = settle(Spec()).training
    assert (training.epochs, training.max_steps) == (3.0, None)
    assert (training.batch_size, training.loss_on) == (8, "auto")
    assert (training.max_length, training.gradient_checkpointing) == ("auto", "auto")


def test_settle_changes_nothing_that_was_said() -> None:
    said = Spec(training=Training(max_steps=5, batch_size=2, loss_on="completion", max_length=64))
    assert settle(said) == said


@pytest.mark.parametrize(("effective", "batch"), [(1, 1), (7, 7), (9, 3), (11, 1), (12, 6), (4096, 8)])
def test_settle_takes_the_largest_batch_that_divides(effective: int, batch: int) -> None:
    assert settle(Spec(training=Training(effective_batch_size=effective))).training.batch_size == batch


def test_a_settled_spec_survives_json() -> None:
    settled = settle(
        Spec.model_validate({"lora": {"target_modules": ["q_proj"]}, "training": {"epochs": 0.5}})
    )
    assert Spec.model_validate_json(settled.model_dump_json()) == settled
