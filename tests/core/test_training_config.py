from typing import Any

import pytest
from pydantic import ValidationError

from core.ml.training import plan
from core.ml.training.config import Spec, Training, lora_of, settle
from core.ml.training.data import Rows, Tokenised


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
        {"evaluation": {"rows": 2001}},
        {"evaluation": {"metrics": ["bleu"]}},
        {"evaluation": {"metrics": ["rouge", "exact_match", "rouge"]}},
        {"evaluation": {"prompts": ["x"] * 17}},
        {"evaluation": {"prompts": [""]}},
        {"evaluation": {"early_stopping": {}}},
        {"evaluation": {"every_steps": 5, "early_stopping": {"patience": 0}}},
        {"limits": {"max_seconds": 0}},
        {"lora": {"init": "pizza"}},
        {"training": {"optimizer": "sgd"}},
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
        {"quantization": {"bits": 8, "type": "fp4", "double_quant": False}},
        {"lora": {"use_dora": True, "dropout": 0.1}},
        {"lora": {"init": "pissa"}},
        {"training": {"optimizer": "paged_adamw_32bit"}},
        {"evaluation": {"every_steps": "auto", "metrics": []}},
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


@pytest.mark.parametrize(
    "place", ["", "quantization", "lora", "training", "evaluation", "checkpoints", "limits"]
)
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
    assert (training.batch_size, training.loss_on) == ("auto", "auto")
    assert (training.max_length, training.gradient_checkpointing) == ("auto", "auto")


def test_settle_changes_nothing_that_was_said() -> None:
    said = Spec(training=Training(max_steps=5, batch_size=2, loss_on="completion", max_length=64))
    assert settle(said) == said


def test_a_settled_spec_survives_json() -> None:
    settled = settle(
        Spec.model_validate({"lora": {"target_modules": ["q_proj"]}, "training": {"epochs": 0.5}})
    )
    assert Spec.model_validate_json(settled.model_dump_json()) == settled


# ---- The evaluations of a run


def interval(every: Any, rows: int, held_back: int, **training: Any) -> int | None:
    spec = settle(Spec.model_validate({"evaluation": {"every_steps": every}, "training": training}))
    found = plan.resolved(
        spec, Rows(Tokenised(64), range(rows), range(held_back), None, [])
    ).evaluation.every_steps
    assert found != "auto"
    return found


def test_auto_evaluates_four_times_an_epoch_or_run() -> None:
    assert interval("auto", 800, 10, epochs=3) == 25
    assert interval("auto", 800, 10, max_steps=40) == 10
    assert interval("auto", 8, 10, epochs=1) == 1


def test_auto_does_not_evaluate_all_the_time_where_epochs_are_short() -> None:
    assert interval("auto", 16, 10, max_steps=1000) == 25


def test_without_held_back_rows_there_is_nothing_to_evaluate() -> None:
    assert interval("auto", 800, 0) is None
    assert (interval(7, 800, 10), interval(None, 800, 10)) == (7, None)


# ---- An adapter to continue from

# As peft 0.21 writes it, without what is null.
WRITTEN = {
    "base_model_name_or_path": "tests/tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 32,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": True,
    "use_qalora": False,
    "use_rslora": True,
}


def test_the_lora_settings_of_an_adapter_are_read_from_its_configuration() -> None:
    assert lora_of(WRITTEN).model_dump() == {
        "r": 8,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "use_dora": True,
        "init": "default",
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "not that of a LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "changed the base model's weights"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "it has modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "it has rank_pattern"),
        ({"of_a_later_peft": 1}, "it has of_a_later_peft"),
        ({"target_modules": ".*q_proj"}, "its target_modules is out of bounds"),
        ({"r": 512}, "its r is out of bounds"),
    ],
)
def test_an_adapter_of_another_kind_is_not_continued(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lora_of(WRITTEN | changes)


@pytest.mark.parametrize("content", [None, [], "LORA", {}])
def test_what_is_no_configuration_is_not_continued(content: Any) -> None:
    with pytest.raises(ValueError, match="not that of a LoRA"):
        lora_of(content)
