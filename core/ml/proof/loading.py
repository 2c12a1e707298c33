"""What was saved, loaded anew as its users load it: the base model, and the adapter through peft."""

import json
from pathlib import Path
from typing import Any

import psutil
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors import SafetensorError

from core.errors import GraftError
from core.ml import base_model
from core.ml.base_model import Precision
from core.ml.catalogue import BaseModel
from core.ml.training.speed import layers

_HALF = 2
# Room beside the unpacked weights: activations, keys and values, the adapter.
_ROOM = 2


def load(model: BaseModel, precision: Precision, folder: Path) -> PeftModel:
    """Base and adapter, ready to answer.

    On a CPU the 4-bit weights are unpacked where memory allows: the same values, in half the time. bitsandbytes' fused
    kernel is left alone: it is slower for many rows at once, and its values differ from those of training.

    Raises:
        GraftError: `adapter_incomplete`, the files do not fit the model.
    """
    base = base_model.load(model, precision)
    if base_model.device().type == "cpu" and precision.bits == 4:
        _settle(base)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise incomplete(f"They cannot be loaded: {error}") from error
    # The last positions of a batch are no block of memory, and torch then multiplies a copy of the head for every row.
    adapted.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    adapted.eval()
    assert isinstance(adapted, PeftModel)
    return adapted


def incomplete(what: str) -> GraftError:
    return GraftError(
        "adapter_incomplete",
        f"The saved files are not the whole adapter. {what}",
        hint="Retry the job; if it happens again, look for faults of the disk.",
    )


def config_of(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises as `load`."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise incomplete(f"adapter_config.json cannot be read: {error}") from error
    return dict(found)


def _settle(base: Any) -> None:
    packed = [module for module in base.modules() if isinstance(module, Linear4bit)]
    unpacked = _HALF * sum(module.in_features * module.out_features for module in packed)
    if _ROOM * unpacked < psutil.virtual_memory().available:
        layers.keep_dequantised(base)
        return
    base_model.unfuse(base)
