"""A training as the YAML that axolotl 0.19 and LLaMA-Factory 0.9.5 read. No torch."""

import json
from typing import Any

from core.ml.export.scripts.recipe import DATA_FILE, VALID_FILE, Data, Plan


def text(lines: dict[str, Any]) -> str:
    return "".join(f"{name}: {_yaml(value)}\n" for name, value in lines.items())


def axolotl(plan: Plan, data: Data) -> dict[str, Any]:
    spec, training, lora = plan.spec, plan.spec.training, plan.spec.lora
    bits = spec.quantization.bits
    lines: dict[str, Any] = {
        "base_model": plan.model,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "adapter": "qlora" if bits == 4 else "lora",
        "lora_r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "peft_use_rslora": lora.use_rslora,
        "peft_use_dora": lora.use_dora,
        "peft_init_lora_weights": True if lora.init == "default" else lora.init,
        "datasets": [_axolotl_set(DATA_FILE, data, training.loss_on)],
        "sequence_len": plan.max_length,
        "excess_length_strategy": {"error": "raise"}.get(training.overlength, training.overlength),
        "sample_packing": plan.packing,
        "micro_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler": training.scheduler,
        "optimizer": plan.optimizer,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": plan.checkpointing,
        "bf16": plan.dtype == "bfloat16",
        "fp16": plan.dtype == "float16",
        "seed": spec.seed,
        "save_total_limit": spec.checkpoints.keep,
        "logging_steps": 1,
        "output_dir": "./output",
    }
    if bits == 4:
        lines["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": spec.quantization.type,
            "bnb_4bit_use_double_quant": spec.quantization.double_quant,
        }
    lines |= (
        {"warmup_ratio": training.warmup_ratio}
        if plan.warmup_steps is None
        else {"warmup_steps": plan.warmup_steps}
    )
    every = lora.target_modules == "all-linear"
    lines |= {"lora_target_linear": True} if every else {"lora_target_modules": lora.target_modules}
    lines |= (
        {"max_steps": training.max_steps} if training.max_steps else {"num_epochs": training.epochs or 3.0}
    )
    optional = {
        "neftune_noise_alpha": training.neftune_alpha,
        "val_set_size": plan.fraction,
        "test_datasets": [_axolotl_set(VALID_FILE, data, training.loss_on)] if plan.valid_id else None,
        "eval_steps": plan.eval_steps,
        "save_steps": plan.save_steps,
        "lora_model_dir": "./start" if spec.continue_from else None,
    }
    return lines | {name: value for name, value in optional.items() if value is not None}


def _axolotl_set(file: str, data: Data, loss_on: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": file, "ds_type": "json", "split": "train"}
    if data.is_text:
        return entry | {"type": "completion", "field": "text"}
    entry |= {
        "type": "chat_template",
        "chat_template": "tokenizer_default",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "train_on_eos": "turn",
    }
    if loss_on == "all":
        return entry | {"roles_to_train": ["user", "assistant", "system", "tool"]}
    # The data file has weight 0 at each answer that is not trained, be it by its row or by loss_on.
    return entry | {"roles_to_train": ["assistant"], "message_field_training": "weight"}


def llamafactory(plan: Plan, data: Data) -> dict[str, Any]:
    spec, training, lora = plan.spec, plan.spec.training, plan.spec.lora
    targets = "all" if lora.target_modules == "all-linear" else ",".join(lora.target_modules)
    lines: dict[str, Any] = {
        "model_name_or_path": plan.model,
        "stage": "pt" if data.is_text else "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target": targets,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "pissa_init": lora.init == "pissa",
        "dataset_dir": ".",
        "dataset": "data",
        "cutoff_len": plan.max_length,
        "packing": plan.packing,
        # It stops at any of these three where the rows are texts without turns.
        "neat_packing": plan.packing and not data.is_text,
        "train_on_prompt": training.loss_on == "all" and not data.is_text,
        "mask_history": training.loss_on == "completion" and not data.is_text,
        "per_device_train_batch_size": plan.batch_size,
        "per_device_eval_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        # A share of the steps, where it is below 1.
        "warmup_steps": training.warmup_ratio if plan.warmup_steps is None else plan.warmup_steps,
        "optim": plan.optimizer,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "disable_gradient_checkpointing": not plan.checkpointing,
        "bf16": plan.dtype == "bfloat16",
        "fp16": plan.dtype == "float16",
        "seed": spec.seed,
        "save_total_limit": spec.checkpoints.keep,
        "logging_steps": 1,
        "output_dir": "./output",
    }
    if spec.quantization.bits != 16:
        lines["quantization_method"] = "bnb"
        lines["quantization_bit"] = spec.quantization.bits
    if spec.quantization.bits == 4:
        lines["quantization_type"] = spec.quantization.type
        lines["double_quantization"] = spec.quantization.double_quant
    lines |= (
        {"max_steps": training.max_steps}
        if training.max_steps
        else {"num_train_epochs": training.epochs or 3.0}
    )
    evaluated = "steps" if plan.eval_steps else None
    optional = {
        "neftune_noise_alpha": training.neftune_alpha,
        "val_size": plan.fraction,
        "eval_dataset": "valid" if plan.valid_id else None,
        "eval_strategy": evaluated,
        "eval_steps": plan.eval_steps,
        "save_steps": plan.save_steps,
        "adapter_name_or_path": "./start" if spec.continue_from else None,
    }
    return lines | {name: value for name, value in optional.items() if value is not None}


def dataset_info(plan: Plan, data: Data) -> dict[str, Any]:
    """The entries of LLaMA-Factory's dataset_info.json."""
    form: dict[str, Any] = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    if data.is_text:
        form = {"columns": {"prompt": "text"}}
    files = {"data": DATA_FILE} | ({"valid": VALID_FILE} if plan.valid_id else {})
    return {name: {"file_name": file} | form for name, file in files.items()}


def _yaml(value: Any) -> str:
    """JSON, which is YAML but for one thing: YAML 1.1 takes 1e-05 for a text."""
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text
