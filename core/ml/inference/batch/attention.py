"""Attention of a step in which every sequence has keys and values of its own, of any length.

Each sequence is attended by itself: a mask over all of them would cost the square of their sum.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

_NAME = "sequences"


class Cache:
    """Keys and values of one sequence: [layers, 2, heads, most, width], of whose `most` tokens `length` are there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.length = 0


class Span(NamedTuple):
    """The tokens `start` to `end` of a step belong to the sequence of this cache."""

    start: int
    end: int
    cache: Cache


def empty(config: Any, most: int, dtype: torch.dtype, device: torch.device) -> Cache:
    return Cache(torch.empty(shape(config, most), dtype=dtype, device=device))


def shape(config: Any, most: int) -> tuple[int, int, int, int, int]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, 2, config.num_key_value_heads, most, width


def install(model: Any) -> None:
    """Let the model attend by spans: `model(…, spans=[…])`. A name for which transformers knows no mask makes it build
    none."""
    AttentionInterface.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    spans: Sequence[Span],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, width] of each -> [1, tokens, heads, width]."""
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    made = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
    for start, end, cache in spans:
        past, last = cache.length, cache.length + end - start
        keys, values = cache.tensor[module.layer_idx]
        keys[:, past:last] = key[0, :, start:end]
        values[:, past:last] = value[0, :, start:end]
        first = 0 if sliding_window is None else max(0, past - sliding_window + 1)
        made[start:end] = _attended(
            query[0, :, start:end],
            keys[:, first:last],
            values[:, first:last],
            scaling=scaling,
            window=sliding_window,
            softcap=softcap,
        ).transpose(0, 1)
    return made[None], None


def _attended(
    query: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """[heads, new, width]: the last `new` of the tokens that `keys` are of see themselves and what is before them."""
    heads, new, width = query.shape
    groups, length, _ = keys.shape
    # Heads that share their keys lie below one another, as more queries of one head.
    together = query.reshape(groups, -1, width)
    seen = None
    if new > 1 or (window is not None and length > window):
        places = torch.arange(length, device=query.device)
        ahead = places - places[length - new :, None]
        seen = ahead <= 0
        if window is not None:
            seen &= ahead > -window
        seen = seen.repeat(heads // groups, 1)
    if softcap is None:
        made = scaled_dot_product_attention(
            together[None], keys[None], values[None], attn_mask=seen, scale=scaling
        )[0]
    else:
        scores = torch.tanh(together @ keys.transpose(1, 2) * (scaling / softcap)) * softcap
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        made = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values
    return made.view(heads, new, width)
