"""Packing needs an attention that keeps documents apart; whether this model has one is measured."""

from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from core.errors import BadRequest

_TOKENS = 12
# Of the largest logit. What leaks from another document is far more, what a kernel rounds far less.
_TOLERANCE = 0.01


def prepare(model: Any) -> None:
    """Have packed rows read document by document, with flash attention where it is installed.

    Raises:
        BadRequest: `packing_mixes_documents`.
    """
    if model.device.type == "cuda" and is_flash_attn_2_available():
        model.get_base_model().set_attn_implementation("flash_attention_2")
    if not keeps_documents_apart(model):
        raise BadRequest(
            "packing_mixes_documents",
            "With this model on this device a packed row's later documents see the earlier ones, "
            "so packing would train on mixed texts.",
            param="training.packing",
            hint='Set training.packing to false or "auto".',
        )


def keeps_documents_apart(model: Any) -> bool:
    """Whether in a packed row the logits of the second document stay as they are when the first one changes."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    vocabulary = model.get_input_embeddings().num_embeddings

    def document(start: int) -> list[int]:
        return [(start + i) % vocabulary for i in range(_TOKENS)]

    def second_logits(first: list[int]) -> torch.Tensor:
        row = {"input_ids": first + document(7), "seq_lengths": [_TOKENS, _TOKENS]}
        batch = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in collate([row]).items()
            if name != "labels"
        }
        logits = model(**batch, use_cache=False).logits[0, _TOKENS:]
        assert isinstance(logits, torch.Tensor)
        return logits.float()

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, other = (second_logits(document(start)) for start in (3, 3 + _TOKENS))
    finally:
        model.train(training)
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())
