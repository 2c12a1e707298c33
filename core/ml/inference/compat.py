"""The slow path: peft and transformers' generate, one request at a time, for what the batch cannot do.

That is models whose attention or positions are not among those the batch is tested with, and adapters that are more than
pairs of low-rank matrices (DoRA, whole trained layers).
"""

from collections.abc import Callable
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

from core.errors import Conflict, GraftError
from core.ml.inference.answering import Answering
from core.ml.inference.bases import BUILDING
from core.ml.inference.sampling import Sampler
from core.ml.inference.store import adapters
from core.ml.inference.store.adapters import Source


def answer(model: Any, one: Answering, meanwhile: Callable[[], None]) -> None:
    """Write one answer, and leave the model as it was; `meanwhile` is called with every token.

    Raises:
        NotFound: `adapter_missing`, its files are gone by now.
        Conflict: `adapter_mismatch`, the adapter does not fit.
    """
    source = one.request.adapter
    asking: Any = model if source is None else _adapted(model, source)
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
        if isinstance(asking, PeftModel):
            _unload(model, asking)


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


def _adapted(model: Any, source: Source) -> PeftModel:
    if not source.folder.is_dir():
        raise adapters.gone(source)
    try:
        with BUILDING:
            adapted = PeftModel.from_pretrained(model, str(source.folder)).eval()
    except (RuntimeError, ValueError) as error:
        raise Conflict(
            "adapter_mismatch", f"Adapter {source.name} does not fit {source.base}: {error}"
        ) from error
    with safe_open(source.folder / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    placed = set(get_peft_model_state_dict(adapted))
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
            self.one.fail(
                GraftError("engine_error", "The model computed no numbers for this prompt.", status=502)
            )
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
