"""What a job may say about its training: typed, bounded, unknown fields refused. No torch.

Defaults are those of the QLoRA paper's successors: NF4 with double quantisation, all linear layers,
r 16, learning rate 2e-4, gradient clipping at 0.3 (Dettmers and others, arXiv 2305.14314). The preset
`default_qlora` spells them out. A field's description is the reason of its bounds: it is the hint of the error.
"""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from core.ml.quantization import Part, Quantization
from core.ml.scores.choice import Metric

Auto = Literal["auto"]

_MODULE = re.compile(r"[A-Za-z0-9_]{1,64}")


Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Text = Annotated[str, StringConstraints(min_length=1, max_length=8000)]


class Lora(Part):
    """`init`: how A and B begin; "default" is Kaiming-uniform A and zero B, "pissa" the base weight's principal
    components (Meng and others, arXiv 2404.02948)."""

    r: int = Field(
        16,
        ge=1,
        le=256,
        description="Rank of the two matrices: 8 to 64 is usual, more costs memory and hardly helps.",
    )
    alpha: int | float = Field(
        16, ge=1, le=1024, description="What is learnt is scaled by alpha / r, with use_rslora by alpha / √r."
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of its inputs that the adapter does not see: at 1 it would see nothing.",
    )
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(max_length=200)] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["default", "gaussian", "pissa"] = "default"

    @field_validator("target_modules")
    @classmethod
    def _names(cls, value: str | list[str]) -> str | list[str]:
        # peft reads a plain string as a regular expression, which can run for ever: only names pass.
        if isinstance(value, list) and not (value and all(_MODULE.fullmatch(name) for name in value)):
            raise ValueError('must be "all-linear" or a list of module names such as ["q_proj", "v_proj"]')
        if "lm_head" in value:
            raise ValueError("lm_head cannot be adapted: the loss is computed from its weights directly")
        return value if isinstance(value, str) else list(dict.fromkeys(value))


class Training(Part):
    """`epochs` or `max_steps`, not both. Overlong rows are refused, dropped or cut in their prompt, never silently."""

    epochs: float | None = Field(
        None, gt=0, le=100, description="Passes over the rows: after a few of them rows are learnt by heart."
    )
    max_steps: int | None = Field(None, ge=1, le=1_000_000, description="Optimizer steps, instead of epochs.")
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        "auto", description="Rows at a time: memory grows with them, and not what is learnt of a step."
    )
    effective_batch_size: int = Field(
        8,
        ge=1,
        le=4096,
        description="Rows of one optimizer step: 8 to 128 is usual, more rows mean fewer steps.",
    )
    learning_rate: float = Field(
        2e-4,
        gt=0,
        le=1,
        description="1e-5 to 2e-3 is usual for LoRA: far above, the weights jump instead of learning.",
    )
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rate rises: at 1 it would never fall.",
    )
    optimizer: Auto | Optimizer = "auto"
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A step takes this share of the learning rate off each weight: 0 to 0.1 is usual.",
    )
    max_grad_norm: float = Field(
        0.3, gt=0, le=100, description="Longer gradients are shortened to this: at 0 nothing would be learnt."
    )
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Noise on the embeddings: 5 to 15 is usual, far above it drowns the text.",
    )
    max_length: Auto | Annotated[int, Field(ge=8, le=131_072)] = Field(
        "auto", description="Tokens of a row at most: less than 8 hold no prompt with its answer."
    )
    overlength: Literal["error", "drop", "truncate"] = "error"
    loss_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    packing: Auto | bool = "auto"
    gradient_checkpointing: Auto | bool = "auto"

    @model_validator(mode="after")
    def _length_of_run(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both")
        if isinstance(self.batch_size, int) and self.effective_batch_size % self.batch_size:
            raise ValueError(
                f"effective_batch_size ({self.effective_batch_size}) must be a multiple of "
                f"batch_size ({self.batch_size})"
            )
        return self


class EarlyStopping(Part):
    """Stop when the validation loss has not fallen by `min_delta` in `patience` evaluations running."""

    patience: int = Field(3, ge=1, le=1000, description="Evaluations without a better loss that are borne.")
    min_delta: float = Field(
        0.0, ge=0, le=100, description="A loss is better when it is lower by more than this."
    )


class Evaluation(Part):
    """`every_steps`: evaluate while training, with "auto" four times an epoch; without it only at the end.

    `metrics` of answers are taken on the first `rows` validation rows; `prompts` (user turns) are answered at
    every evaluation, by default those of the first validation rows.
    """

    every_steps: Auto | Annotated[int, Field(ge=1)] | None = None
    metrics: Auto | list[Metric] = "auto"
    rows: int = Field(
        64,
        ge=1,
        le=2000,
        description="Each row is answered by base and adapter, token after token: many take hours.",
    )
    prompts: list[Text] = Field(
        [], max_length=16, description="All of them are answered at every evaluation."
    )
    early_stopping: EarlyStopping | None = None

    @field_validator("metrics")
    @classmethod
    def _once(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ValueError("a metric is named more than once")
        return value

    @model_validator(mode="after")
    def _evaluated(self) -> Self:
        if self.early_stopping is not None and self.every_steps is None:
            raise ValueError("early_stopping needs evaluation.every_steps")
        return self

    @property
    def needs_validation(self) -> str | None:
        """The setting, if any, that means nothing without validation rows."""
        if self.early_stopping is not None:
            return "early_stopping"
        if isinstance(self.every_steps, int):
            return "every_steps"
        return "metrics" if isinstance(self.metrics, list) and self.metrics else None


class Checkpoints(Part):
    every_steps: Auto | Annotated[int, Field(ge=1)] = "auto"
    keep: int = Field(2, ge=1, le=100, description="So many of the last ones; the best one is kept besides.")


class Limits(Part):
    """`max_seconds` of training; then it stops after the step, and the best so far is kept."""

    max_seconds: int | None = Field(None, ge=1, le=31_536_000, description="From a second to a year.")


class Spec(Part):
    """The part of a job that the trainer reads; kept in the job's row as JSON.

    `continue_from`: the id of an adapter whose weights the training begins with.
    """

    seed: int = Field(42, ge=0, lt=2**31, description="A whole number that every library takes.")
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    limits: Limits = Limits()
    continue_from: Annotated[str, StringConstraints(max_length=64)] | None = None


def settle(spec: Spec) -> Spec:
    """Fill in every "auto" that needs neither the data nor the device."""
    training = spec.training
    changes: dict[str, Any] = {}
    if training.epochs is None and training.max_steps is None:
        changes["epochs"] = 3.0
    return spec.model_copy(update={"training": training.model_copy(update=changes)})


def steps(training: Training, epoch: int) -> int:
    """Optimizer steps of a run, of which a pass over the rows takes `epoch`."""
    return training.max_steps or math.ceil((training.epochs or 1) * epoch)


# The settings of a LoRA in peft's names and in ours, and what peft writes beside them that changes no training.
_SETTINGS = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
_BESIDE = {
    "peft_type",
    "peft_version",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
} | {
    "auto_mapping",
    "fan_in_fan_out",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "init_lora_weights",
    "bias",
}


def lora_of(adapter_config: Any) -> Lora:
    """The settings of an adapter to continue from, by its `adapter_config.json`.

    Raises:
        ValueError: it is of a kind that is not trained here; says what it has.
    """
    if not isinstance(adapter_config, dict) or adapter_config.get("peft_type") != "LORA":
        raise ValueError("its adapter_config.json is not that of a LoRA")
    if (begun := adapter_config.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        raise ValueError(f"it began with init_lora_weights {begun}, which changed the base model's weights")
    if (bias := adapter_config.get("bias", "none")) != "none":
        raise ValueError(f"it trains biases ({bias})")
    for name, value in sorted(adapter_config.items()):
        if value and name not in _SETTINGS and name not in _BESIDE:
            raise ValueError(f"it has {name}, which is not trained here")
    said = {ours: adapter_config[name] for name, ours in _SETTINGS.items() if name in adapter_config}
    try:
        return Lora.model_validate(said)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"its {problem['loc'][0]} is out of bounds: {problem['msg']}") from error
