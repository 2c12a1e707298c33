"""The same training, sooner: base weights kept dequantised, adapters that share an input multiplied together.

A QLoRA step in peft unpacks every 4-bit weight twice, casts each input to float32 and back, and multiplies two
thin matrices beside each weight. Here the weight of a group of layers that read the same input (q, k, v; gate, up)
and their A matrices lie below one another in one matrix, so that one product serves them all; the values are those
of peft up to rounding. Gains: bench/RESULTS.md.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

_ADAPTER = "default"
# Layers of one parent that are called one after the other with the same input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def keep_dequantised(model: Any) -> None:
    """Replace every 4-bit layer by a plain one with the values that the 4 bits stand for."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                setattr(parent, name, _plain(layer))
    # It is a plain model now: transformers and peft ask these before they cast or save.
    model.is_loaded_in_4bit = model.is_quantized = False
    model.hf_quantizer = None
    del model.config.quantization_config


def _plain(layer: Linear4bit) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    values = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
    plain.weight = nn.Parameter(values, requires_grad=False)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain


def fuse(model: PeftModel) -> None:
    """Let the LoRA layers over plain weights compute in groups. Others stay as they are: dropout, DoRA, 4 or 8 bits."""
    for parent in list(model.modules()):
        children = {name: layer for name, layer in parent.named_children() if _fusable(layer)}
        for names in _TOGETHER:
            if all(name in children for name in names):
                _Group([children.pop(name) for name in names])
        for layer in children.values():
            _Group([layer])


def _fusable(layer: nn.Module) -> bool:
    return (
        isinstance(layer, LoraLinear)
        and type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [_ADAPTER]
        and not layer.lora_variant
        and not layer.merged
        and isinstance(layer.lora_dropout[_ADAPTER], nn.Identity)
        and layer.lora_A[_ADAPTER].bias is None
        and layer.lora_B[_ADAPTER].bias is None
    )


class _Group:
    """Layers with one input. `weight` is [sum of outputs + sum of ranks, inputs]: their weights, then their A."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.ranks = [layer.r[_ADAPTER] for layer in layers]
        self.scales = [layer.scaling[_ADAPTER] for layer in layers]
        self.outputs = sum(layer.base_layer.out_features for layer in layers)
        weights = [layer.base_layer.weight for layer in layers]
        self.weight = weights[0].new_empty(self.outputs + sum(self.ranks), weights[0].shape[1])
        self.spans: list[tuple[int, int]] = []
        start = 0
        for weight in weights:
            end = start + len(weight)
            self.weight[start:end] = weight.data
            weight.data = self.weight[start:end]  # one copy in memory
            self.spans.append((start, end))
            start = end
        self.halves: list[Tensor] = []
        self.waiting: tuple[Tensor, tuple[Tensor, ...]] | None = None
        for place, layer in enumerate(layers):
            layer.forward = self._forward_of(place, layer.forward)

    def _forward_of(self, place: int, alone: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The forward of one layer: the first that gets an input computes for all, the others take what is theirs."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.layers[place].disable_adapters:
                return alone(x, *args, **kwargs)
            if self.waiting is None or self.waiting[0] is not x:
                self.waiting = (x, self._compute(x))
            result = self.waiting[1][place]
            if place == len(self.layers) - 1:
                self.waiting = None  # not a moment longer in memory
            return result

        return forward

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        masters = [
            factor
            for layer in self.layers
            for factor in (layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight)
        ]
        # Every time: some optimizers write past torch's count of a tensor's versions.
        self.weight[self.outputs :] = torch.cat([factor.detach() for factor in masters[::2]])
        self.halves = [factor.detach().to(self.weight.dtype) for factor in masters[1::2]]
        made: tuple[Tensor, ...] = _Product.apply(x.to(self.weight.dtype), self, *masters)
        biases = (layer.base_layer.bias for layer in self.layers)
        return tuple(
            y if bias is None else y + bias.to(y.dtype) for y, bias in zip(made, biases, strict=True)
        )

    def parts(self) -> Iterator[tuple[slice, slice, Tensor, float]]:
        """Of each layer: its columns in a product with `weight`, those of its A, its B, its scale."""
        start = self.outputs
        for (first, last), rank, half, scale in zip(
            self.spans, self.ranks, self.halves, self.scales, strict=True
        ):
            yield slice(first, last), slice(start, start + rank), half, scale
            start += rank


class _Product(torch.autograd.Function):
    """y = W x + s B A x of every layer of a group. W is frozen; A and B are float32, multiplied in W's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group, *_masters: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        product = rows @ group.weight.T
        outputs, inner = [], []
        for columns, low, half, scale in group.parts():
            inner.append(product[:, low].clone())
            y = torch.addmm(product[:, columns], inner[-1], half.T, alpha=scale)
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.group, ctx.shape = group, x.shape
        ctx.save_for_backward(rows, *inner)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        group, (rows, *inner) = ctx.group, ctx.saved_tensors
        product = rows.new_empty(len(rows), len(group.weight))
        factors: list[Tensor] = []
        for gradient, (columns, low, half, scale), ax in zip(gradients, group.parts(), inner, strict=True):
            dy = gradient.reshape(len(rows), -1)
            product[:, columns] = dy
            product[:, low] = (dy @ half) * scale
            factors += [product[:, low].T @ rows, (dy.T @ ax) * scale]
        dx = (product @ group.weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, *(factor.float() for factor in factors)
