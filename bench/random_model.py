"""A model of random weights in a folder, for measuring: the shape of a known one, bfloat16, a tokenizer of bytes."""

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    # That of TinyLlama: 1.1 billion weights.
    "llama-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "tiny": _LLAMA
    | {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
_END = "</s>"


def write(folder: Path, shape: str) -> Path:
    """The model in the layout of transformers, a shard a layer: no more of it than a layer is in memory at once.

    A folder that holds a whole model is left as it is.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    config = LlamaConfig(
        **SHAPES[shape],
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=None,
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: weights.shape for name, weights in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, []).append(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU makes a hundred million numbers a second
    draw = torch.Generator(device).manual_seed(0)
    places = {}
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {name: _random(shapes[name], config.initializer_range, draw) for name in names}
        save_file(weights, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words.save_pretrained(folder)
    GenerationConfig(eos_token_id=words.eos_token_id).save_pretrained(folder)
    config.save_pretrained(folder)  # the last file: it says that the others are there
    return folder


def _random(shape: torch.Size, spread: float, draw: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.empty(shape, dtype=torch.bfloat16, device=draw.device).normal_(0, spread, generator=draw)
    return made.cpu()


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and one for the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate([_END, *letters])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=_END, pad_token=_END)


def write_rows(file: Path, count: int, tokens: int, seed: int = 0) -> Path:
    """JSON lines of {text}: random letters, which are so many tokens with the end."""
    draw = random.Random(seed)
    rows = ("".join(draw.choices(string.ascii_letters, k=tokens - 1)) for _ in range(count))
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file
