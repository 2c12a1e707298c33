"""What is known of a base model before it is loaded."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM

from core.errors import BadRequest, GraftError
from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.base_model import Precision
from core.ml.catalogue import Catalogue
from core.ml.inference.batch.lora import linear_layers
from core.ml.inference.batch.model import supported
from core.ml.inference.sampling import Sampling

# While they build a model, transformers and peft change the whole process: the default dtype, what ties weights, how
# parameters are made. A model that is built meanwhile comes out wrong, and the change may stay.
BUILDING = threading.Lock()


@dataclass(frozen=True)
class Base:
    """`layers`: (outputs, inputs) of each that adapters can be added
    to; none where the batch does not read it. `marks`: tokens that are none of the text, as those of templates."""

    layers: dict[str, tuple[int, int]]
    vocabulary: int
    context: int
    ends: frozenset[int]
    tokenizer: Any
    marks: frozenset[int]


def look(models: Catalogue, name: str) -> Base:
    """Its files are brought here if they are not.

    Raises:
        NotFound: `model_not_found` or `model_not_installed`.
    """
    model = catalogue.find(models, name)
    base_model.prepare(model)
    config = AutoConfig.from_pretrained(model.path)
    layers = {}
    if supported(config):
        with BUILDING, torch.device("meta"):
            found = linear_layers(AutoModelForCausalLM.from_config(config))
        layers = {name: (layer.out_features, layer.in_features) for name, layer in found.items()}
    contract = contracts.load_cached(model.path)
    return Base(
        layers,
        config.get_text_config().vocab_size,
        catalogue.context(model),
        frozenset(contract.stop_token_ids),
        contract.tokenizer,
        frozenset(contract.tokenizer.added_tokens_decoder),
    )


def load(models: Catalogue, name: str, precision: Precision) -> Any:
    """The model itself.

    Raises:
        GraftError: `device_full`, 503; or why it cannot be loaded.
    """
    try:
        with BUILDING:
            model = base_model.load(catalogue.find(models, name), precision).eval()
    except Exception as error:
        if not base_model.is_out_of_memory(error):
            raise
        message = f"There is no memory for {name} beside what runs on this machine."
        raise GraftError("device_full", message, status=503) from error
    for layer in model.modules():
        # The fused CPU kernel fails on other shapes.
        if isinstance(layer, Linear4bit) and (
            layer.out_features % 32 or layer.in_features % layer.weight.quant_state.blocksize
        ):
            layer.support_avx512bf16_for_cpu = False
    return model


def before(base: Base, prompt: list[int]) -> list[int]:
    """The end of a prompt that its answer goes on with: none after a mark of the template, where text begins anew."""
    return [] if not prompt or prompt[-1] in base.marks else prompt


def check(base: Base, prompt: list[int], sampling: Sampling) -> None:
    """Refuse what the model cannot read.

    Raises:
        BadRequest: `invalid_prompt`, `invalid_logit_bias` or `prompt_too_long`.
    """
    if not prompt or min(prompt) < 0 or max(prompt) >= base.vocabulary:
        raise BadRequest(
            "invalid_prompt",
            f"The prompt must be token ids from 0 to {base.vocabulary - 1}.",
            param="prompt",
            status=400,
        )
    if any(not 0 <= token < base.vocabulary for token in sampling.logit_bias):
        raise BadRequest(
            "invalid_logit_bias",
            f"logit_bias must name token ids from 0 to {base.vocabulary - 1}.",
            param="logit_bias",
            status=400,
        )
    if len(prompt) + sampling.max_tokens > base.context:
        raise BadRequest(
            "prompt_too_long",
            f"{len(prompt)} prompt tokens and {sampling.max_tokens} new ones are more "
            f"than the {base.context} the model reads.",
            status=400,
        )
