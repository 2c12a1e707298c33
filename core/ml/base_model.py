"""Base models in memory: prepare the files, load them quantised, attach adapters. The only loader."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from core.errors import NotFound
from core.ml import catalogue, memory
from core.ml.catalogue import BaseModel
from core.ml.quantization import Quantization

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Precision:
    """How the base model is held: 4-bit blocks, 8-bit rows or plain, and the type of its arithmetic.

    `sharded`: 4-bit blocks lie in numbers of that type, as FSDP divides no others among its processes.
    """

    bits: Literal[4, 8, 16]
    type: Literal["nf4", "fp4"]
    double_quant: bool
    dtype: Literal["bfloat16", "float16", "float32"]
    sharded: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def slug(self) -> str:
        if self.bits == 8:
            return f"int8-{self.dtype}"
        parts = [self.type, "dq" * self.double_quant, self.dtype, "sharded" * self.sharded]
        return "-".join(part for part in parts if part)


def device() -> torch.device:
    """This process's device: of several that train together each has its own GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(device())
    return f"CPU, {torch.get_num_threads()} threads"


def free_bytes() -> int:
    """Memory that is free: on the GPU, or in this machine as far as its container may use it."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device())[0])
    return memory.free_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the device or of the memory beside it says that memory is short."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in said or "out of memory" in said or "CUBLAS_STATUS_ALLOC_FAILED" in said
    )


def settle(quantization: Quantization) -> Precision:
    """The precision on this machine: bfloat16 where the processor has it, float16 on older GPUs."""
    dtype = quantization.compute_dtype
    if dtype == "auto":
        if torch.cuda.is_available():
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    return Precision(quantization.bits, quantization.type, quantization.double_quant, dtype)


def prepare(model: BaseModel) -> None:
    """Bring the model's files to `model.path`, once: fetch them, or dequantise the packaged GGUF.

    Raises:
        NotFound: `model_not_found` or `model_not_installed`.
    """
    if model.ready:
        return
    if model.source == "folder":
        raise NotFound(
            "model_not_found",
            f"The folder of base model {model.name} has no config.json.",
            hint="GRAFT_MODELS must name a folder in the layout of transformers.",
        )
    with _one_at_a_time(model.path):
        _fetch(model)


def _fetch(model: BaseModel) -> None:
    if model.ready:  # another process was first
        return
    if model.source == "hub":
        catalogue.download(model)
    else:
        with _appearing(model.path) as part:
            _convert_gguf(catalogue.packaged_file(model), part)


def load(model: BaseModel, precision: Precision) -> Any:
    """The causal language model, frozen precision applied, on the best device there is.

    A quantised model is made once and read from the cache ever after, which is four times as fast
    and gives the same weights bit for bit.
    """
    prepare(model)
    options: dict[str, Any] = {
        "dtype": precision.torch_dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "device_map": {"": device().index} if device().type == "cuda" else None,
    }
    if precision.bits == 16:
        return AutoModelForCausalLM.from_pretrained(model.path, **options)
    cache = model.cache / f"{precision.slug}-{_fingerprint(model.path)}"
    with _one_at_a_time(cache):
        return _quantised(model, precision, cache, options)


def is_fused(model: Any) -> bool:
    """Whether 4-bit weights of it are, or will be, packed for bitsandbytes' fused CPU kernel. It packs them at the first
    evaluation, has no gradient, and whoever dequantises packed weights (peft, for DoRA) gets wrong ones."""
    return any(
        isinstance(layer, Linear4bit)
        and layer.support_avx512bf16_for_cpu
        and layer.weight.device.type == "cpu"
        for layer in model.modules()
    )


def unfuse(model: Any) -> None:
    """Keep a model that was not evaluated yet from that kernel."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def load_plain(folder: Path) -> Any:
    """The model as its files hold it, on the CPU: what adapters are merged into."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=False
    )


def _quantised(model: BaseModel, precision: Precision, cache: Path, options: dict[str, Any]) -> Any:
    if (cache / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(cache, **options)
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=precision.bits == 4,
        load_in_8bit=precision.bits == 8,
        bnb_4bit_quant_type=precision.type,
        bnb_4bit_use_double_quant=precision.double_quant,
        bnb_4bit_compute_dtype=precision.torch_dtype,
        bnb_4bit_quant_storage=precision.torch_dtype if precision.sharded else None,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model.path, **options)
    with _appearing(cache) as part:
        loaded.save_pretrained(part)
    return loaded


def _convert_gguf(file: Path, target: Path) -> None:
    """Dequantise a GGUF file into a folder in the layout of transformers, bfloat16 safetensors."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = packed.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    plain = type(packed)(config).to(torch.bfloat16)
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = GenerationConfig.from_model_config(config)
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    # The GGUF's own name is a training run's, and a "_name_or_path" is no business of the files.
    settings = json.loads((target / "config.json").read_text())
    settings.pop("_model_name_or_path", None)
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _fingerprint(folder: Path) -> str:
    """Other weights under the same name must not meet the cache of the old ones."""
    files = sorted(folder.glob("*.safetensors"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(folder.resolve()), facts)).encode()).hexdigest()[:12]


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """Worker, trainers and engine share these folders; only one of them makes one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        yield


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write into that appears under its name whole, or not at all."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
