"""The trainer itself, called directly: what a run gives, and faults that would be silent."""

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl.trainer.utils
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from core.errors import GraftError
from core.hashes import sha256
from core.ml import base_model
from core.ml.catalogue import BaseModel
from core.ml.quantization import Quantization
from core.ml.training import assembly, config, sft
from core.ml.training.loop import reporter
from core.ml.training.run import Run
from tests.ml.runs import losses, train


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(make_run: Callable[..., Run]) -> None:
    one, _ = train(make_run("one"))
    two, _ = train(make_run("two"))
    other, _ = train(make_run("other", seed=7))
    files = [
        sha256(result.adapter / "adapter_model.safetensors") for result in (one, two, other) if result.adapter
    ]
    assert files[0] == files[1] != files[2]
    assert (one.adapter / "adapter_config.json").read_bytes() == (
        two.adapter / "adapter_config.json"
    ).read_bytes()


def test_lora_is_kept_in_float32_and_every_module_is_trained(make_run: Callable[..., Run]) -> None:
    result, _ = train(make_run())
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 14
    assert all(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_small_learning_rates_are_not_lost(make_run: Callable[..., Run]) -> None:
    """In bfloat16 an update of 1e-6 to a weight of 0.1 is rounded away."""
    result, _ = train(
        make_run("work", training={"learning_rate": 1e-6, "max_steps": 2, "scheduler": "constant"})
    )
    start, _ = train(
        make_run("start", training={"learning_rate": 1e-12, "max_steps": 1, "scheduler": "constant"})
    )
    after = load_file(result.adapter / "adapter_model.safetensors")
    before = load_file(start.adapter / "adapter_model.safetensors")
    moved = [name for name in after if "lora_A" in name and not torch.equal(after[name], before[name])]
    assert len(moved) == 14


def test_interrupted_at_any_step_it_ends_in_the_same_weights(make_run: Callable[..., Run]) -> None:
    spec = {"checkpoints": {"every_steps": 2}, "lora": {"dropout": 0.1}, "training": {"neftune_alpha": 5.0}}
    whole, _ = train(make_run("whole", **spec))
    for step in (2, 4, 6):
        checkpoint = make_run(f"part-{step}", **spec)
        train(checkpoint)
        folder = checkpoint.work / "checkpoints" / f"checkpoint-{step}"
        resumed, reports = train(make_run(f"resumed-{step}", resume=folder, **spec))
        assert sha256(resumed.adapter / "adapter_model.safetensors") == sha256(
            whole.adapter / "adapter_model.safetensors"
        )
        assert len(losses(reports)) == 6 - step
        assert resumed.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], abs=1e-12)


def test_asked_to_stop_it_saves_its_step_and_leaves(make_run: Callable[..., Run]) -> None:
    reports: list[tuple[str, dict[str, Any]]] = []
    seen = [0]

    def report(kind: str, /, **data: Any) -> None:
        reports.append((kind, data))
        seen[0] += kind == "metrics"

    result = sft.train(make_run(), report, lambda: seen[0] >= 2)
    assert result.adapter is None
    saved = [data["step"] for kind, data in reports if kind == "checkpoint"]
    assert saved[-1] in (2, 3)
    assert not any(kind == "done" for kind, _ in reports)


def test_a_checkpoint_is_an_adapter_of_its_own_without_a_pickle_of_arguments(
    make_run: Callable[..., Run],
) -> None:
    run = make_run()
    train(run)
    folder = run.work / "checkpoints" / "checkpoint-6"
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "optimizer.pt",
        "prompt_contract.json",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }
    for name in ("adapter_config.json", "prompt_contract.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (run.work / "adapter" / name).read_bytes()


def test_scoring_only_labelled_positions_changes_nothing_but_the_time(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """trl's own way on a CPU scores every position; ours scores those with a label."""
    _, ours = train(make_run("ours", training={"max_steps": 3}))
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _device: False)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    _, theirs = train(make_run("theirs", training={"max_steps": 3}))
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-3)


def test_gradients_are_right_after_an_evaluation_and_a_generation(model: BaseModel) -> None:
    """The fused 4-bit CPU kernel repacks weights in eval mode and has no gradient."""
    precision = base_model.settle(Quantization())
    adapted = assembly.with_adapter(base_model.load(model, precision), config.settle(config.Spec()))
    ids = torch.arange(3, 40)[None]

    def gradients() -> list[torch.Tensor]:
        adapted.train()
        adapted.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapted(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in adapted.parameters() if p.grad is not None]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
        before = gradients()
        adapted.eval()
        with torch.no_grad():
            adapted(input_ids=ids)
            adapted.generate(input_ids=ids, max_new_tokens=4, pad_token_id=2)
        after = gradients()
    assert any(g.abs().sum() > 0 for g in before)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_the_cached_quantised_base_is_the_same_bit_for_bit(model: BaseModel) -> None:
    precision = base_model.settle(Quantization())
    first = base_model.load(model, precision)
    again = base_model.load(model, precision)
    assert len(list(model.cache.glob(f"{precision.slug}-*/config.json"))) == 1
    assert any(isinstance(module, Linear4bit) for module in again.modules())
    one, two = first.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "spec",
    [
        {"quantization": {"bits": 16}},
        {"quantization": {"type": "fp4", "double_quant": False}},
        {"quantization": {"compute_dtype": "float32"}},
        {"quantization": {"bits": 8}},
        {"lora": {"use_dora": True}},
        {"lora": {"init": "gaussian"}},
        {"training": {"optimizer": "adamw_8bit"}},
        {"lora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}},
        {"training": {"gradient_checkpointing": True}},
        {"training": {"loss_on": "all"}},
        {"training": {"scheduler": "constant_with_warmup", "warmup_ratio": 0.5}},
        {"training": {"max_steps": None, "epochs": 0.5}},
    ],
    ids=json.dumps,
)
def test_every_kind_of_spec_trains(make_run: Callable[..., Run], spec: dict[str, Any]) -> None:
    result, reports = train(make_run(**spec))
    plan = next(data for kind, data in reports if kind == "plan")
    assert result.adapter is not None
    assert '"auto"' not in json.dumps(plan["spec"])
    assert len(losses(reports)) == plan["total_steps"]


def test_samples_end_when_the_run_is_asked_to_leave(make_run: Callable[..., Run]) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3  # after loading and the first step: in the middle of an answer

    result, reports = train(make_run(fraction=0.4, evaluation={"every_steps": 1}), stop)
    assert result.adapter is None
    assert "samples" not in [kind for kind, _ in reports]


def test_prompts_that_are_too_long_are_named(make_run: Callable[..., Run]) -> None:
    prompts = ["word " * 600, "hello"]
    run = make_run(fraction=0.4, training={"max_steps": 1}, evaluation={"every_steps": 1, "prompts": prompts})
    _, reports = train(run)
    (note,) = [data for kind, data in reports if kind == "note" and data["type"] == "prompts_left_out"]
    assert note["data"] == {"prompts": [0]}


def test_a_time_limit_that_leaves_no_time_is_named() -> None:
    spec = config.Spec.model_validate({"limits": {"max_seconds": 1}})
    told = sft._too_short(GraftError("inert_adapter", "It changes nothing."), spec, 3)
    assert "time limit of 1 s ended the training at step 3" in told.message
    other = GraftError("training_diverged", "It diverged.")
    assert sft._too_short(other, spec, 3) is other


def test_a_long_download_is_no_standstill(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(base_model, "prepare", lambda _model: time.sleep(1))
    _, reports = train(make_run(training={"max_steps": 1}))
    before = [kind for kind, _ in reports[: [kind for kind, _ in reports].index("plan")]]
    assert before.count("alive") > 5


def test_adapters_that_changed_nothing_are_refused(make_run: Callable[..., Run]) -> None:
    """One step of warm-up has the learning rate zero."""
    with pytest.raises(GraftError) as caught:
        train(make_run(training={"max_steps": 1, "warmup_ratio": 0.99, "learning_rate": 1e-45}))
    assert caught.value.code == "inert_adapter"
