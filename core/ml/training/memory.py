"""What a run takes of the device's memory, reckoned from the model's shape. No torch.

Counted are the weights, the adapter with its gradients and its optimizer's state, and what the forward pass keeps for
the backward pass: that is read off the code of a Llama layer, tensor by tensor. Measured beside it in bench/RESULTS.md.
"""

from dataclasses import dataclass
from typing import Any

from core.ml.training.config import Spec

_HALF, _SINGLE = 2, 4
# Of one scored position: trl multiplies tiles of so many words, and holds some copies of a tile in single precision.
_TILE_WORDS = 8192
_TILE_COPIES = 6
# The loss keeps AdamW's two moments in single precision, or in a byte each.
_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8}
# Libraries, allocator and buffers of the data: what a run takes beside all that.
_REST = {False: 150_000_000, True: 700_000_000}
_ALLOCATOR = 1.08


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind: what its sizes are."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> int:
        """Weights of the layers that are quantised and adapted."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter(self, r: int, modules: str | list[str]) -> int:
        """Weights of a LoRA of rank `r` on these modules."""
        sizes = {
            "q_proj": self.hidden + self.queries,
            "k_proj": self.hidden + self.keys,
            "v_proj": self.hidden + self.keys,
            "o_proj": self.queries + self.hidden,
            "gate_proj": self.hidden + self.intermediate,
            "up_proj": self.hidden + self.intermediate,
            "down_proj": self.intermediate + self.hidden,
        }
        chosen = sizes if isinstance(modules, str) else {name: sizes.get(name, 0) for name in modules}
        return self.layers * r * sum(chosen.values())


def shape_of(config: dict[str, Any]) -> Shape | None:
    """The shape in a model's config.json; None where it is not of this kind, and nothing can be reckoned."""
    try:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        if config.get("num_local_experts") or config.get("num_experts"):
            return None
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            queries=heads * width,
            keys=(config.get("num_key_value_heads") or heads) * width,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )
    except (KeyError, TypeError):
        return None


def needed(
    shape: Shape, spec: Spec, tokens: int, trained: int, *, cuda: bool, kept: bool, checkpointing: bool
) -> int:
    """Bytes that a run takes at its peak, with micro-batches of at most so many `tokens`, of which so many `trained`.

    `kept`: the weights lie there dequantised. `spec` has its compute_dtype and optimizer resolved.
    """
    half = _SINGLE if spec.quantization.compute_dtype == "float32" else _HALF
    adapter = shape.adapter(spec.lora.r, spec.lora.target_modules)
    moments = _MOMENTS[spec.training.optimizer] if spec.training.optimizer != "auto" else 8
    fixed = _weights(shape, spec.quantization.bits, half, kept=kept) + adapter * (
        2 * _SINGLE + moments + half
    )
    layer = _kept_of_a_layer(shape, spec.lora.r, half, fused=kept or spec.quantization.bits == 16)
    moving = shape.layers * half * shape.hidden + layer if checkpointing else shape.layers * layer
    scored = min(trained, tokens) * _TILE_WORDS * (half + _TILE_COPIES * _SINGLE)
    return int((fixed + tokens * moving + scored) * _ALLOCATOR) + _REST[cuda]


def _weights(shape: Shape, bits: int, half: int, *, kept: bool) -> int:
    plain = half * shape.embedding
    if kept or bits == 16:
        return plain + half * shape.linear
    # Four bits and an eighth for the scales of blocks of 64; eight bits and a scale a row.
    return plain + int(shape.linear * (0.53 if bits == 4 else 1.02))


def _kept_of_a_layer(shape: Shape, r: int, half: int, *, fused: bool) -> int:
    """Bytes that a layer keeps of a token until its backward pass.

    Two norms keep their input in single precision and normalised; queries, keys and values are kept before and after
    they are rotated, then what attention gives; gate, up, the activation and their product. Each LoRA keeps its input,
    which peft casts to single precision, and its r numbers.
    """
    norms = 2 * shape.hidden * (_SINGLE + half)
    heads = half * (3 * shape.queries + 4 * shape.keys)
    mlp = half * 4 * shape.intermediate
    inputs = 2 * shape.hidden + shape.queries + shape.intermediate
    if fused:
        return norms + heads + mlp + half * (inputs + 7 * r)
    separate = 5 * shape.hidden + shape.queries + shape.intermediate
    return norms + heads + mlp + (_SINGLE + half) * separate + (_SINGLE + half) * 7 * r
