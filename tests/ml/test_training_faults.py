"""Faults made on purpose in the middle of a training, and what is done against them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers.models.llama.modeling_llama import LlamaModel

from core.errors import GraftError, OutOfMemory
from core.ml.training import sft
from core.ml.training.loop.watchdog import Again
from core.ml.training.run import Run
from tests.ml.runs import MakeRun, Reports, adapter, losses, notes, saved, series, train
from worker.child import trainer

Spoil = Callable[[int, int, Any], Any]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Spoil], None]:
    """Change what the model gives in training: a function of how often it was asked, the batch size, and that."""

    def install(change: Spoil) -> None:
        forward, asked = LlamaModel.forward, [0]

        def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = forward(self, *args, **kwargs)
            if not self.training:
                return given
            asked[0] += 1
            documents = len(kwargs["cu_seq_lens_q"]) - 1  # in the one long row
            given.last_hidden_state = change(asked[0], documents, given.last_hidden_state)
            return given

        monkeypatch.setattr(LlamaModel, "forward", spoiled)

    return install


def again(run: Run) -> tuple[Again, Reports]:
    """The end of a run that has to begin again."""
    reports: Reports = []
    with pytest.raises(Again) as caught:
        sft.train(run, lambda kind, /, **data: reports.append((kind, data)), lambda: False)
    return caught.value, reports


def test_a_bad_batch_changes_nothing_and_is_told_with_its_lines(
    make_run: MakeRun, spoil: Callable[[Spoil], None]
) -> None:
    spoil(lambda n, _, given: given * float("nan") if n == 3 else given)
    run = make_run(checkpoints={"every_steps": 1}, training={"scheduler": "constant"})
    result, reports = train(run)
    (note,) = notes(reports, "watchdog")
    assert note["data"]["step"] == 3
    assert note["level"] == "warning"
    assert len(note["data"]["lines"]) == 4
    assert "step 3" in note["message"]
    assert list(series(reports, "loss")) == [1, 2, 4, 5, 6]
    assert all(torch.isfinite(tensor).all() for tensor in load(adapter(result)).values())
    # No checkpoint of the skipped step, and the optimizer has taken one step less.
    folders = saved(reports)
    assert list(folders) == [1, 2, 4, 5, 6]
    state = torch.load(folders[6] / "optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in state.values()} == {5.0}
    assert result.metrics["train_loss"] == pytest.approx(sum(losses(reports)) / 5)


def test_the_ladder_against_divergence_is_taken_rung_by_rung(
    make_run: MakeRun, spoil: Callable[[Spoil], None]
) -> None:
    """From the fourth step on the model gives no numbers, whatever is tried."""
    spoil(lambda n, _, given: given * float("nan") if n > 3 else given)
    spec: dict[str, Any] = {
        "checkpoints": {"every_steps": 2},
        "training": {"max_steps": 20},
        "quantization": {"compute_dtype": "bfloat16"},  # "auto" is float32 on processors without it
    }
    first, reports = again(make_run("first", **spec))
    assert (first.cause, first.from_start) == ("not_finite", False)
    assert first.changes == {"training": {"learning_rate": 0.005}}
    assert "step 7" in first.message
    assert [note["data"]["step"] for note in notes(reports, "watchdog")] == [4, 5, 6]
    folders = saved(reports)
    assert list(folders) == [2]  # none with the watchdog suspicious

    spec["training"]["learning_rate"] = 0.005
    done = [{"step": 7, "cause": first.cause, "changes": first.changes}]
    second, _ = again(make_run("second", resume=folders[2], recoveries=tuple(done), **spec))
    assert second.changes == {"quantization": {"compute_dtype": "float32"}}

    spec["quantization"] = {"compute_dtype": "float32"}
    done.append({"step": 7, "cause": second.cause, "changes": second.changes})
    with pytest.raises(GraftError) as caught:
        train(make_run("third", resume=folders[2], recoveries=tuple(done), **spec))
    assert caught.value.code == "training_diverged"
    for tried in ("3 batches skipped", "learning_rate 0.005", "compute_dtype float32"):
        assert tried in caught.value.message


def test_an_exploding_loss_goes_back_before_it_spoils_a_checkpoint(
    make_run: MakeRun, spoil: Callable[[Spoil], None]
) -> None:
    spoil(lambda n, _, given: given * 1000 if n > 6 else given)
    caught, reports = again(make_run(checkpoints={"every_steps": 1}, training={"max_steps": 20}))
    assert caught.cause == "exploding"
    assert "step 11" in caught.message
    assert list(saved(reports)) == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_is_always_zero_is_seen_at_once(
    make_run: MakeRun, spoil: Callable[[Spoil], None]
) -> None:
    spoil(lambda _n, _rows, given: given.detach() + 0 * given)
    caught, _ = again(make_run())
    assert (caught.cause, caught.from_start) == ("zero_gradient", True)


def test_half_the_learning_rate_is_half_after_a_resume_too(make_run: MakeRun) -> None:
    """The optimizer's and the scheduler's files hold the old rates."""
    spec: dict[str, Any] = {"checkpoints": {"every_steps": 2}}
    usual: dict[str, Any] = {"scheduler": "cosine", "warmup_ratio": 0.4, "weight_decay": 0.1}
    _, before = train(make_run("before", training=usual, **spec))
    half = {**usual, "learning_rate": 0.005, "weight_decay": 0.0}
    _, after = train(make_run("after", resume=saved(before)[2], training=half, **spec))
    old, new = series(before, "learning_rate"), series(after, "learning_rate")
    assert list(new) == [3, 4, 5, 6]
    assert new == {step: pytest.approx(old[step] / 2) for step in new}
    groups = torch.load(saved(after)[6] / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert {group["initial_lr"] for group in groups} == {0.005}


def test_out_of_memory_halves_the_batch_and_goes_on_with_the_same_steps(
    make_run: MakeRun, spoil: Callable[[Spoil], None]
) -> None:
    spec: dict[str, Any] = {"checkpoints": {"every_steps": 1}, "training": {"batch_size": 4, "max_steps": 4}}
    _, undisturbed = train(make_run("undisturbed", **spec))

    def short(n: int, rows: int, given: Any) -> Any:
        if n > 2 and rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return given

    spoil(short)
    caught, reports = again(make_run("short", **spec))
    assert (caught.cause, caught.from_start) == ("out_of_memory", False)
    assert caught.changes == {"training": {"batch_size": 2}}
    spec["training"]["batch_size"] = 2
    result, after = train(make_run("after", resume=saved(reports)[2], **spec))
    assert result.adapter is not None
    told = losses(reports) + losses(after)
    assert told == pytest.approx(losses(undisturbed), rel=2e-3)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_out_of_memory_with_nothing_left_to_try_fails_and_says_so(
    make_run: MakeRun, spoil: Callable[[Spoil], None], error: Exception
) -> None:
    def raises(*_: Any) -> Any:
        raise error

    spoil(raises)
    run = make_run(training={"batch_size": 1, "gradient_checkpointing": True})
    done = ({"step": 0, "cause": "out_of_memory", "changes": {"training": {"batch_size": 1}}},)
    with pytest.raises(OutOfMemory) as caught:
        train(replace(run, recoveries=done))
    assert "training.batch_size 1" in caught.value.message


def test_the_trainer_process_reports_that_it_must_begin_again(
    make_run: MakeRun, spoil: Callable[[Spoil], None]
) -> None:
    def short(_n: int, rows: int, given: Any) -> Any:
        if rows > 1:
            raise torch.OutOfMemoryError
        return given

    spoil(short)
    reports: Reports = []
    run = make_run(training={"batch_size": 4})
    trainer.train(run, "job_1", lambda kind, /, **data: reports.append((kind, data)), lambda: False)
    kind, data = reports[-1]
    assert kind == "again"
    assert data["cause"] == "out_of_memory"
    assert data["changes"] == {"training": {"batch_size": 2}}
    assert data["from_start"] is True
