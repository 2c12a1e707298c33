"""Models and adapters whose every mix-up shows in the first tokens, and what transformers and peft alone say of them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests import tiny

_SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
    # Tied, some of them would say the same token for ever.
    "tie_word_embeddings": False,
}
# The windows are shorter than the longer prompts.
CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "llama3-rope": LlamaConfig(
        **_SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**_SMALL, sliding_window=16),
    "qwen2": Qwen2Config(**_SMALL),
    "qwen2-window": Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16),
    "gemma2": Gemma2Config(**_SMALL, head_dim=16, sliding_window=16),
    "gemma3": Gemma3TextConfig(**_SMALL, head_dim=16, sliding_window=16),
    "phi3": Phi3Config(**_SMALL, sliding_window=16),
}


def model(folder: Path, config: PreTrainedConfig, seed: int = 0) -> Path:
    """A model whose weights are large enough for every token to matter."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, seed: int, name: str = tiny.NAME, **settings: Any) -> Path:
    torch.manual_seed(seed)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **settings}
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **options),
    )
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.05)
            elif "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    made.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    numbers = random.Random(f"{length} {seed}")
    return [numbers.randrange(3, 320) for _ in range(length)]


PROMPT = prompt(20)
# A bias by which an answer does not end by itself.
NEVER = {2: -100.0}


def alone(model: Any, asked: list[int], count: int, ends: Sequence[int]) -> list[int]:
    """What generate answers to one request, the most likely token each time."""
    model.generation_config = GenerationConfig()
    ids = torch.tensor([asked])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=0,
    )
    return list(made[0, len(asked) :].tolist())


def loaded(base: Path, adapted: Path | None = None) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return plain if adapted is None else PeftModel.from_pretrained(plain, str(adapted)).eval()


def greedy(base: Path, folder: Path | None = None, prompt: list[int] = PROMPT, count: int = 12) -> list[int]:
    return alone(loaded(base, folder), prompt, count, [2])
