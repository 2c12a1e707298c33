"""A batch as one long row without padding, whose documents are attended one by one. For CPUs, where no kernel of
the libraries does that: padding costs as much time as tokens, and a mask over the whole row more."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from core.ml.training.spec.memory import SHORT

_NAME = "documents"


def attend_one_by_one(model: Any) -> bool:
    """Set the attention of a model, if it can be: one with full causal attention through torch's kernel."""
    config = model.config
    windows = getattr(config, "sliding_window", None) is not None or set(
        getattr(config, "layer_types", None) or ()
    ) - {"full_attention"}
    if windows or config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    return True


def attended_one_by_one(model: Any) -> bool:
    return bool(model.config._attn_implementation == _NAME)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[rows, heads, tokens, width] of each. With `cu_seq_lens_q`, where the documents of the one row begin and end."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    documents = []
    for first, last in pairwise(cu_seq_lens_q.tolist()):
        parts = (query[:, :, first:last], key[:, :, first:last], value[:, :, first:last])
        if last - first <= SHORT and not kwargs.get("dropout"):
            documents.append(_short(*parts, scaling=kwargs["scaling"]))
        else:
            documents.append(sdpa_attention_forward(module, *parts, None, **kwargs)[0])
    return torch.cat(documents, dim=1), None


def _short(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """[1, tokens, heads, width] of one document, by plain products: the heads that share keys as one matrix."""
    _, heads, tokens, width = query.shape
    groups = key.shape[1]
    future = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype).triu_(1)
    scores = torch.baddbmm(
        future.repeat(heads // groups, 1).expand(groups, -1, -1),
        query.reshape(groups, -1, width),
        key[0].transpose(1, 2),
        alpha=scaling,
    )
    return torch.bmm(scores.softmax(-1), value[0]).view(1, heads, tokens, width).transpose(1, 2)
