"""The same work with Unsloth, where it is installed: its own kernels under the trainer of bench.plain_trl.

    python -m bench.unsloth_run '{…}'

Takes and prints what bench.plain_trl does.
"""

import json
import sys

from unsloth import FastLanguageModel  # before the libraries that it changes

import torch  # isort: skip

from bench import plain_trl  # isort: skip

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    asked = json.loads(sys.argv[1])
    length = asked["config"]["max_length"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=asked["model"], max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **asked["lora"],
        target_modules=LINEAR,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth"
        if asked["config"].get("gradient_checkpointing", True)
        else False,
        random_state=asked["seed"],
        max_seq_length=length,
    )
    plain_trl.train(asked, model, tokenizer, None)


if __name__ == "__main__":
    main()
