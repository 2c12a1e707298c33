"""Products with weights that lie as the processor's matrix units read them, those of one input in one product.

For few rows torch's own bfloat16 products spend as long on reading the weights in the wrong order as on multiplying; with
oneDNN's own order, which torch.compile uses too, they take half the time and give the same bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.ml.inference.batch.lora import Layer

# Layers of one parent that are called one after the other with the same input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# oneDNN chooses the order by how many rows there will be; that of a few does for all.
_ROWS = 8
_EXACT = 16


class _Product:
    """x -> x W^T of several layers' weights below one another."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight.data for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
        self._of: Tensor | None = None
        self._made: Tensor | None = None

    def __call__(self, x: Tensor, *, last: bool) -> Tensor:
        """Computed once for the layers that are asked with the same `x`."""
        if self._made is None or self._of is not x:
            self._of, self._made = (
                x,
                torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""),
            )
        made = self._made
        if last:
            self._of = self._made = None
        return made


class _Part(nn.Module):
    """One layer's share of a product."""

    def __init__(self, product: _Product, start: int, end: int, *, last: bool) -> None:
        super().__init__()
        self.product, self.start, self.end, self.last = product, start, end, last

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, last=self.last)[..., self.start : self.end]

    def plain(self) -> nn.Linear:
        """The layer as it was."""
        weight = self.product.weight.to_dense()[self.start : self.end].clone()
        layer = nn.Linear(weight.shape[1], len(weight), bias=self.product.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.product.bias is not None:
            layer.bias = nn.Parameter(self.product.bias[self.start : self.end].clone(), requires_grad=False)
        return layer


def filled_up(rows: int) -> int:
    """So many rows are multiplied instead. oneDNN makes and keeps code for every number of rows that it meets, 0.7 MB for
    each shape of weights: of a thousand numbers it would keep them all."""
    return rows if rows <= _EXACT else -(-rows // _EXACT) * _EXACT


def pack(model: Any) -> bool:
    """Change the layers that `lora.wrap` wrapped, and the head, where the processor has units for it; whether any was."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    for parent in list(model.modules()):
        layers = {
            name: layer
            for name, layer in parent.named_children()
            if isinstance(layer, Layer) and _fits(layer.base)
        }
        groups = [names for names in _TOGETHER if all(name in layers for name in names)]
        alone = [(name,) for name in layers if not any(name in names for names in groups)]
        for names in [*groups, *alone]:
            parts = _parts([layers[name].base for name in names])
            for name, part in zip(names, parts, strict=True):
                layers[name].base = part
    head = model.get_output_embeddings()
    if _fits(head):
        model.set_submodule(_name_of(model, head), _parts([head])[0])
    return any(isinstance(layer, _Part) for layer in model.modules())


def unpack(model: Any) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, _Part):
            model.set_submodule(name, layer.plain())
    model.tie_weights()


def _fits(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.bfloat16
    )


def _parts(layers: Sequence[Any]) -> list[_Part]:
    product, parts, start = _Product(layers), [], 0
    for layer in layers:
        end = start + layer.out_features
        parts.append(_Part(product, start, end, last=layer is layers[-1]))
        start = end
    return parts


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next(name for name, layer in model.named_modules() if layer is wanted)
