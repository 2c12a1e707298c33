"""An adapter's weights as files: read into a model, and written in PEFT's own layout with the prompt contract."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from core.errors import BadRequest, GraftError
from core.ml import contract as contracts
from core.ml.catalogue import BaseModel
from core.ml.prompts import Contract
from core.ml.training import ranks
from core.ml.training.config import Spec, lora_of
from core.ml.training.files.checkpoints import WEIGHTS


def check_start(spec: Spec, folder: Path) -> None:
    """Whether the adapter to continue from is of the kind that the spec asks for.

    Raises:
        BadRequest: `adapter_mismatch`.
    """
    try:
        given = lora_of(json.loads((folder / "adapter_config.json").read_text())).model_dump()
    except ValueError as error:
        raise _mismatch(f"cannot be trained on: {error}") from error
    asked = spec.lora.model_dump()
    # The modules are compared by their tensors; what is dropped out in training is no part of an adapter.
    for name in ("r", "alpha", "use_rslora", "use_dora"):
        if given[name] != asked[name]:
            raise _mismatch(f"has lora.{name} {given[name]}, and the job asks for {asked[name]}")


def read(model: PeftModel, folder: Path, what: str, *, param: str | None = None) -> None:
    """Put the weights of a folder into the model's adapter; `what` they are is said where they do not fit.

    Raises:
        BadRequest: `adapter_mismatch`, they are not exactly the tensors of this model's adapter.
    """
    stored = load_file(folder / WEIGHTS)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = {name: tensor.shape for name, tensor in _weights(model).items()}
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise BadRequest(
            "adapter_mismatch",
            f"{what} does not fit the model: {len(wrong)} tensors are missing, too many or of another shape, "
            f"{wrong[0]} for one.",
            param=param,
            hint="It belongs to another base model, or to other lora settings.",
        )
    if _parts(model) is None:
        set_peft_model_state_dict(model, stored)
        return
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if (
                isinstance(tensor, DTensor)
                and (given := stored.get(name.replace(".default.", "."))) is not None
            ):
                tensor.copy_(distribute_tensor(given.to(tensor), tensor.device_mesh, tensor.placements))


def _parts(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """The trained tensors of a model that several processes share, each put together; None of any other model.

    Every rank has to ask: each gives its part.
    """
    shared = {name: tensor for name, tensor in model.named_parameters() if isinstance(tensor, DTensor)}
    if not shared:
        return None
    return {name: tensor.full_tensor().cpu() for name, tensor in shared.items() if tensor.requires_grad}


def _weights(model: PeftModel) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=_parts(model))
    return made


def write(model: PeftModel, folder: Path) -> None:
    """The adapter's weights in PEFT's layout, from the first rank; every rank has to come."""
    model.save_pretrained(
        str(folder), state_dict=_parts(model), safe_serialization=True, is_main_process=ranks.is_first()
    )


def _mismatch(what: str) -> BadRequest:
    return BadRequest(
        "adapter_mismatch",
        f"The adapter to continue from {what}.",
        param="continue_from",
        hint="Give the job the adapter's own lora settings and base model, or continue from another adapter.",
    )


def save(
    model: PeftModel, contract: Contract, base: BaseModel, spec: Spec, folder: Path, first: Path | None = None
) -> None:
    """Write the adapter's folder, if this is the first rank; every rank has to come. `first` holds the weights that training began with, where lora_B was not zero.

    What PiSSA moved out of the base model's weights is subtracted: the files are an ordinary LoRA of twice the
    rank for the base model as it is.

    Raises:
        GraftError: `inert_adapter`, the training changed nothing; `training_diverged`, a weight is no number.
    """
    _check(_weights(model), None if first is None else load_file(first / WEIGHTS))
    pissa = spec.lora.init == "pissa"
    model.save_pretrained(
        str(folder),
        state_dict=_parts(model),
        is_main_process=ranks.is_first(),
        safe_serialization=True,
        path_initial_model_for_weight_conversion=str(first) if pissa else None,
    )
    if not ranks.is_first():
        return
    describe(contract, base, folder)


def describe(contract: Contract, base: BaseModel, folder: Path) -> None:
    """Write beside the weights what another program needs to serve them: their configuration and the prompt contract."""
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    # The name, not a path of this machine; and a set's order differs from run to run. The library spells
    # "all-linear" out with every layer's path: the last names are the same modules, and every program knows them.
    config["base_model_name_or_path"] = base.name
    config["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in config["target_modules"]})
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    contracts.save(contract, folder)


def _check(weights: dict[str, Any], first: dict[str, Any] | None) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise GraftError(
            "training_diverged",
            "The trained adapter holds weights that are no finite numbers.",
            status=422,
            hint="Lower training.learning_rate.",
        )
    if first is None:
        changed = any(bool(tensor.abs().sum() > 0) for name, tensor in weights.items() if "lora_B" in name)
    else:
        changed = any(not torch.equal(tensor.cpu(), first[name]) for name, tensor in weights.items())
    if not changed:
        raise GraftError(
            "inert_adapter",
            "The trained adapter changes nothing: "
            + ("every lora_B is zero." if first is None else "its weights are those it began with."),
            status=422,
            hint="Raise training.learning_rate or the number of steps.",
        )
