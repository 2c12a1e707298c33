"""The pieces of a run put together: base model with a fresh adapter, and trl's trainer around it."""

from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from core.errors import BadRequest
from core.ml import base_model
from core.ml.base_model import Precision
from core.ml.prompts import Contract
from core.ml.training import plan
from core.ml.training.config import Spec
from core.ml.training.data import Rows
from core.ml.training.plan import DeviceChoices

# trl scores only the positions with a label on a GPU, but every position on a CPU, where nine of ten
# cost time and change nothing. This is its switch between the two; a test holds both to one result.
trl.trainer.utils._use_triton = lambda _device: True


def device_choices(precision: Precision) -> DeviceChoices:
    return DeviceChoices(precision.dtype, gradient_checkpointing=base_model.device().type == "cuda")


def with_adapter(model: Any, spec: Spec) -> PeftModel:
    """The model with a fresh LoRA in float32: in bfloat16 small updates would be lost."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The fused CPU kernel repacks the weights at the first evaluation and has no gradient:
            # training after it would go on with wrong gradients, silently.
            module.support_avx512bf16_for_cpu = False
    set_seed(spec.seed)
    lora = spec.lora
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                use_rslora=lora.use_rslora,
            ),
        )
    except ValueError as error:
        names = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
            }
        )
        raise BadRequest(
            "unknown_target_modules",
            f"LoRA cannot be put on {lora.target_modules}: {error}",
            param="lora.target_modules",
            hint=f'Use "all-linear" or some of: {", ".join(names)}.',
        ) from error
    assert isinstance(adapted, PeftModel)  # noqa: S101 - for the type checker
    return adapted


def trainer_of(
    model: PeftModel, spec: Spec, precision: Precision, contract: Contract, rows: Rows, output: Path
) -> SFTTrainer:
    """trl's trainer for a resolved spec; its checkpoints go to `output`."""
    training = spec.training
    assert isinstance(training.batch_size, int)  # noqa: S101
    on_cpu = base_model.device().type == "cpu"
    every = spec.evaluation.every_steps if rows.valid_count else None
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            seed=spec.seed,
            data_seed=spec.seed,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            bf16=precision.dtype == "bfloat16",
            fp16=precision.dtype == "float16",
            max_steps=training.max_steps or -1,
            num_train_epochs=training.epochs or 1,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.batch_size,
            gradient_accumulation_steps=training.effective_batch_size // training.batch_size,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.scheduler,
            warmup_steps=int(plan.total_steps(spec, len(rows.train)) * training.warmup_ratio),
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            neftune_noise_alpha=training.neftune_alpha,
            gradient_checkpointing=bool(training.gradient_checkpointing),
            optim="adamw_torch",
            eval_strategy="steps" if every else "no",
            eval_steps=every,
            prediction_loss_only=True,
            save_strategy="steps",
            save_steps=spec.checkpoints.every_steps,
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows.train_examples),
        eval_dataset=Dataset.from_list(rows.valid_examples) if rows.valid_count else None,
        processing_class=contract.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # the reporter tells what happens; stdout may be gone
    # trl casts the LoRA of a quantised base to bfloat16; see with_adapter.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer
