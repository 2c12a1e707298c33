import math
from typing import Any

import pytest

from core.errors import GraftError, OutOfMemory
from core.ml.training.config import Spec, settle
from core.ml.training.loop import watchdog
from core.ml.training.loop.watchdog import Again


def logs(*losses: float, grad_norm: float = 1.0, accuracy: float = 0.5) -> list[dict[str, float]]:
    return [{"loss": loss, "grad_norm": grad_norm, "mean_token_accuracy": accuracy} for loss in losses]


@pytest.mark.parametrize(
    ("loss", "grad_norm", "fp16", "bad"),
    [
        (2.0, 1.0, False, False),
        (math.nan, 1.0, False, True),
        (math.inf, 1.0, True, True),
        (2.0, math.nan, False, True),
        (2.0, math.inf, False, True),
        (2.0, math.inf, True, False),
    ],
)
def test_a_step_is_bad_without_a_finite_loss_and_gradient(
    loss: float, grad_norm: float, fp16: bool, bad: bool
) -> None:
    """With float16 an infinite gradient is normal: the scaler looks for its scale."""
    assert watchdog.bad_step(loss, grad_norm, fp16=fp16) is bad


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ([], None),
        (logs(3, 2.5, 2, 1.5), None),
        (logs(3, 1, 1, 1, 1, 3.2), ("exploding", 1)),
        (logs(3, 1, 1, 1, 1, 3.2, 9, 27), ("exploding", 3)),
        (logs(3, 1, 1, 1, 1, 3.2, 1), None),
        (logs(3, 0.5, 0.5, 0.5, 0.5, 2.9, 2.9, 2.9), None),  # not above the first ones
        (logs(0.5, 3, 0.5, 0.5, 0.5, 2.9, 2.9, 2.9), None),
        (logs(3, 2, 2, 2, 2, 5, 5, 5), None),  # not three times the usual
        (logs(0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.9, 1.0), None),  # less than a nat above it
        (logs(1, 4, 4, 4), None),  # nobody knows yet what is usual
        (logs(3, 0, 0), ("zero_loss", 2)),
        (logs(0, 0, 0), ("zero_loss", 3)),
        (logs(3, 0, 1), None),
        (logs(3, 0, 0, accuracy=1.0), None),  # known by heart
        (logs(3, 2, grad_norm=0.0), ("zero_gradient", 2)),
        (logs(3, 2, grad_norm=0.0) + logs(2), None),
    ],
)
def test_what_the_last_logs_look_like(seen: list[dict[str, float]], found: Any) -> None:
    assert watchdog.suspicion(seen) == found


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((2, 3, 8, 21), ("exploding", 1)),
        ((2, 21, 33, 17), ("exploding", 3)),
        ((2, 21, 33, 9), None),
        ((2, 11.5), None),  # less than a nat worse
        ((13, 14, 13), None),  # so it began: the data is unlike anything that the model knows
    ],
)
def test_worse_than_guessing_is_seen_from_the_first_steps_on(losses: tuple[float, ...], found: Any) -> None:
    assert watchdog.suspicion(logs(*losses), guessing=math.log(49_152)) == found


def test_a_long_run_is_judged_by_its_first_and_its_last_logs() -> None:
    history: list[dict[str, float]] = [
        {"eval_loss": 9.0},
        *logs(4.0),
        *logs(*[1.0] * 500),
        {"eval_loss": 1.0},
    ]
    recent = watchdog.recent(history)
    assert recent[0]["loss"] == 4.0
    assert len(recent) == 109
    assert watchdog.suspicion([*recent, *logs(3.5, 3.5, 3.5)]) is None


def spec(**training: Any) -> Spec:
    return settle(Spec.model_validate({"training": training, "quantization": {"compute_dtype": "bfloat16"}}))


def test_the_rungs_against_divergence() -> None:
    done: list[dict[str, Any]] = [{"cause": "out_of_memory", "changes": {"training": {"batch_size": 2}}}]
    first = watchdog.next_rung(done, "exploding", spec(learning_rate=2e-4))
    assert first == {"training": {"learning_rate": 1e-4}}
    done.append({"cause": "exploding", "changes": first})
    second = watchdog.next_rung(done, "not_finite", spec(learning_rate=1e-4))
    assert second == {"quantization": {"compute_dtype": "float32"}}
    done.append({"cause": "not_finite", "changes": second})
    assert watchdog.next_rung(done, "not_finite", spec()) is None


def test_float32_has_no_third_rung() -> None:
    precise = settle(Spec.model_validate({"quantization": {"compute_dtype": "float32"}}))
    done = [{"cause": "exploding", "changes": {"training": {"learning_rate": 1e-4}}}]
    assert watchdog.next_rung(done, "exploding", precise) is None


@pytest.mark.parametrize(
    ("batch", "effective", "smaller"), [(8, 8, 4), (6, 12, 3), (3, 9, 1), (5, 5, 1), (12, 60, 6), (2, 2, 1)]
)
def test_out_of_memory_halves_the_batch_and_keeps_the_effective_one(
    batch: int, effective: int, smaller: int
) -> None:
    asked = spec(batch_size=batch, effective_batch_size=effective)
    assert watchdog.next_rung([], "out_of_memory", asked) == {"training": {"batch_size": smaller}}


def test_out_of_memory_then_recomputes_and_then_gives_up() -> None:
    one = spec(batch_size=1, gradient_checkpointing=False)
    changes = {"training": {"gradient_checkpointing": True}}
    assert watchdog.next_rung([], "out_of_memory", one) == changes
    last = spec(batch_size=1, gradient_checkpointing=True)
    assert watchdog.next_rung([], "out_of_memory", last) is None
    done = [{"cause": "out_of_memory", "changes": changes}]
    error = watchdog.recovery("out_of_memory", last, done, where="At step 9", from_start=False)
    assert isinstance(error, OutOfMemory)
    assert "gradient_checkpointing True" in error.message


def test_what_comes_next_is_said_in_words() -> None:
    end = watchdog.recovery("exploding", spec(), [], where="At step 9", from_start=False)
    assert isinstance(end, Again)
    assert "from the last checkpoint with training.learning_rate 0.0001" in end.message
    assert end.as_report() == {
        "cause": "exploding",
        "message": end.message,
        "changes": {"training": {"learning_rate": 1e-4}},
        "from_start": False,
    }
    tried = [
        {"cause": "exploding", "changes": {"training": {"learning_rate": 1e-4}}},
        {"cause": "exploding", "changes": {"quantization": {"compute_dtype": "float32"}}},
    ]
    failure = watchdog.recovery("exploding", spec(), tried, where="At step 9", from_start=False, skipped=2)
    assert isinstance(failure, GraftError)
    assert failure.code == "training_diverged"
    for words in ("At step 9", "2 batches skipped", "learning_rate 0.0001", "compute_dtype float32"):
        assert words in failure.message
