"""What a device, a precision, a model or the rows cannot do, refused before anything is loaded, with the reason. No torch."""

from collections.abc import Iterable

from core.errors import BadRequest
from core.ml.training.config import Optimizer, Spec

# Transformers' names of the optimizers.
LIBRARY_NAMES = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
# Half of what an adapter to continue from may have.
_PISSA_R, _PISSA_ALPHA = 128, 512
_NAMED = 10


def check(spec: Spec) -> None:
    """Raises BadRequest: `pissa_needs_16_bit`, `pissa_is_a_beginning`, `pissa_rank_too_large`, `dora_not_with_8_bit`, `dora_not_with_pissa`."""
    bits, lora = spec.quantization.bits, spec.lora
    if lora.init == "pissa" and bits != 16:
        raise BadRequest(
            "pissa_needs_16_bit",
            "PiSSA takes the largest components out of the base model's weights, and what is left of a "
            f"{bits}-bit weight does not fit into {bits} bits again.",
            param="lora.init",
            hint='Set quantization.bits to 16, or lora.init to "default".',
        )
    if lora.init == "pissa" and spec.continue_from is not None:
        raise BadRequest(
            "pissa_is_a_beginning",
            "PiSSA makes the first weights of an adapter, and continue_from takes those of another one.",
            param="lora.init",
            hint='Set lora.init to "default", or leave continue_from out.',
        )
    if lora.init == "pissa" and (lora.r > _PISSA_R or lora.alpha > _PISSA_ALPHA):
        raise BadRequest(
            "pissa_rank_too_large",
            f"PiSSA's adapter is saved with twice its rank and alpha: r {lora.r} is more than {_PISSA_R}, or alpha "
            f"{lora.alpha} more than {_PISSA_ALPHA}.",
            param="lora.r" if lora.r > _PISSA_R else "lora.alpha",
            hint='Use a smaller one, or lora.init "default".',
        )
    if lora.use_dora and bits == 8:
        raise BadRequest(
            "dora_not_with_8_bit",
            "DoRA reads the base model's weights at every step, which an 8-bit model does not keep readable.",
            param="lora.use_dora",
            hint="Set quantization.bits to 4 or 16, or lora.use_dora to false.",
        )
    if lora.use_dora and lora.init == "pissa":
        raise BadRequest(
            "dora_not_with_pissa",
            "DoRA and PiSSA cannot be joined: the result would be no ordinary adapter.",
            param="lora.init",
            hint='Use either use_dora or init "pissa".',
        )


def check_kinds(loss_on: str, *, trained_texts: bool, valid_texts: bool) -> None:
    """Whether training and validation rows are trained alike: "auto" trains other tokens of texts than of conversations.

    Raises:
        BadRequest: `validation_of_other_kind`.
    """
    if loss_on != "auto" or trained_texts == valid_texts:
        return
    kinds = ["plain texts" if texts else "conversations" for texts in (trained_texts, valid_texts)]
    raise BadRequest(
        "validation_of_other_kind",
        f"The training rows are {kinds[0]} and the validation rows {kinds[1]}, of which other tokens count.",
        param="validation.dataset_id",
        hint='Give validation rows of the same kind, or set training.loss_on to "all".',
    )


def check_modules(names: str | list[str], there: Iterable[str]) -> None:
    """Whether each of the names that are to be adapted is the end of a module's that is `there`: peft passes over those that
    no module has, as long as there is one that has.

    Raises:
        BadRequest: `unknown_target_modules`.
    """
    every = list(there)
    missing = [
        name
        for name in ([] if isinstance(names, str) else names)
        if not any(module == name or module.endswith(f".{name}") for module in every)
    ]
    if missing:
        raise unknown_modules(f"The model has no linear layer named {' or '.join(missing[:_NAMED])}.", every)


def unknown_modules(message: str, there: Iterable[str]) -> BadRequest:
    names = sorted({name.rpartition(".")[2] for name in there} - {"lm_head"})
    hint = f'Use "all-linear" or some of: {", ".join(names)}.'
    return BadRequest("unknown_target_modules", message, param="lora.target_modules", hint=hint)


def check_sharded(spec: Spec) -> None:
    """What cannot be done where several processes share the model (FSDP).

    Raises:
        BadRequest: `not_with_fsdp`.
    """
    refused = {
        "quantization.bits": spec.quantization.bits == 8,
        "lora.use_dora": spec.lora.use_dora,
        "lora.init": spec.lora.init == "pissa",
        "training.optimizer": spec.training.optimizer not in ("auto", "adamw"),
    }
    for param, is_refused in refused.items():
        if is_refused:
            raise BadRequest(
                "not_with_fsdp",
                f"This worker's processes share each model (GRAFT_TRAINER_SHARDING is fsdp), and {param} as it "
                "is given cannot be used then.",
                param=param,
                hint=f"Leave {param} at its default, or have the worker run with GRAFT_TRAINER_SHARDING=ddp.",
            )


def optimizer(spec: Spec, *, cuda: bool, sharded: bool = False) -> Optimizer:
    """The optimizer of a run on this kind of device.

    Raises:
        BadRequest: `optimizer_needs_gpu`.
    """
    asked = spec.training.optimizer
    if asked == "auto":
        return "paged_adamw_8bit" if cuda and not sharded else "adamw"
    if asked.startswith("paged") and not cuda:
        raise BadRequest(
            "optimizer_needs_gpu",
            f"{asked} moves its state between a GPU's memory and the host's, and this worker has no GPU.",
            param="training.optimizer",
            hint='Use "adamw", or "adamw_8bit" for the same state in a quarter of the memory.',
        )
    return asked
