"""A training job as a script or a configuration for another tool: TRL, axolotl or LLaMA-Factory. No torch.

What the tool cannot express, or does differently, is said in a comment at the top.
"""

import json
import shlex
from typing import Any

from core.ml.export.scripts import configurations, notes
from core.ml.export.scripts import trl as trl_script
from core.ml.export.scripts.recipe import DATA_FILE, VALID_FILE, Data, Plan, Tool
from core.ml.training.config import Spec
from core.ml.training.spec import support

# What stands for "auto" where the job was never planned, because it has not started.
_AUTO_LENGTH = 2048


def write(tool: Tool, job_id: str, model: str, spec: dict[str, Any], data: Data) -> str:
    """The text of the script. `spec` is a training job's row, whether it ran already or not."""
    plan = _plan(job_id, model, spec)
    head = _head(plan, data, notes.of(tool, plan, data))
    if tool == "trl":
        return trl_script.text(head, _trl(plan))
    lines = (
        configurations.axolotl(plan, data) if tool == "axolotl" else configurations.llamafactory(plan, data)
    )
    return f"{head}\n{configurations.text(lines)}"


def _plan(job_id: str, model: str, kept: dict[str, Any]) -> Plan:
    validation = kept.get("validation") or {}
    spec = Spec.model_validate({name: value for name, value in kept.items() if name != "validation"})
    training, every = spec.training, spec.evaluation.every_steps
    size, save, dtype = training.batch_size, spec.checkpoints.every_steps, spec.quantization.compute_dtype
    return Plan(
        job_id,
        model,
        spec,
        validation.get("fraction"),
        validation.get("dataset_id"),
        batch_size=1 if size == "auto" else size,
        max_length=_AUTO_LENGTH if training.max_length == "auto" else training.max_length,
        optimizer=support.LIBRARY_NAMES["adamw" if training.optimizer == "auto" else training.optimizer],
        dtype="bfloat16" if dtype == "auto" else dtype,
        packing=training.packing is True,
        checkpointing=training.gradient_checkpointing is not False,
        eval_steps=every if isinstance(every, int) and validation else None,
        save_steps=save if isinstance(save, int) else None,
    )


def _head(plan: Plan, data: Data, said: list[str]) -> str:
    """The comment at the top: how the data is had, and what is otherwise. Nothing that people wrote ends a line of it."""
    rows = "a data set that is deleted" if data.filename is None else json.dumps(data.filename)
    lines = [f"Job {plan.job_id} of Graft: {json.dumps(plan.model)} on {rows}."]
    commands = []
    if data.filename is None:
        lines.append(f"Graft has its rows no more: {DATA_FILE} must come from somewhere else.")
    else:
        commands.append(_command(plan, data.dataset_id, DATA_FILE))
    if plan.valid_id is not None:
        commands.append(_command(plan, plan.valid_id, VALID_FILE))
    if commands:
        lines += ["The data, as Graft trains it:", *(f"  {command}" for command in commands)]
    lines += ["What is otherwise than in Graft:", *(f"- {note}" for note in said)]
    return "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)


def _command(plan: Plan, dataset_id: str, file: str) -> str:
    words = ["--model", plan.model, "--loss-on", plan.spec.training.loss_on, "-o", file]
    return shlex.join(["graft", "data", "conversations", dataset_id, *words])


def _trl(plan: Plan) -> trl_script.Settings:
    spec, training, lora = plan.spec, plan.spec.training, plan.spec.lora
    bits = spec.quantization.bits
    quantized: dict[str, Any] | None = {"load_in_8bit": True} if bits == 8 else None
    if bits == 4:
        quantized = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": spec.quantization.type,
            "bnb_4bit_use_double_quant": spec.quantization.double_quant,
            "bnb_4bit_compute_dtype": plan.dtype,
        }
    second_set = plan.valid_id is not None
    evaluated = plan.fraction is not None or second_set
    return trl_script.Settings(
        model=plan.model,
        dtype=plan.dtype,
        quantization=quantized,
        lora={
            "task_type": "CAUSAL_LM",
            "r": lora.r,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": lora.target_modules,
            "use_rslora": lora.use_rslora,
            "use_dora": lora.use_dora,
            "init_lora_weights": True if lora.init == "default" else lora.init,
        },
        start="start" if spec.continue_from else None,
        fraction=plan.fraction,
        second_set=second_set,
        loss_on_all=training.loss_on == "all",
        overlength=training.overlength,
        training={
            "seed": spec.seed,
            "max_steps": training.max_steps or -1,
            "num_train_epochs": training.epochs or 3.0,
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
            "neftune_noise_alpha": training.neftune_alpha,
            "max_length": plan.max_length,
            "packing": plan.packing,
            "gradient_checkpointing": plan.checkpointing,
            "bf16": plan.dtype == "bfloat16",
            "fp16": plan.dtype == "float16",
            "eval_strategy": "steps" if plan.eval_steps else "epoch" if evaluated else "no",
            "eval_steps": plan.eval_steps,
            "save_strategy": "steps" if plan.save_steps else "no",
            "save_steps": plan.save_steps or 500,
            "save_total_limit": spec.checkpoints.keep,
            "logging_steps": 1,
            "report_to": "none",
        },
    )
