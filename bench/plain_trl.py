"""The script that people would write: QLoRA with trl's SFTTrainer and trl's own defaults. The peer of bench.training.

    python -m bench.plain_trl '{"model": …, "train": …, "output": …, "steps": …, "rows": …, …}'

`config` and `lora` may hold more settings of SFTConfig and LoraConfig, `attention` names an implementation, `dtype` is
bfloat16 where it is not given.
Prints one line of JSON: {losses, tokens, seconds, peak_bytes, gpu}.
"""

import json
import resource
import sys
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from bench import device


class Clock(TrainerCallback):
    """Seconds of every step, with the optimizer's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.gpu: dict[str, int] | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ARG002
        device.reset()

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # noqa: ARG002
        self.began = device.now()

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: ARG002
        self.seconds.append(device.now() - self.began)
        self.gpu = device.taken()


def main() -> None:
    asked = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    dtype = getattr(torch, asked.get("dtype", "bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(
        asked["model"],
        dtype=dtype,
        attn_implementation=asked.get("attention"),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    lora = {"r": 16, "lora_alpha": 16} | asked.get("lora", {})
    train(
        asked,
        model,
        tokenizer,
        LoraConfig(**lora, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def train(asked: dict[str, Any], model: Any, tokenizer: Any, lora: LoraConfig | None) -> None:
    set_seed(asked["seed"])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=asked["output"],
            per_device_train_batch_size=asked["rows"],
            max_steps=asked["steps"],
            learning_rate=asked["learning_rate"],
            lr_scheduler_type="linear",
            max_grad_norm=0.3,
            seed=asked["seed"],
            logging_steps=1,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            **asked.get("config", {}),
        ),
        train_dataset=Dataset.from_json(asked["train"]),
        processing_class=tokenizer,
        peft_config=lora,
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(asked["output"])
    history = trainer.state.log_history
    print(
        json.dumps(
            {
                "losses": [entry["loss"] for entry in history if "loss" in entry],
                "tokens": max(entry["num_tokens"] for entry in history if "num_tokens" in entry),
                "seconds": clock.seconds,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "gpu": clock.gpu,
            }
        )
    )


if __name__ == "__main__":
    main()
