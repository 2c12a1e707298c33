"""The slow path: peft and transformers' generate, one request at a time, for what the batch cannot do.

That is models whose attention or positions are not among those the batch is tested with, and adapters that are more than
pairs of low-rank matrices (DoRA, whole trained layers).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from core.errors import Conflict
from core.ml.inference.answering import Answering
from core.ml.inference.bases import BUILDING
from core.ml.inference.sampling import Sampler
from core.ml.inference.store import files
from core.ml.inference.store.files import Source


def answer(model: Any, one: Answering, meanwhile: Callable[[], None]) -> None:
    """Write one answer, and leave the model as it was; `meanwhile` is called with every token.

    Raises:
        NotFound: `adapter_missing`, its files are gone by now.
        Conflict: `adapter_mismatch`, the adapter does not fit.
    """
    source = one.request.adapter
    if source is None:
        _write(model, model, one, meanwhile)
        return
    files.see_unchanged(source)
    with safe_open(source.folder / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
        if _is_inert(file, stored):
            raise files.inert(source)
    with _own_weights_kept(model, stored):
        adapted = _adapted(model, source, stored)
        try:
            _write(model, adapted, one, meanwhile)
        finally:
            _unload(model, adapted)


def _write(model: Any, asking: Any, one: Answering, meanwhile: Callable[[], None]) -> None:
    """`asking`: the model itself, or with an adapter."""
    one.sampler = Sampler(one.request.sampling, one.request.prompt, model.device)
    makers = model.generation_config
    # What the model's makers preset (penalties, temperatures) must not mix with the request.
    model.generation_config = GenerationConfig()
    try:
        ids = torch.tensor([one.request.prompt], device=model.device)
        with torch.inference_mode():
            asking.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=one.request.sampling.max_tokens, do_sample=False, pad_token_id=0
                ),
                logits_processor=LogitsProcessorList([_Chosen(one)]),
                stopping_criteria=StoppingCriteriaList([_Over(one, meanwhile)]),
            )
    finally:
        model.generation_config = makers


def is_bare(model: Any) -> bool:
    """Whether nothing of an adapter is left in the model."""
    return not any(isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) for layer in model.modules())


def _unload(model: Any, adapted: PeftModel) -> None:
    """peft leaves the trained copies of whole layers in the model: the next request would read through them."""
    own = {
        name: layer.original_module
        for name, layer in model.named_modules()
        if isinstance(layer, ModulesToSaveWrapper)
    }
    adapted.unload()
    for name, layer in own.items():
        model.set_submodule(name, layer)


@contextmanager
def _own_weights_kept(model: Any, stored: set[str]) -> Iterator[None]:
    """With an adapter on the embeddings or the head peft stores those layers too, and loading it writes them into the
    model: everybody else would read through them from then on."""
    marks = ("base_model.model.", ".base_layer.")
    named = {key.removeprefix(marks[0]).replace(marks[1], ".") for key in stored if marks[1] in key}
    own = {name: weights for name, weights in model.named_parameters(remove_duplicate=False) if name in named}
    kept = {name: weights.detach().clone() for name, weights in own.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weights in own.items():
                weights.copy_(kept[name])


def _is_inert(file: Any, stored: set[str]) -> bool:
    """Whether it is low-rank matrices alone, and every B is zero."""
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
    if any(not any(kind in key for kind in kinds) for key in stored):
        return False
    return not any(bool(file.get_tensor(key).any()) for key in stored if "lora_B" in key)


def _adapted(model: Any, source: Source, stored: set[str]) -> PeftModel:
    try:
        with BUILDING:
            adapted = PeftModel.from_pretrained(model, str(source.folder)).eval()
    except (RuntimeError, ValueError) as error:
        raise Conflict(
            "adapter_mismatch", f"Adapter {source.name} does not fit {source.base}: {error}"
        ) from error
    # Left to find out itself whether embeddings belong to it, peft asks the hub.
    embeddings = any(".base_layer." in key for key in stored)
    placed = set(get_peft_model_state_dict(adapted, save_embedding_layers=embeddings))
    if stored != placed:
        _unload(model, adapted)
        raise Conflict(
            "adapter_mismatch",
            f"Adapter {source.name} does not fit {source.base}: {len(stored ^ placed)} of its tensors have no place, or "
            "places have no tensor.",
        )
    return adapted


class _Chosen(LogitsProcessor):
    """Leaves the token that the request's own sampler chose as the only one."""

    def __init__(self, one: Answering) -> None:
        self.one = one

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        logits = scores[0].float()
        assert self.one.sampler is not None
        if not torch.isfinite(logits.max()):
            self.one.fail_without_numbers()
            return torch.zeros_like(scores)
        choice = self.one.sampler.choose(logits)
        self.one.take(choice)
        return torch.full_like(scores, -torch.inf).index_fill(
            1, torch.tensor([choice.token], device=scores.device), 0
        )


class _Over(StoppingCriteria):
    def __init__(self, one: Answering, meanwhile: Callable[[], None]) -> None:
        self.one, self.meanwhile = one, meanwhile

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        self.meanwhile()
        return torch.full((input_ids.shape[0],), self.one.leave(), device=input_ids.device)
