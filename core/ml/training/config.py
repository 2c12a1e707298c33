"""What a job may say about its training: typed, bounded, unknown fields refused. No torch.

Defaults are those of the QLoRA paper's successors: NF4 with double quantisation, all linear layers,
r 16, learning rate 2e-4, gradient clipping at 0.3 (Dettmers and others, arXiv 2305.14314).
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from core.ml.quantization import Part, Quantization

Auto = Literal["auto"]
Unit = Annotated[float, Field(ge=0, le=1)]

_MODULE = re.compile(r"[A-Za-z0-9_]{1,64}")


Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Metric = Literal["exact_match", "label_accuracy", "json_validity", "sql_execution", "rouge"]
Text = Annotated[str, StringConstraints(min_length=1, max_length=8000)]


class Lora(Part):
    """`init`: how A and B begin; "default" is Kaiming-uniform A and zero B, "pissa" the base weight's principal
    components (Meng and others, arXiv 2404.02948)."""

    r: int = Field(16, ge=1, le=256)
    alpha: int = Field(16, ge=1, le=1024)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
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
        return value


class Training(Part):
    """`epochs` or `max_steps`, not both. Overlong rows are refused, dropped or cut in their prompt, never silently."""

    epochs: float | None = Field(None, gt=0, le=100)
    max_steps: int | None = Field(None, ge=1, le=1_000_000)
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    effective_batch_size: int = Field(8, ge=1, le=4096)
    learning_rate: float = Field(2e-4, gt=0, le=1)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    optimizer: Auto | Optimizer = "auto"
    weight_decay: Unit = 0.0
    max_grad_norm: float = Field(0.3, gt=0, le=100)
    neftune_alpha: float | None = Field(None, gt=0, le=100)
    max_length: Auto | Annotated[int, Field(ge=8, le=131_072)] = "auto"
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

    patience: int = Field(3, ge=1, le=1000)
    min_delta: float = Field(0.0, ge=0, le=100)


class Evaluation(Part):
    """`every_steps`: evaluate while training; without it only at the end.

    `metrics` of answers are taken on the first `rows` validation rows; `prompts` (user turns) are answered at
    every evaluation, by default those of the first validation rows.
    """

    every_steps: int | None = Field(None, ge=1)
    metrics: Auto | list[Metric] = "auto"
    rows: int = Field(64, ge=1, le=2000)
    prompts: list[Text] = Field([], max_length=16)
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _evaluated(self) -> Self:
        if self.early_stopping is not None and self.every_steps is None:
            raise ValueError("early_stopping needs evaluation.every_steps")
        return self


class Checkpoints(Part):
    every_steps: Auto | Annotated[int, Field(ge=1)] = "auto"
    keep: int = Field(2, ge=1, le=100)


class Limits(Part):
    """`max_seconds` of training; then it stops after the step, and the best so far is kept."""

    max_seconds: int | None = Field(None, ge=1, le=31_536_000)


class Spec(Part):
    """The part of a job that the trainer reads; kept in the job's row as JSON.

    `continue_from`: the id of an adapter whose weights the training begins with.
    """

    seed: int = Field(42, ge=0, lt=2**31)
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
    if training.batch_size == "auto":
        effective = training.effective_batch_size
        changes["batch_size"] = max(n for n in range(1, 9) if effective % n == 0)
    return spec.model_copy(update={"training": training.model_copy(update=changes)})
