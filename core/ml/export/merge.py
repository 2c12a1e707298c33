"""An adapter merged into its 16-bit base model on the CPU, as a folder that transformers loads alone."""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from core.errors import GraftError
from core.ml import base_model
from core.ml import contract as contracts
from core.ml.catalogue import BaseModel
from core.ml.prompts import Contract


def with_adapter(base: BaseModel, adapter: Path, model: Any = None) -> PeftModel:
    """The base as its own files hold it, never a quantised one unless `model` is given, and the adapter on it.

    Raises:
        GraftError: `adapter_mismatch`, it was trained on another base model, or has no safetensors.
    """
    # Looked at first: peft would go on to a pickle.
    if not (adapter / "adapter_model.safetensors").is_file():
        raise GraftError("adapter_mismatch", "The adapter has no adapter_model.safetensors.", status=422)
    loaded = base_model.load_plain(base.path) if model is None else model
    try:
        adapted = PeftModel.from_pretrained(loaded, str(adapter))
    except (ValueError, RuntimeError, KeyError) as error:
        message = f"The adapter does not fit base model {base.name}: {error}"
        raise GraftError("adapter_mismatch", message, status=422) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def merged(model: PeftModel) -> Any:
    """The plain model whose weights hold the adapter: added in float32, rounded once to the base's own type.

    `model` is used up. One layer at a time is float32, so that it takes no more memory than the base.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            dtype = weight.dtype
            weight.data = weight.data.float()
            module.merge()
            weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return model.merge_and_unload()


def save(model: Any, contract: Contract, folder: Path) -> None:
    """Weights, configuration, tokenizer, chat template and prompt contract; it stops where the adapter learned to."""
    stops = list(contract.stop_token_ids)
    generation = model.generation_config
    generation.eos_token_id = stops
    if generation.pad_token_id is None:
        pad = contract.tokenizer.pad_token_id
        generation.pad_token_id = stops[0] if pad is None else pad
    if any(value not in (None, 1.0) for value in (generation.temperature, generation.top_p)):
        generation.do_sample = True  # settings of sampling without it are refused
    model.save_pretrained(str(folder), safe_serialization=True)
    contracts.save(contract, folder)
