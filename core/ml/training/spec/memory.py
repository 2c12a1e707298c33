"""What a run takes of the device's memory, reckoned from the model's shape. No torch.

Counted are the weights, the adapter with its gradients and its optimizer's state, and what the forward pass keeps for
the backward pass: that is read off the code of a Llama layer, tensor by tensor. Measured beside it in bench/RESULTS.md.
"""

from dataclasses import dataclass
from typing import Any

from core.ml.training.config import Spec

_HALF, _SINGLE = 2, 4
# Scored positions whose logits speed.scoring has in memory at once (50 MB for 49,152 words), and their copies.
SCORED, _COPIES = 256, 2
# On a GPU trl scores tiles of so many positions and words.
_TILE = 4096, 32768
# Documents up to this length are attended by plain products, faster than torch's kernel, whose backward pass is slow on
# short texts; they keep their shares for the backward pass.
SHORT = 768
# AdamW keeps two moments in single precision, or in a byte each.
_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8}
# Libraries, allocator and buffers of the data: what a run takes beside all that.
_REST = {False: 150_000_000, True: 700_000_000}
_ALLOCATOR = 1.15
# On a CPU torch's library keeps a kernel for each shape that it met, up to a thousand: every step brings new ones.
_KERNELS, _MET_AFTER = 350_000_000, 30


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind: what its sizes are."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
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
            heads=heads,
            queries=heads * width,
            keys=(config.get("num_key_value_heads") or heads) * width,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )
    except (KeyError, TypeError):
        return None


def needed(
    shape: Shape,
    spec: Spec,
    lengths: list[int],
    trained: int,
    *,
    cuda: bool,
    kept: bool,
    checkpointing: bool,
    parts: int = 1,
    steps: int = 0,
) -> int:
    """Bytes that a run takes at its peak, with a micro-batch of rows of these `lengths`, of whose tokens so many are
    `trained`.

    `kept`: the weights lie there dequantised. So many processes hold `parts` of the model. After `steps` it has grown. `spec` has its compute_dtype
    and its optimizer resolved.
    """
    half = _SINGLE if spec.quantization.compute_dtype == "float32" else _HALF
    adapter = shape.adapter(spec.lora.r, spec.lora.target_modules)
    optimizer = spec.training.optimizer
    assert optimizer != "auto"
    moments = _MOMENTS[optimizer]
    # Beside the masters, their gradients and the moments: the optimizer's two intermediate results.
    learned = adapter * (2 * _SINGLE + moments + half + 2 * _SINGLE)
    plain = kept or spec.quantization.bits == 16
    tokens = sum(lengths)
    dropout = spec.lora.dropout > 0
    layer = tokens * _kept_of_a_token(shape, spec.lora.r, half, alone=dropout or not plain, dropout=dropout)
    if not cuda:
        layer += half * shape.heads * sum(length**2 for length in lengths if length <= SHORT)
    through = shape.layers * half * shape.hidden * tokens + layer if checkpointing else shape.layers * layer
    if cuda:
        scored = min(trained, _TILE[0]) * min(shape.vocabulary, _TILE[1]) * half
    else:
        scored = min(trained, SCORED) * shape.vocabulary * (half + _COPIES * _SINGLE)
    whole = _weights(shape, spec.quantization.bits, half, kept=kept)
    running = (whole + learned) // parts + through + scored
    # Those that share the model begin by loading all of it each.
    return int(max(running, whole) * _ALLOCATOR) + _REST[cuda] + growth(steps, cuda=cuda)


def growth(steps: int, *, cuda: bool) -> int:
    """Bytes that a run has taken beside, after so many steps."""
    return 0 if cuda else _KERNELS * min(steps, _MET_AFTER) // _MET_AFTER


def _weights(shape: Shape, bits: int, half: int, *, kept: bool) -> int:
    plain = half * shape.embedding
    if kept or bits == 16:
        return plain + half * shape.linear
    # Four bits and an eighth for the scales of blocks of 64; eight bits and a scale a row.
    return plain + int(shape.linear * (0.53 if bits == 4 else 1.02))


def _kept_of_a_token(shape: Shape, r: int, half: int, *, alone: bool, dropout: bool) -> int:
    """Bytes that a layer keeps of a token until its backward pass, without the shares of its attention.

    Two norms keep their input in single precision. Then what is multiplied: the norms' results, the rotated queries
    and keys, the values, what attention gives; gate, up, the activation and their product. Each LoRA keeps its r
    numbers; `alone` an input each, and with `dropout` what of it was dropped, in single precision.
    """
    norms = 2 * shape.hidden * _SINGLE
    inputs = 5 * shape.hidden + shape.queries + shape.intermediate
    products = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 4 * shape.intermediate + 7 * r
    return norms + half * products + half * inputs * alone + _SINGLE * inputs * dropout
