"""Weights in the order of the processor's units give the numbers of the weights as they were."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from core.ml.inference.batch import packed
from core.ml.inference.batch.model import Batched, Row
from tests.ml.inference import strong

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no bfloat16"
)


def model(folder: Path, config: PreTrainedConfig) -> Any:
    strong.model(folder, config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def read(batched: Batched) -> torch.Tensor:
    """The logits after three prompts, and after one token more of each."""
    caches = [batched.cache(64) for _ in range(3)]
    prompts = [strong.prompt(length) for length in (1, 9, 40)]
    first = batched.read([Row(cache, ids, None, True) for cache, ids in zip(caches, prompts, strict=True)])
    return torch.cat([first, batched.read([Row(cache, [5], None, True) for cache in caches])])


@pytest.mark.parametrize("kind", strong.CONFIGURATIONS)
def test_the_numbers_are_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model(tmp_path, strong.CONFIGURATIONS[kind])
    with monkeypatch.context() as patch:
        patch.setattr(packed, "pack", lambda _model: False)
        wanted = read(Batched(copy.deepcopy(plain)))
    batched = Batched(plain)
    assert sum(isinstance(layer, packed._Part) for layer in plain.modules()) > 8
    assert torch.equal(read(batched), wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_given_back_as_it_was(tmp_path: Path, tied: bool) -> None:
    config = copy.deepcopy(strong.CONFIGURATIONS["qwen2"])
    config.tie_word_embeddings = tied
    given = model(tmp_path, config)
    before = {name: weights.clone() for name, weights in given.state_dict().items()}
    batched = Batched(given)
    read(batched)
    batched.close()
    after = given.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
    head, embedded = given.get_output_embeddings().weight, given.get_input_embeddings().weight
    assert (head.data_ptr() == embedded.data_ptr()) == tied


def test_products_meet_few_numbers_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps code for each."""
    batched = Batched(model(tmp_path, strong.CONFIGURATIONS["llama"]))
    met = set()
    product = packed._Product.__call__

    def noted(self: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
        met.add(x.shape[-2])
        return product(self, x, **options)

    monkeypatch.setattr(packed._Product, "__call__", noted)
    for length in range(1, 130):
        batched.read([Row(batched.cache(130), strong.prompt(length), None, True)])
    assert met == {*range(1, 17), *range(32, 145, 16)}
