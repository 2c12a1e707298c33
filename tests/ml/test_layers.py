"""The fast path gives what peft's own layers give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from core.ml import base_model, catalogue
from core.ml.catalogue import BaseModel, Catalogue
from core.ml.quantization import Quantization
from core.ml.training import assembly, config
from core.ml.training.speed import documents, layers
from tests import tiny


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> BaseModel:
    return catalogue.find(Catalogue(tmp_path / "models", {tiny.NAME: str(tiny_model)}), tiny.NAME)


def loaded(model: BaseModel, bits: int) -> Any:
    quantization = Quantization.model_validate({"bits": bits, "compute_dtype": "float32"})
    return base_model.load(model, base_model.settle(quantization))


def with_lora(model: Any, **lora: Any) -> Any:
    adapted = assembly.with_adapter(model, config.Spec.model_validate({"lora": lora}))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: then A would have no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True, "r": 4}, {"target_modules": ["q_proj", "down_proj"]}]
)
def test_the_fused_layers_give_the_logits_and_gradients_of_pefts(
    model: BaseModel, lora: dict[str, Any]
) -> None:
    plain, fused = (with_lora(loaded(model, 16), **lora) for _ in range(2))
    layers.fuse(fused)
    torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)
    expected, got = gradients(plain, IDS), gradients(fused, IDS)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_fused_layer_sees_new_weights_and_a_disabled_adapter(model: BaseModel) -> None:
    base = loaded(model, 16)
    alone = base(IDS).logits
    fused = with_lora(base)
    layers.fuse(fused)
    before = fused(IDS).logits
    with torch.no_grad():
        next(p for name, p in fused.named_parameters() if "lora_A" in name).mul_(2)
    assert not torch.equal(fused(IDS).logits, before)
    with fused.disable_adapter():
        assert torch.equal(fused(IDS).logits, alone)


@pytest.mark.parametrize("lora", [{"dropout": 0.5}, {"use_dora": True}])
def test_what_the_fused_layers_cannot_do_stays_with_peft(model: BaseModel, lora: dict[str, Any]) -> None:
    plain, fused = (with_lora(loaded(model, 16), **lora) for _ in range(2))
    layers.fuse(fused)
    results = []
    for adapted in (plain, fused):
        torch.manual_seed(3)
        results.append(gradients(adapted, IDS))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_kept_weights_have_the_values_of_the_four_bits(model: BaseModel) -> None:
    packed, kept = loaded(model, 4), loaded(model, 4)
    layers.keep_dequantised(kept)
    assert not any("4bit" in type(module).__name__ for module in kept.modules())
    torch.testing.assert_close(kept(IDS).logits, packed(IDS).logits, rtol=1e-5, atol=1e-6)
    adapted = with_lora(kept)
    layers.fuse(adapted)
    expected = gradients(with_lora(packed), IDS)
    for name, gradient in gradients(adapted, IDS).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def collated(rows: list[list[int]], *, padding_free: bool) -> dict[str, Any]:
    collate = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=padding_free)
    return collate([{"input_ids": row, "labels": row} for row in rows])


def test_documents_of_one_long_row_do_not_see_each_other(model: BaseModel) -> None:
    padded, flat = with_lora(loaded(model, 16)), with_lora(loaded(model, 16))
    assert documents.attend_one_by_one(flat)
    rows = [list(range(3, 3 + length)) for length in (5, 17, 2, 9)]
    wide, long = (collated(rows, padding_free=which) for which in (False, True))
    expected = padded(**{name: wide[name] for name in ("input_ids", "attention_mask")}).logits
    expected = expected[wide["attention_mask"].bool()]
    del long["labels"]
    got = flat(**long, use_cache=False).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    expected.sum().backward()
    for one, other in zip(flat.parameters(), padded.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_generation_through_the_same_attention_is_the_librarys(model: BaseModel) -> None:
    plain, flat = loaded(model, 16), loaded(model, 16)
    assert documents.attend_one_by_one(flat)
    options = {
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]),
        "max_new_tokens": 8,
        "do_sample": False,
    }
    assert torch.equal(flat.generate(IDS, **options), plain.generate(IDS, **options))


def test_a_model_with_a_sliding_window_keeps_its_own_attention(model: BaseModel) -> None:
    windowed = loaded(model, 16)
    windowed.config.sliding_window = 4
    assert not documents.attend_one_by_one(windowed)
    assert windowed.config._attn_implementation == "sdpa"
