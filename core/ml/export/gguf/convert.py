"""A merged model as one GGUF file, for llama.cpp and what is built on it.

Only architectures whose tensors are known to mean the same there; every file is loaded again and compared.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from core.ml import prompts, tokens
from core.ml.export.gguf import vocabulary
from core.ml.export.gguf.vocabulary import unsupported
from core.ml.prompts import Contract, Encoded

_ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
_TYPES = {
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}


def check(config: Any) -> None:
    """Raises GraftError `gguf_not_supported` where the model's parts cannot be written, with the reason."""
    name = (config.architectures or ["unknown"])[0]
    if name not in _ARCHITECTURES:
        raise unsupported(f"its architecture is {name}, not one of {', '.join(_ARCHITECTURES)}")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ("default", "linear"):
        raise unsupported(f"its positions are scaled by {rope['rope_type']}")
    if config.hidden_act != "silu":
        raise unsupported(f"its activation is {config.hidden_act}, not silu")
    if getattr(config, "mlp_bias", False):
        raise unsupported("its feed-forward layers have a bias")


def write(model: Any, contract: Contract, name: str, file: Path) -> None:
    """Write the model; matrices keep its own 16-bit type, norms and biases are float32."""
    config = model.config
    check(config)
    arch = _ARCHITECTURES[config.architectures[0]]
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[arch])
    _add_sizes(writer, config, name)
    writer.add_file_type(_TYPES[model.dtype][1])
    vocabulary.write(writer, contract, config.vocab_size)
    tensors = list(_named(model, arch))
    for tensor_name, tensor in tensors:
        kind = GGMLQuantizationType.F32 if tensor.ndim == 1 else _TYPES[model.dtype][0]
        size = tensor.numel() * (4 if kind == GGMLQuantizationType.F32 else 2)
        writer.add_tensor_info(tensor_name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in tensors:
            writer.write_tensor_data(_content(tensor_name, tensor, config, arch))
    finally:
        writer.close()


def load(file: Path) -> Any:
    """The model that transformers reads from the file, its matrices as they are in it."""
    dtype = next(kind for kind, (_, number) in _TYPES.items() if number == _file_type(file))
    dense = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, quantization_config=dense
    )


def reads_the_same(file: Path, contract: Contract, samples: list[Encoded]) -> bool:
    """Whether the tokenizer that transformers makes of the file gives the samples' tokens, control tokens included."""
    made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    whole = [prompts.text_of(contract, sample.ids) for sample in samples]
    # Pieces with a space at their beginning are read otherwise by transformers, not by llama.cpp.
    texts = [part.lstrip(" ") for text in whole for part in contract.control.split(text)]
    if tokens.ids_of_rendered(contract.tokenizer, "a", start=False) == tokens.continuation(
        contract.tokenizer, "a"
    ):
        texts += whole
    return all(
        tokens.ids_of_rendered(contract.tokenizer, text, start=False)
        == tokens.ids_of_rendered(made, text, start=False)
        for text in texts
    )


def _file_type(file: Path) -> int:
    field = GGUFReader(file).get_field("general.file_type")
    assert field is not None
    return int(field.contents())


def _add_sizes(writer: GGUFWriter, config: Any, name: str) -> None:
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # llama.cpp has no sliding window here: within one window both see the same.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    writer.add_name(name)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _named(model: Any, arch: MODEL_ARCH) -> Iterator[tuple[str, torch.Tensor]]:
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    for ours, tensor in model.state_dict().items():
        if ours == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # whoever finds no output matrix takes the embeddings
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise unsupported(f"nothing there is known as {ours}")
        yield theirs, tensor


def _content(name: str, tensor: torch.Tensor, config: Any, arch: MODEL_ARCH) -> Any:
    """The bytes of a tensor. Llama's rotary halves are interleaved there: query and key rows change places."""
    if arch == MODEL_ARCH.LLAMA and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 1:
        return tensor.float().numpy()
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
