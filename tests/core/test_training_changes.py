"""Changes to the spec of a job that ran already."""

from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.training import config
from core.ml.training.config import Spec
from core.ml.training.spec import changes


@pytest.fixture
def kept() -> dict[str, Any]:
    """A spec as the first attempt left it: nothing in it is "auto"."""
    spec = config.settle(Spec()).model_dump() | {"validation": {"fraction": 0.1}}
    spec["training"] |= {"batch_size": 8, "max_length": 120, "loss_on": "assistant", "packing": False}
    spec["training"]["neftune_alpha"] = 5.0
    return spec


def test_changes_are_merged_field_by_field(kept: dict[str, Any]) -> None:
    after = changes.merged(kept, {"training": {"learning_rate": 0.1}, "checkpoints": {"keep": 7}})
    assert changes.changed(kept, after) == {"training.learning_rate": 0.1, "checkpoints.keep": 7}
    assert after["validation"] == {"fraction": 0.1}


def test_one_length_of_the_run_takes_the_place_of_the_other(kept: dict[str, Any]) -> None:
    steps = changes.merged(kept, {"training": {"max_steps": 50}})
    assert (steps["training"]["epochs"], steps["training"]["max_steps"]) == (None, 50)
    epochs = changes.merged(steps, {"training": {"epochs": 2}})
    assert (epochs["training"]["epochs"], epochs["training"]["max_steps"]) == (2.0, None)
    with pytest.raises(BadRequest):
        changes.merged(kept, {"training": {"epochs": 1, "max_steps": 50}})


def test_a_value_that_was_settled_and_no_longer_fits_is_explained(kept: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        changes.merged(kept, {"training": {"effective_batch_size": 12}})
    assert "effective_batch_size (12) must be a multiple of batch_size (8)" in caught.value.message
    assert caught.value.hint is not None
    assert 'or "auto" again' in caught.value.hint
    again = changes.merged(kept, {"training": {"effective_batch_size": 12, "batch_size": "auto"}})
    assert again["training"]["batch_size"] == "auto"


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"training": {"learning_rate": 0.1, "batch_size": 4, "max_grad_norm": 1.0}}, []),
        ({"training": {"gradient_checkpointing": True, "scheduler": "cosine", "weight_decay": 0.1}}, []),
        ({"quantization": {"compute_dtype": "float32"}, "lora": {"dropout": 0.1}}, []),
        ({"evaluation": {"every_steps": 5}, "checkpoints": {"keep": 5}, "limits": {"max_seconds": 9}}, []),
        # At the end no step is left that another setting could change.
        ({"training": {"max_steps": 40}}, []),
        ({"training": {"max_steps": 40, "learning_rate": 0.1}}, ["training.learning_rate"]),
        ({"training": {"max_steps": 40, "batch_size": 4}, "lora": {"dropout": 0.1}}, ["lora.dropout"]),
        ({"training": {"epochs": 4, "weight_decay": 0.1}}, ["training.weight_decay"]),
        ({"training": {"epochs": 4, "neftune_alpha": None}}, ["training.neftune_alpha"]),
        ({"training": {"max_steps": 39}}, ["training.max_steps"]),
        ({"training": {"epochs": 3.95}}, []),
        ({"training": {"epochs": 3.8}}, ["training.epochs"]),
        ({"training": {"epochs": 9}}, []),
        ({"seed": 1}, ["seed"]),
        ({"lora": {"r": 4, "target_modules": ["q_proj"]}}, ["lora.r", "lora.target_modules"]),
        ({"quantization": {"bits": 16}}, ["quantization.bits"]),
        (
            {"training": {"max_length": 64, "optimizer": "adamw"}},
            ["training.max_length", "training.optimizer"],
        ),
        ({"training": {"effective_batch_size": 16}}, ["training.effective_batch_size"]),
        ({"lora": {"r": 16}}, []),
    ],
)
def test_which_changes_leave_a_checkpoint_of_use(
    kept: dict[str, Any], change: dict[str, Any], reasons: list[str]
) -> None:
    assert sorted(changes.unfit(kept, changes.merged(kept, change), step=40, epoch=10)) == reasons


def test_of_an_epoch_of_unknown_length_no_checkpoint_is_taken_for_short_enough(kept: dict[str, Any]) -> None:
    after = changes.merged(kept, {"training": {"epochs": 9}})
    assert changes.unfit(kept, after, step=40, epoch=None) == ["training.epochs"]
    after = changes.merged(kept, {"training": {"learning_rate": 0.1}})
    assert changes.unfit(kept, after, step=40, epoch=None) == []


def test_auto_is_held_by_whatever_it_became(kept: dict[str, Any]) -> None:
    assert changes.holds(kept, {})
    assert changes.holds(kept, {"training": {"max_length": "auto", "batch_size": 8}})
    assert not changes.holds(kept, {"training": {"max_length": 64}})
    assert not changes.holds(kept, {"evaluation": {"early_stopping": {"patience": 2}}})


def test_a_retry_that_leaves_the_preset_says_so(kept: dict[str, Any]) -> None:
    diff = {"lora.r": {"preset": 64, "yours": 16}}
    after = changes.merged(kept, {"training": {"learning_rate": 0.1}, "lora": {"r": 64}})
    assert changes.preset_diff(diff, kept, after) == {
        "training.learning_rate": {"preset": 2e-4, "yours": 0.1}
    }


@pytest.mark.parametrize(
    ("has", "change", "param"),
    [
        ({"validation": None}, {"evaluation": {"every_steps": 5}}, "evaluation.every_steps"),
        ({"continue_from": "ad_1"}, {"lora": {"dropout": 0.1}}, "lora"),
    ],
)
def test_changes_that_mean_nothing_for_the_job_are_refused(
    kept: dict[str, Any], has: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        changes.merged(kept | has, change)
    assert caught.value.param == param
