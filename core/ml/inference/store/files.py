"""Adapters' files: looked at, checked against the base model's layers, and read."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from core.errors import Conflict, NotFound
from core.ml import base_model
from core.ml.base_model import Precision
from core.ml.inference.batch.lora import Adapter, Pair

_PREFIX = "base_model.model."
_KINDS = ("lora_A", "lora_B")
# What peft can do and the batch cannot, and what leaves the base model as it was: such adapters are served by peft itself,
# one request at a time.
_APART = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
# What both read, and what changes nothing once an adapter is trained.
_HARMLESS = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
)
# The rest of what peft knows: it computes otherwise, or leaves the base model changed (layer_replication, KaSA). Keys that
# peft does not know, of other trainers, mean nothing to it.
_UNSERVED = {one.name for one in fields(LoraConfig)} - {*_APART, *_HARMLESS, "bias"}
# How A and B may have begun: the other ways begin by taking something out of the base model's weights.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# The batch adds nothing to what stands before the first layer and after the last.
_ENDS = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Source:
    """An adapter's folder as it was looked at. `digest`: sha256 of weights and configuration; `apart`: the batch cannot
    serve it, peft can; `unfused`: for which peft reads the base's weights, as they are without the fused kernel; `bytes`: in
    memory, as float32."""

    name: str
    base: str
    folder: Path
    digest: str
    apart: bool
    unfused: bool
    bytes: int


def look(name: str, base: str, folder: Path, layers: Mapping[str, tuple[int, int]]) -> Source:
    """Check everything of an adapter but its numbers. `layers`: (outputs, inputs) of the base model's linear layers.

    Raises:
        FileNotFoundError: a file is missing.
        Conflict: `adapter_mismatch`, its tensors or its base model do not fit.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    trained_on = config.get("base_model_name_or_path")
    if trained_on != base:
        raise Conflict("adapter_mismatch", f"Adapter {name} was trained on {trained_on}, not on {base}.")
    if config.get("peft_type") != "LORA":
        raise Conflict(
            "adapter_mismatch", f"Adapter {name} is of the kind {config.get('peft_type')}, not LORA."
        )
    if config.get("init_lora_weights", True) not in _BEGINNINGS:
        raise Conflict(
            "adapter_mismatch",
            f"Adapter {name} belongs to a base model that {config['init_lora_weights']} has changed.",
            hint="Where peft can (not for LoftQ), save it with path_initial_model_for_weight_conversion, or serve it merged.",
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise Conflict("adapter_mismatch", f"The configuration of adapter {name} has no lora_alpha.")
    unserved = [key for key in _UNSERVED if config.get(key)]
    if config.get("bias", "none") != "none":
        unserved.append("bias")  # peft writes them into the base model
    if unserved:
        raise Conflict(
            "adapter_mismatch",
            f"Adapter {name} was trained with {' and '.join(sorted(unserved))}, which the engine does not serve.",
            hint="Merge it into its base model with peft, and serve that.",
        )
    shapes = _shapes(name, folder)
    apart = not layers or any(config.get(kind) for kind in _APART)
    apart |= any(_place(key)[0].endswith(_ENDS) for key in shapes)
    if not apart:
        _check(name, base, shapes, layers)
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * torch.float32.itemsize
    return Source(name, base, folder, _digest_of(folder), apart, bool(config.get("use_dora")), size)


def read(source: Source, device: torch.device, dtype: torch.dtype) -> Adapter:
    """An adapter that was looked at, in memory; its scale is multiplied into B.

    Raises:
        NotFound: `adapter_missing`, its files are gone by now.
        Conflict: `adapter_inert`, it changes nothing.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        settings = (source.folder / "adapter_config.json").read_bytes()
        weights = (source.folder / "adapter_model.safetensors").read_bytes()
        if _digest([hashlib.sha256(data).digest() for data in (weights, settings)]) != source.digest:
            raise _others(source)
        config = json.loads(settings)
        # `safe_open` keeps 2 KB for ever of each file that tensors were taken from.
        for key, tensor in safetensors.torch.load(weights).items():
            layer, kind = _place(key)
            found.setdefault(layer, {})[kind] = tensor.to(device)
    except FileNotFoundError as error:
        raise gone(source) from error
    pairs = {}
    for layer, parts in found.items():
        a, b = parts["lora_A"].to(dtype), parts["lora_B"].to(torch.float32)
        scaled = (b * _scale(config, layer, len(a))).to(dtype)
        pairs[layer] = Pair(a.T.contiguous(), scaled.T.contiguous())
    if not any(bool(pair.b.any()) for pair in pairs.values()):
        raise inert(source)
    return Adapter(pairs)


def read_for(precision: Precision, source: Source) -> Adapter:
    """As it is added to a base model of this precision; raises as `read`."""
    # On a CPU float32 is faster than bfloat16 for so few rows.
    dtype = precision.torch_dtype if torch.cuda.is_available() else torch.float32
    return read(source, base_model.device(), dtype)


def see_unchanged(source: Source) -> None:
    """That its files are still those that were looked at.

    Raises:
        NotFound: `adapter_missing`, they are gone by now.
        Conflict: `adapter_mismatch`.
    """
    try:
        if _digest_of(source.folder) != source.digest:
            raise _others(source)
    except FileNotFoundError as error:
        raise gone(source) from error


def inert(source: Source) -> Conflict:
    return Conflict("adapter_inert", f"Adapter {source.name} changes nothing: every lora_B is zero.")


def _others(source: Source) -> Conflict:
    return Conflict("adapter_mismatch", f"The files of {source.name} are not those that were looked at.")


def gone(source: Source) -> NotFound:
    why = "it was deleted, or a newer checkpoint took its place"
    return NotFound("adapter_missing", f"The files of {source.name} are gone: {why}.")


def _digest_of(folder: Path) -> str:
    hashes = []
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        with (folder / file).open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").digest())
    return _digest(hashes)


def _digest(hashes: Sequence[bytes]) -> str:
    """Of the hashes of weights and configuration."""
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def _shapes(name: str, folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise Conflict(
            "adapter_mismatch", f"The weights of adapter {name} cannot be read: {error}."
        ) from error


def _check(
    name: str, base: str, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, tuple[int, int]]
) -> None:
    """Every tensor has a place and every place that has one tensor has both: an adapter that does nothing is an error."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        layer, kind = _place(key)
        if kind not in _KINDS or layer not in layers:
            raise _misfit(name, base, f"there is no place for its tensor {key}")
        found.setdefault(layer, {})[kind] = shape
    if not found:
        raise _misfit(name, base, "it has no tensors")
    for layer, parts in found.items():
        outputs, inputs = layers[layer]
        if len(parts) < len(_KINDS):
            raise _misfit(name, base, f"one of the two tensors of {layer} is missing")
        a, b = parts["lora_A"], parts["lora_B"]
        if a[1:] != (inputs,) or b != (outputs, *a[:1]):
            raise _misfit(name, base, f"{layer} takes {inputs} to {outputs}, its tensors are {a} and {b}")


def _misfit(name: str, base: str, why: str) -> Conflict:
    return Conflict("adapter_mismatch", f"Adapter {name} does not fit {base}: {why}.")


def _place(key: str) -> tuple[str, str]:
    """The layer and the kind of a tensor by its name."""
    layer, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
    return layer, kind


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """As peft: the first pattern that ends like the layer's name gives its alpha."""
    patterns = config.get("alpha_pattern") or {}
    found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = next(found, config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
