"""Adapters of other kinds and beginnings, packed rows, and batches in parts: each trains what it says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.errors import BadRequest
from core.ml import base_model
from core.ml import contract as contracts
from core.ml.catalogue import BaseModel
from core.ml.quantization import Quantization
from core.ml.training import assembly, config, data, plan
from core.ml.training.config import Spec
from core.ml.training.files import saving
from core.ml.training.loop.trainer import Trainer
from core.ml.training.run import Run
from core.ml.training.speed import attention
from tests.ml.runs import MakeRun, adapter, losses, saved, train

PISSA: dict[str, Any] = {
    "quantization": {"bits": 16},
    "lora": {"init": "pissa", "r": 4},
    "checkpoints": {"every_steps": 2},
}


def logits(folder: Path, base: Path) -> torch.Tensor:
    """What a fresh process would compute: the unchanged base with the saved adapter."""
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
    )
    with torch.no_grad():
        return loaded(input_ids=torch.arange(3, 40)[None]).logits


def test_pissa_is_saved_as_an_ordinary_lora_for_the_unchanged_base(
    make_run: MakeRun, tiny_model: Path
) -> None:
    spec = {**PISSA, "quantization": {"bits": 16, "compute_dtype": "float32"}}
    run = make_run(fraction=0.3, **spec)
    result, reports = train(run)
    assert result.adapter is not None
    saved_config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (saved_config["init_lora_weights"], saved_config["r"], saved_config["lora_alpha"]) == (True, 8, 32)
    # In training the base had lost what the adapter began with; both together are the saved adapter on the base.
    trained = assembly.with_adapter(
        base_model.load(run.model, base_model.settle(run.spec.quantization)),
        plan.resolved(run.spec, data.checked_rows(run, contracts.load(run.model.path), context=512)),
    )
    saving.read(trained, saved(reports)[6], "The checkpoint")
    with torch.no_grad():
        expected = trained.eval()(input_ids=torch.arange(3, 40)[None]).logits
    assert torch.allclose(logits(result.adapter, tiny_model), expected, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        base = plain(input_ids=torch.arange(3, 40)[None]).logits
    assert (expected - base).abs().max() > 0.05


def test_pissa_begins_where_the_base_model_is(make_run: MakeRun) -> None:
    """Its first loss is that of an adapter which changes nothing."""
    _, pissa = train(make_run("pissa", **PISSA))
    _, plain = train(make_run("plain", quantization={"bits": 16}))
    assert losses(pissa)[0] == pytest.approx(losses(plain)[0], rel=1e-3)


def test_pissa_resumed_gives_the_same_bytes(make_run: MakeRun) -> None:
    whole, reports = train(make_run("whole", **PISSA))
    for step in (2, 6):
        resumed, _ = train(make_run(f"resumed-{step}", resume=saved(reports)[step], **PISSA))
        assert adapter(resumed) == adapter(whole)


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"lora": {"init": "pissa"}}, "pissa_needs_16_bit"),
        ({"lora": {"init": "pissa"}, "quantization": {"bits": 8}}, "pissa_needs_16_bit"),
        ({"lora": {"use_dora": True}, "quantization": {"bits": 8}}, "dora_not_with_8_bit"),
        (
            {"lora": {"init": "pissa", "use_dora": True}, "quantization": {"bits": 16}},
            "dora_not_with_pissa",
        ),
        ({"training": {"optimizer": "paged_adamw_8bit"}}, "optimizer_needs_gpu"),
        ({"training": {"optimizer": "paged_adamw_32bit"}}, "optimizer_needs_gpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU more is possible")
def test_what_cannot_be_done_is_refused_with_its_reason(
    make_run: MakeRun, spec: dict[str, Any], code: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        train(make_run(**spec))
    assert caught.value.code == code
    assert caught.value.param
    assert caught.value.hint


def test_a_run_continues_from_an_adapter(make_run: MakeRun) -> None:
    first, _ = train(make_run("first"))
    assert first.adapter is not None
    tiny_steps = {"max_steps": 1, "learning_rate": 1e-9}
    second, _ = train(make_run("second", start=first.adapter, training=tiny_steps))
    assert second.adapter is not None
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (first.adapter, second.adapter)
    )
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    # A checkpoint of it is not the beginning again.
    _, reports = train(make_run("third", start=first.adapter, checkpoints={"every_steps": 3}))
    whole, _ = train(make_run("fourth", start=first.adapter))
    resumed, _ = train(make_run("fifth", start=first.adapter, resume=saved(reports)[3]))
    assert adapter(resumed) == adapter(whole)


@pytest.mark.parametrize(
    ("names", "missing"),
    [(["q_proj", "v_prj"], "v_prj"), (["embed_tokens"], "embed_tokens"), (["proj"], "proj")],
)
def test_every_module_that_is_named_must_be_there(make_run: MakeRun, names: list[str], missing: str) -> None:
    with pytest.raises(BadRequest) as caught:
        train(make_run(lora={"target_modules": names}))
    assert (caught.value.code, caught.value.param) == ("unknown_target_modules", "lora.target_modules")
    assert missing in caught.value.message
    assert "q_proj" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "lora", [{"r": 8}, {"alpha": 4}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}]
)
def test_an_adapter_of_another_shape_is_no_beginning(make_run: MakeRun, lora: dict[str, Any]) -> None:
    first, _ = train(make_run("first", training={"max_steps": 1}))
    with pytest.raises(BadRequest) as caught:
        train(make_run("second", start=first.adapter, lora=lora))
    assert (caught.value.code, caught.value.param) == ("adapter_mismatch", "continue_from")


def test_packed_rows_take_the_steps_that_were_planned(make_run: MakeRun) -> None:
    packing = {"packing": True, "max_length": 128, "max_steps": None, "epochs": 2}
    run = make_run("packed", fraction=0.3, checkpoints={"every_steps": 2}, training=packing)
    result, reports = train(run)
    steps = next(data for kind, data in reports if kind == "plan")["total_steps"]
    assert len(losses(reports)) == steps
    alone = make_run("alone", fraction=0.3, training={**packing, "packing": False})
    _, apart = train(alone)
    assert steps < len(losses(apart)) / 2
    resumed, _ = train(
        make_run(
            "resumed",
            fraction=0.3,
            resume=saved(reports)[2],
            checkpoints={"every_steps": 2},
            training=packing,
        )
    )
    assert adapter(resumed) == adapter(result)


def test_a_packed_row_has_the_loss_of_its_documents_alone(make_run: MakeRun) -> None:
    """Every row in one step, packed and not: nothing of one document reaches another."""
    whole = {"effective_batch_size": 64, "batch_size": 64, "max_length": 128, "max_steps": 1}
    precise = {"quantization": {"bits": 16, "compute_dtype": "float32"}}
    _, packed = train(make_run("packed", training={**whole, "packing": True}, **precise))
    _, apart = train(make_run("apart", training={**whole, "packing": False}, **precise))
    assert losses(packed) == pytest.approx(losses(apart), rel=1e-4)


def test_packing_is_refused_where_documents_see_each_other(model: BaseModel) -> None:
    loaded = base_model.load(model, base_model.settle(Quantization(bits=16)))
    adapted = assembly.with_adapter(loaded, config.settle(Spec()))
    assert attention.keeps_documents_apart(adapted)
    forward = adapted.forward

    def blind(**batch: Any) -> Any:
        """As an attention that knows nothing of documents."""
        return forward(input_ids=batch["input_ids"], use_cache=False)

    adapted.forward = blind
    assert not attention.keeps_documents_apart(adapted)
    with pytest.raises(BadRequest) as caught:
        attention.prepare(adapted)
    assert caught.value.code == "packing_mixes_documents"


def gradients(run: Run, work: Path) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first step, before any clipping."""
    contract = contracts.load(run.model.path)
    rows = data.checked_rows(run, contract, context=512)
    precision = base_model.settle(run.spec.quantization)
    planned = plan.made(run.spec, rows, assembly.device(precision), None)
    adapted = assembly.loaded(run.model, precision, planned)
    trainer = assembly.trainer_of(adapted, planned, precision, contract, rows, work)
    found: list[torch.Tensor] = []

    class Stop(Exception):
        pass

    class Catching(Trainer):
        def _clip_grad_norm(self, model: Any) -> Any:
            found.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
            raise Stop

    trainer.__class__ = Catching
    with pytest.raises(Stop):
        trainer.train()
    return trainer._step_loss, found


def test_a_step_in_parts_has_the_gradients_of_the_step_at_once(make_run: MakeRun, tmp_path: Path) -> None:
    """The loss is a mean over the tokens of the whole step, not of its parts, whose lengths differ."""
    precise = {"quantization": {"bits": 16, "compute_dtype": "float32"}}
    at_once = gradients(make_run("once", training={"batch_size": 4}, **precise), tmp_path / "o")
    in_parts = gradients(make_run("parts", training={"batch_size": 1}, **precise), tmp_path / "p")
    assert in_parts[0] == pytest.approx(at_once[0], rel=1e-5)
    assert len(at_once[1]) == 2 * 14
    assert any(gradient.abs().sum() > 0 for gradient in at_once[1])
    for one, other in zip(at_once[1], in_parts[1], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_the_validation_loss_is_the_mean_over_tokens_whatever_the_batch(make_run: MakeRun) -> None:
    def measured(name: str, size: int) -> dict[str, float]:
        training = {"batch_size": size, "max_steps": 1, "learning_rate": 1e-6}
        precise = {"bits": 16, "compute_dtype": "float32"}
        return train(make_run(name, fraction=0.4, training=training, quantization=precise))[0].metrics

    one, four = measured("one", 1), measured("four", 4)
    assert one["eval_loss"] == pytest.approx(four["eval_loss"], rel=1e-5)
    assert one["check_loss"] == pytest.approx(four["check_loss"], rel=1e-5)


def test_eight_bit_optimizers_resume_with_the_same_bytes(make_run: MakeRun) -> None:
    spec: dict[str, Any] = {"training": {"optimizer": "adamw_8bit"}, "checkpoints": {"every_steps": 3}}
    whole, reports = train(make_run("whole", **spec))
    resumed, _ = train(replace(make_run("resumed", **spec), resume=saved(reports)[3]))
    assert adapter(resumed) == adapter(whole)
