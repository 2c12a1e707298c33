"""An export from an adapter's files to the finished folder, and the report of how near it is to the adapter."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.errors import GraftError
from core.ml import base_model
from core.ml import contract as contracts
from core.ml.export import merge, parity
from core.ml.export.gguf import convert, ollama, vocabulary
from core.ml.export.parity import Look
from core.ml.export.run import Export
from core.ml.prompts import Contract, Encoded
from core.ml.training.loop.reporter import Report, alive

# Rounding to bfloat16 moves a distribution by about a thousandth of a nat; what is wrong, by far more.
MAX_MEAN_KL = 0.02
MIN_TOP1 = 0.95
# Loaded again the same numbers are multiplied, by another library's order at most.
_SAME = 0.05


@dataclass(frozen=True)
class Result:
    """`folder` holds the finished files; None when `stop` ended the export before its end."""

    folder: Path | None
    report: dict[str, Any]


def export(run: Export, report: Report, stop: Callable[[], bool]) -> Result:
    """Merge, compare, write, load again and compare again.

    Raises:
        GraftError: `adapter_mismatch`, `contract_broken`, `gguf_not_supported`, `export_broken`; `storage_full`, the disk
            has less room than the files will take.
    """
    report("phase", phase="preparing")
    with alive(report):
        base_model.prepare(run.model)
    _check_room(run)
    contract = contracts.load(run.adapter)
    samples, source = parity.samples(contract, run.rows)
    report("phase", phase="loading_model")
    model = merge.with_adapter(run.model, run.adapter)
    if run.format == "gguf":
        convert.check(model.config)
    adapter = parity.look(model, contract, samples)
    if stop():
        return Result(None, {})
    report("phase", phase="merging")
    merged = merge.merged(model)
    del model
    found = parity.look(merged, contract, samples)
    folder = run.work / "export"
    folder.mkdir()
    facts: dict[str, Any] = {
        "dtype": str(merged.dtype).removeprefix("torch."),
        "rows": source,
        "merged": parity.compare(adapter, found),
    }
    if stop():
        return Result(None, {})
    report("phase", phase="saving")
    facts |= _write(run, merged, contract, folder)
    del merged
    gc.collect()
    if stop():
        return Result(None, {})
    report("phase", phase="evaluating")
    facts["loaded_again"] = _loaded_again(run, contract, samples, found, folder)
    if run.quantization.bits != 16 and not stop():
        facts["quantized"] = _as_trained(run, contract, samples, found)
    judged = _judged(facts)
    if judged["degraded"]:
        message = f"The export is degraded. {' '.join(judged['reasons'])}"
        report("note", type="export_degraded", level="warning", message=message, data=judged)
    return Result(folder, judged)


def _check_room(run: Export) -> None:
    """The files, and the archive that is made of them."""
    weights = sum(file.stat().st_size for file in run.model.path.glob("*.safetensors"))
    need, free = int(2.1 * weights), shutil.disk_usage(run.work).free
    if free < need:
        raise GraftError(
            "storage_full",
            f"This export needs {need / 1e9:.1f} GB of free disk space in the worker's scratch folder, "
            f"which has {free / 1e9:.1f} GB.",
            status=507,
            hint="Free disk space there, then ask for the export again.",
        )


def _write(run: Export, merged: Any, contract: Contract, folder: Path) -> dict[str, Any]:
    if run.format == "merged":
        merge.save(merged, contract, folder)
        return {}
    file = folder / f"{_file_name(run.model.name)}-{_TYPE_NAMES[merged.dtype]}.gguf"
    convert.write(merged, contract, run.name, file)
    starts = vocabulary.adds_start(contract)
    text, template = ollama.modelfile(contract, file.name, adds_start=starts)
    (folder / "Modelfile").write_text(text)
    return {"modelfile": template}


_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def _file_name(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-._" else "-" for sign in name.rsplit("/", 1)[-1])


def _loaded_again(
    run: Export, contract: Contract, samples: list[Encoded], expected: Look, folder: Path
) -> dict[str, Any]:
    """Proof that the files hold what was merged."""
    facts: dict[str, Any] = {}
    if run.format == "gguf":
        file = next(folder.glob("*.gguf"))
        model = convert.load(file)
        facts["tokens_equal"] = convert.reads_the_same(file, contract, samples)
    else:
        model = base_model.load_plain(folder)
        facts["tokens_equal"] = contracts.load(folder).template_sha256 == contract.template_sha256
    facts["largest_difference"] = round(
        parity.largest_difference(expected, parity.look(model, contract, samples, answers=False)), 6
    )
    if facts["largest_difference"] > _SAME or not facts["tokens_equal"]:
        raise GraftError(
            "export_broken",
            f"The written files, loaded again, are not the merged model: {facts}.",
            hint="Please report this with the name of the base model.",
        )
    return facts


def _as_trained(run: Export, contract: Contract, samples: list[Encoded], merged: Look) -> dict[str, Any]:
    """How the merged model differs from the adapter on the quantised base that it was trained on: information."""
    precision = base_model.settle(run.quantization)
    base = base_model.load(run.model, precision)
    base_model.unfuse(base)  # or peft computes a DoRA adapter's norms from packed weights
    model = merge.with_adapter(run.model, run.adapter, base)
    return {"precision": precision.slug} | parity.compare(parity.look(model, contract, samples), merged)


def _judged(facts: dict[str, Any]) -> dict[str, Any]:
    """The report, with `degraded` and the `reasons` for it."""
    reasons = []
    merged, modelfile = facts["merged"], facts.get("modelfile")
    if merged["mean_kl"] > MAX_MEAN_KL or merged["top1_agreement"] < MIN_TOP1:
        reasons.append(
            f"The merged model differs from base and adapter: mean KL {merged['mean_kl']} "
            f"(at most {MAX_MEAN_KL}), same first choice {merged['top1_agreement']:.1%} (at least {MIN_TOP1:.0%})."
        )
    if modelfile and modelfile.get("tokens_equal", 0) < modelfile.get("samples", 0):
        reasons.append(
            f"Ollama's template gives the tokens of training in {modelfile['tokens_equal']} of "
            f"{modelfile['samples']} sample conversations."
        )
    return facts | {"degraded": bool(reasons), "reasons": reasons}
