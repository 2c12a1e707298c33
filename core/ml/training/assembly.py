"""The pieces of a run put together: base model with a fresh adapter, and trl's trainer around it."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PrinterCallback, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_flash_attn_2_available
from trl import SFTConfig

from core.ml import base_model
from core.ml.base_model import Precision
from core.ml.catalogue import BaseModel
from core.ml.prompts import Contract
from core.ml.training import ranks
from core.ml.training.config import Spec
from core.ml.training.data import Rows
from core.ml.training.loop.trainer import Trainer
from core.ml.training.plan import Device, Plan
from core.ml.training.spec import support
from core.ml.training.speed import attention, documents, layers, packing, scoring

scoring.install()

# The fast SVD of 16 iterations: minutes less than the exact one for a model of billions, and as good.
_INITS = {"default": True, "gaussian": "gaussian", "pissa": "pissa_niter_16"}


def device(precision: Precision, processes: int = 1) -> Device:
    """This process's device, for the plan: the same for each of the processes that train together."""
    cuda = base_model.device().type == "cuda"
    return Device(
        precision.dtype,
        cuda,
        ranks.least(base_model.free_bytes()) // (1 if cuda else processes),
        packing=cuda and is_flash_attn_2_available(),
        processes=processes,
        sharded=precision.sharded,
    )


def loaded(model: BaseModel, precision: Precision, plan: Plan) -> PeftModel:
    """The base model with a fresh adapter, ready to be trained as planned.

    Raises:
        BadRequest: `unknown_target_modules`.
    """
    base = base_model.load(model, precision)
    if plan.kept:
        layers.keep_dequantised(base)
    if base_model.device().type == "cpu":
        documents.attend_one_by_one(base)
    adapted = with_adapter(base, plan.spec)
    if not precision.sharded:  # its products are of whole weights
        layers.fuse(adapted)
    return adapted


def with_adapter(model: Any, spec: Spec) -> PeftModel:
    """The model with a fresh LoRA in float32: in bfloat16 small updates would be lost."""
    # After an evaluation with the fused kernel training would go on with wrong gradients, silently.
    base_model.unfuse(model)
    set_seed(spec.seed)
    lora = spec.lora
    support.check_modules(lora.target_modules, _linear(model))
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
                use_dora=lora.use_dora,
                init_lora_weights=_INITS[lora.init],
            ),
        )
    except ValueError as error:
        message = f"LoRA cannot be put on {lora.target_modules}: {error}"
        raise support.unknown_modules(message, _linear(model)) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def _linear(model: Any) -> list[str]:
    """The names of the layers that can be adapted."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def trainer_of(
    model: PeftModel, plan: Plan, precision: Precision, contract: Contract, rows: Rows, output: Path
) -> Trainer:
    """trl's trainer for what was planned; its checkpoints go to `output`.

    Raises:
        BadRequest: `packing_mixes_documents`.
    """
    spec = plan.spec
    training = spec.training
    assert isinstance(training.batch_size, int)
    examples = rows.train_examples
    packed = training.packing is True
    if packed:
        assert isinstance(training.max_length, int)
        attention.prepare(model)
        examples = packing.packed(examples, training.max_length)
    on_cpu = base_model.device().type == "cpu"
    every = spec.evaluation.every_steps if rows.valid_count else None
    masters = {weights: weights.data.float() for weights in model.parameters() if weights.requires_grad}
    arguments = SFTConfig(
        output_dir=str(output),
        seed=spec.seed,
        data_seed=spec.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        bf16=precision.dtype == "bfloat16",
        fp16=precision.dtype == "float16",
        max_steps=plan.total_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.effective_batch_size // (training.batch_size * ranks.count()),
        ddp_find_unused_parameters=False,
        **_sharding(precision),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=int(plan.total_steps * training.warmup_ratio),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_alpha,
        gradient_checkpointing=bool(training.gradient_checkpointing),
        optim=support.LIBRARY_NAMES[training.optimizer],
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
        padding_free=packed or documents.attended_one_by_one(model),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if base_model.device().type == "cuda":
        # With all that are there the library would share out the batch among them, unasked.
        arguments._n_gpu = 1
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(ranks.evened(examples, training.batch_size)),
        eval_dataset=Dataset.from_list(valid)
        if (valid := ranks.evened(rows.valid_examples, training.batch_size))
        else None,
        processing_class=contract.tokenizer,
    )
    trainer.rows = len(examples)
    trainer.remove_callback(PrinterCallback)  # the reporter tells what happens; stdout may be gone
    # trl casts the LoRA of a quantised base to bfloat16; see with_adapter.
    for parameter, weights in masters.items():
        parameter.data = weights
    if precision.sharded:
        # accelerate's own would hand out the loss and add up the gradients in 16 bits.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=precision.torch_dtype, reduce_dtype=torch.float32, output_dtype=None
        )
    if ranks.count() > 1:
        torch.manual_seed(spec.seed + ranks.index())  # each rank drops out other inputs
    return trainer


def _sharding(precision: Precision) -> dict[str, Any]:
    """FSDP 2, with which the decoder layers are what is gathered at a time."""
    if not precision.sharded:
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            # Each rank reads the quantised weights by itself: from a meta device they cannot be made.
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "FULL_STATE_DICT",
        },
    }
