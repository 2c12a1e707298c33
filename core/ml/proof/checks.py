"""Checks of the saved files. One of severity "fail" ends the job with its code, one of "warn" marks the adapter.

base_model          fail  adapter_mismatch    the files name the base model of the job
keys                fail  adapter_incomplete  every target module has its tensors, and there are no others
finite              fail  adapter_incomplete  every weight is a number
not_zero            fail  inert_adapter       some module changes something: B times A is not zero
prompt_contract     fail  contract_broken     the saved tokenizer and template write the tokens of training
logits              fail  inert_adapter       the logits are not the base's
check_loss          fail  adapter_differs     the loss on 16 rows is that of training, within 1 % or what half
                                              precision rounds over so few tokens
eval_loss           fail  adapter_differs     so is that on all validation rows, where there are few enough of them
stop_rate           warn                      4 of 5 answers end by themselves
metrics             warn                      each metric of the job says something of some validation row

What fails says that the files are not what was trained, or do nothing: nobody could want them. Whether answers
stop is a matter of the data and the length of the training, for people to judge.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from core.errors import GraftError
from core.ml import contract as contracts
from core.ml import prompts
from core.ml.catalogue import BaseModel
from core.ml.prompts import Contract
from core.ml.proof import loading
from core.ml.proof.evaluate import STOPS, Evaluation
from core.ml.proof.questions import Question
from core.ml.training.data import CHECKED_ROWS

_TOLERANCE = 0.01
# In half precision two layouts of the same rows differ by about so many nats a token, up and down: 0.9667 to 0.9816 was
# measured over the same 52 tokens. Three standard deviations of their mean are no fault.
_ROUNDING = 3 * 0.1
_HINTS = {
    "adapter_incomplete": "Retry the job; if it happens again, look for faults of the disk.",
    "adapter_differs": "Retry the job; if it happens again, tell the makers: what was saved is not what was trained.",
    "adapter_mismatch": "Retry the job.",
    "contract_broken": "Retry the job; if it happens again, use another base model.",
    "inert_adapter": "Raise training.learning_rate or the number of steps.",
}


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    severity: Literal["fail", "warn"]
    value: Any
    expected: Any
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _held(name: str, code: str, ok: bool, value: Any, expected: Any, detail: str) -> Check:
    """A check whose failure ends the job."""
    if not ok:
        raise GraftError(code, f"The adapter failed its check {name}: {detail}", hint=_HINTS[code])
    return Check(name, ok, "fail", value, expected, detail)


def base_model(folder: Path, model: BaseModel) -> Check:
    named = loading.config_of(folder).get("base_model_name_or_path")
    return _held(
        "base_model", "adapter_mismatch", named == model.name, named, model.name, f"The files name {named}."
    )


def weights(folder: Path, model: PeftModel) -> list[Check]:
    """The checks of the tensors in the file, against what the loaded model has a place for."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
        finite = all(bool(torch.isfinite(file.get_tensor(key)).all()) for key in stored)
    placed = set(get_peft_model_state_dict(model, save_embedding_layers=False))  # "auto" asks the hub
    targets = loading.config_of(folder).get("target_modules") or []
    bare = [] if isinstance(targets, str) else _without(targets, placed)
    missing, left_over = sorted(placed - stored), sorted(stored - placed)
    detail = f"{len(stored)} tensors for {len(placed)} places."
    if missing:
        detail = f"{len(missing)} tensors are missing, {missing[0]} for one."
    elif left_over:
        detail = f"{len(left_over)} tensors have no place, {left_over[0]} for one."
    elif bare:
        detail = f"The target module {bare[0]} has no tensors."
    whole = not (missing or left_over or bare)
    changed, modules = _changed(model)
    return [
        _held("keys", "adapter_incomplete", whole, len(stored), len(placed), detail),
        _held(
            "finite",
            "adapter_incomplete",
            finite,
            finite,
            True,
            f"The weights are {'' if finite else 'not '}all finite numbers.",
        ),
        _held(
            "not_zero",
            "inert_adapter",
            changed > 0,
            changed,
            modules,
            f"{changed} of {modules} modules change something.",
        ),
    ]


def _without(targets: list[str], placed: set[str]) -> list[str]:
    modules = {key.rpartition(".lora_")[0] for key in placed}
    return [
        target for target in targets if not any(f".{module}".endswith(f".{target}") for module in modules)
    ]


def _changed(model: PeftModel) -> tuple[int, int]:
    """Modules whose B times A is not zero, and all that have an adapter; DoRA's lengths count as a change."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and layer.lora_A]
    changed = 0
    for layer in layers:
        (name,) = layer.lora_A.keys()
        product = layer.lora_B[name].weight.detach().float() @ layer.lora_A[name].weight.detach().float()
        changed += bool(product.any()) or layer.use_dora.get(name, False)
    return changed, len(layers)


def prompt_contract(folder: Path, trained: Contract, asked: list[Question]) -> Check:
    """The contract in the folder, read anew, against the one that training used.

    Raises:
        GraftError: `contract_broken`.
    """
    saved = contracts.load(folder)
    texts = [question.row.prompt for question in asked] or ["Say hello."]
    same = sum(_ids(saved, text) == _ids(trained, text) for text in texts)
    ends = set(saved.stop_token_ids) == set(trained.stop_token_ids)
    return _held(
        "prompt_contract",
        "contract_broken",
        same == len(texts) and ends,
        same,
        len(texts),
        f"{same} of {len(texts)} prompts have the tokens of training"
        + (", and answers end with the same." if ends else ", but answers end with others."),
    )


def _ids(contract: Contract, text: str) -> list[int]:
    return prompts.encode_prompt(contract, [{"role": "user", "content": text}])


def logits(found: Evaluation) -> Check:
    """Whether base and adapter say different things of the first rows: other losses come of other logits alone."""
    most = float(np.abs(found.adapter.losses.sums - found.base.losses.sums).max())
    return _held(
        "logits",
        "inert_adapter",
        most > 0,
        most,
        "> 0",
        f"The loss of a row is up to {most:.3g} from the base's.",
    )


def losses(found: Evaluation, trained: Mapping[str, float], *, half: bool) -> list[Check]:
    """The losses that training measured, against those of the files; both in `half` precision or both in single."""
    every = found.adapter.losses
    measured = {
        "check_loss": (found.check_loss, every.of(slice(CHECKED_ROWS))),
        "eval_loss": (found.eval_loss, every),
    }
    made = []
    for name, (value, rows) in measured.items():
        expected = trained.get(name)
        if value is None or expected is None:
            continue
        rounding = _ROUNDING / math.sqrt(max(rows.counts.sum(), 1)) if half else 0.0
        near = abs(value - expected) <= max(_TOLERANCE * abs(expected), rounding)
        detail = f"The saved files have a loss of {value:.4f}, and the trained model had {expected:.4f}."
        made.append(_held(name, "adapter_differs", near, value, expected, detail))
    return made


def stop_rate(found: Evaluation) -> list[Check]:
    rate = found.stop_rate
    if rate is None:
        return []
    detail = f"{rate:.0%} of {len(found.adapter.answers)} answers end by themselves."
    return [Check("stop_rate", rate >= STOPS, "warn", rate, f">= {STOPS}", detail)]


def metrics(found: Evaluation) -> list[Check]:
    if not found.unscored:
        return []
    names = ", ".join(found.unscored)
    detail = (
        f"No validation row can be scored by {names}: its expected answer is of another kind, or too long."
    )
    return [Check("metrics", False, "warn", list(found.unscored), [], detail)]
