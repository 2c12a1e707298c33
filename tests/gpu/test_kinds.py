"""What only a GPU trains with: its precisions, its optimizers, its attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import is_flash_attn_2_available

from core.ml.catalogue import Catalogue
from core.ml.training import assembly, sft
from core.ml.training.run import Run
from core.ml.training.speed import attention
from tests.gpu.runs import catalogue_in, run
from tests.ml.runs import losses, notes, saved, series, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EXACT: dict[str, Any] = {"quantization": {"bits": 16}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_in(tmp_path_factory.mktemp("models"))


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that are made."""
    made: list[Any] = []
    original = assembly.trainer_of

    def keeping(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(assembly, "trainer_of", keeping)
    return made


@pytest.mark.parametrize(
    ("precision", "layer", "dtype"),
    [
        ({"bits": 8}, "Linear8bitLt", torch.int8),
        ({"bits": 4, "type": "fp4"}, "Linear4bit", torch.uint8),
        ({"bits": 4, "compute_dtype": "float16"}, "Linear4bit", torch.uint8),
        ({"bits": 16}, "Linear", torch.bfloat16),
    ],
)
def test_every_precision_learns_and_holds_its_weights_as_it_says(
    models: Catalogue,
    tmp_path: Path,
    trainers: list[Any],
    precision: dict[str, Any],
    layer: str,
    dtype: torch.dtype,
) -> None:
    result, reports = train(run(models, tmp_path / "work", 30, quantization=precision))
    base = trainers[0].model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert (type(base).__name__, base.weight.dtype, base.weight.device.type) == (layer, dtype, "cuda")
    print(f"\n{precision}: {result.metrics}, peak {series(reports, 'memory_bytes')[30] / 1e6:.0f} MB")
    assert result.metrics["eval_loss"] < 0.5 * result.metrics["base_eval_loss"]


def test_the_fp16_scaler_finds_its_scale_and_is_not_taken_for_divergence(
    models: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of 2⁴⁰ makes the first gradients infinite: the scaler skips those steps until it is small enough."""
    monkeypatch.setattr(
        "accelerate.accelerator.get_grad_scaler",
        lambda *_, **__: torch.amp.GradScaler("cuda", init_scale=2.0**40),
    )
    result, reports = train(run(models, tmp_path / "work", 60, quantization={"compute_dtype": "float16"}))
    skipped = set(series(reports, "loss")) - set(series(reports, "grad_norm"))
    print(f"\nsteps with infinite gradients: {sorted(skipped)}")
    assert 3 < len(skipped) < 40
    assert not notes(reports, "watchdog")
    assert result.adapter is not None
    weights = load_file(result.adapter / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert result.metrics["eval_loss"] < 0.8 * result.metrics["base_eval_loss"]


@pytest.mark.parametrize(
    ("optimizer", "dtype", "paged"),
    [
        ("adamw_8bit", torch.uint8, False),
        ("paged_adamw_8bit", torch.uint8, True),
        ("paged_adamw_32bit", torch.float32, True),
    ],
)
def test_optimizers_keep_their_state_as_they_say_and_a_resumed_run_goes_on(
    models: Catalogue, tmp_path: Path, trainers: list[Any], optimizer: str, dtype: torch.dtype, paged: bool
) -> None:
    """Rank 256: bitsandbytes pages no state of less than 100,000 numbers."""

    def of(name: str, **more: Any) -> Run:
        spec = {
            "lora": {"r": 256, "alpha": 256},
            "checkpoints": {"every_steps": 6},
            "training": {"optimizer": optimizer, "learning_rate": 3e-4, "scheduler": "constant"},
        }
        return run(models, tmp_path / name, 12, **spec, **more)

    _, whole = train(of("whole"))
    states = moments(trainers[0])
    assert {state.dtype for state in states} == {dtype}
    assert all(getattr(state, "is_paged", False) is paged for state in states)
    assert losses(whole)[-1] < losses(whole)[0]
    _, resumed = train(of("resumed", resume=saved(whole)[6]))
    assert {state.dtype for state in moments(trainers[1])} == {dtype}
    # What a checkpoint brings lies on the GPU: bitsandbytes pages only what it makes itself.
    print(
        f"\n{optimizer} resumed: {sum(getattr(state, 'is_paged', False) for state in moments(trainers[1]))} paged"
    )
    later = {step: loss for step, loss in series(whole, "loss").items() if step > 6}
    assert series(resumed, "loss") == pytest.approx(later, rel=0.05)


def moments(trainer: Any) -> list[torch.Tensor]:
    """The first moments of the large matrices."""
    return [
        state["state1"]
        for weights, state in trainer.optimizer.optimizer.state.items()
        if weights.numel() >= 100_000
    ]


@pytest.mark.parametrize("flash", [True, False])
def test_a_packed_row_has_the_loss_of_its_documents_alone(
    models: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainers: list[Any], flash: bool
) -> None:
    """Every row in one step, packed and not: nothing of one document reaches another."""
    if flash and not is_flash_attn_2_available():
        pytest.skip("flash attention is not installed")
    if not flash:
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    whole = {"effective_batch_size": 32, "batch_size": 32, "max_length": 512, "max_steps": 1}

    def first_step(name: str, packing: bool) -> tuple[float, float]:
        training = {**whole, "packing": packing}
        _, reports = train(run(models, tmp_path / name, 1, rows=32, training=training, **EXACT))
        return losses(reports)[0], series(reports, "grad_norm")[1]

    packed, apart = first_step("packed", True), first_step("apart", False)
    used = trainers[0].model.get_base_model().config._attn_implementation
    assert used == ("flash_attention_2" if flash else "sdpa")
    assert packed[0] == pytest.approx(apart[0], rel=5e-3)
    assert packed[1] == pytest.approx(apart[1], rel=0.05)


def test_rows_are_packed_by_themselves_where_flash_attention_is(models: Catalogue, tmp_path: Path) -> None:
    plans: list[dict[str, Any]] = []

    def report(kind: str, /, **data: Any) -> None:
        if kind == "plan":
            plans.append(data)

    sft.train(run(models, tmp_path / "work", 2, training={"max_length": 512}), report, lambda: True)
    assert plans[0]["spec"]["training"]["packing"] is is_flash_attn_2_available()
