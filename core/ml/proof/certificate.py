"""The proof of an adapter, from its saved files: what holds of them, what they are worth, what they were made of."""

import json
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from core.hashes import describe, sha256
from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.inference.greedy import Tick
from core.ml.proof import card, checks, loading, questions
from core.ml.proof.evaluate import Evaluation, evaluate, perplexity
from core.ml.training import data, plan, split
from core.ml.training.config import Spec
from core.ml.training.data import Rows
from core.ml.training.run import Run, Source

CERTIFICATE_FILE = "certificate.json"
_VERSION = 1
_LIBRARIES = (
    "graft", "torch", "transformers", "tokenizers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "numpy"
)  # fmt: skip
# What people may change before they pass an adapter on.
_UNSEALED = (CERTIFICATE_FILE, card.CARD_FILE)


class Proof(NamedTuple):
    certificate: dict[str, Any]
    metrics: dict[str, float]


def prove(
    run: Run,
    folder: Path,
    facts: Mapping[str, Any],
    tick: Tick,
    alive: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Proof:
    """Load what lies in `folder`, check it, compare it with its base, and write certificate.json and README.md into it.

    `facts`: `metrics` of the training (`check_loss`, `eval_loss`, `base_eval_loss`), and where known `job_id`, the `step`
    whose weights were saved, the
    resolved `spec` that the trainer reported, the names `dataset` and `validation` of the data sets. Hashes and
    rows are taken from the run's own files. `tick` is called every now and then, and `alive` is put around what is long
    and silent.

    Raises:
        GraftError: a check failed that no adapter may fail, with its code.
    """
    contract = contracts.load(run.model.path)
    if settled := facts.get("spec"):
        run = replace(run, spec=_spec_of(settled))
    with alive():
        rows = data.rows_of(run, contract, context=catalogue.context(run.model))
    precision = base_model.settle(run.spec.quantization)
    spec = plan.resolved(run.spec, rows)
    held = [checks.base_model(folder, run.model)]
    sample = questions.training(run, rows, contract, data.CHECKED_ROWS)
    held.append(checks.prompt_contract(folder, contract, list(sample.values())))
    tick()
    with alive():
        model = loading.load(run.model, precision, folder)
    held += checks.weights(folder, model)
    tick()
    found = evaluate(model, contract, run, spec, rows, tick, step=facts.get("step"))
    trained = facts["metrics"]
    held += [
        checks.logits(found),
        *checks.losses(found, trained, half=precision.dtype != "float32"),
        *checks.stop_rate(found),
        *checks.metrics(found),
    ]
    certificate = {
        "version": _VERSION,
        "ok": all(check.ok for check in held),
        "job_id": facts.get("job_id"),
        "base_model": run.model.name,
        "checks": [check.as_dict() for check in held],
        "evaluation": found.as_dict(),
        "hashes": _hashes(run, rows, folder),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _LIBRARIES},
        "seed": spec.seed,
        "step": facts.get("step"),
        "spec": facts.get("spec") or spec.model_dump(),
    }
    described = {
        name: _described(source, facts.get(name), count)
        for name, source, count in (
            ("dataset", run.train, len(rows.train)),
            ("validation", run.valid, rows.valid_count),
        )
        if source is not None
    }
    if run.valid is None and rows.valid_count:
        described["dataset"]["held_back"] = rows.valid_count
    (folder / CERTIFICATE_FILE).write_text(json.dumps(certificate, indent=2, ensure_ascii=False) + "\n")
    (folder / card.CARD_FILE).write_text(card.written(certificate, described, contracts.load(folder)))
    return Proof(certificate, _metrics(found, trained))


def _spec_of(kept: Mapping[str, Any]) -> Spec:
    """A spec as a job keeps it."""
    return Spec.model_validate({name: value for name, value in kept.items() if name != "validation"})


def _hashes(run: Run, rows: Rows, folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {"dataset": sha256(run.train.path)}
    if run.valid is not None:
        made["validation"] = sha256(run.valid.path)
    elif rows.held_back:
        made["held_back"] = split.fingerprint([rows.data.prompt_keys[place] for place in rows.held_back])
    if run.earlier:
        made["earlier"] = [asdict(one) for one in run.earlier]
    base = {
        info["path"]: info["sha256"]
        for info in describe(run.model.path)
        if not info["path"].startswith(".")  # the hub's own notes
    }
    files = {info["path"]: info["sha256"] for info in describe(folder) if info["path"] not in _UNSEALED}
    return made | {"base": base, "files": files}


def _described(source: Source, name: str | None, rows: int) -> dict[str, Any]:
    return {"name": name, "rows": rows, "sha256": sha256(source.path)}


def _metrics(found: Evaluation, trained: Mapping[str, float]) -> dict[str, float]:
    """What the job's metrics get: the losses of all validation rows where training measured both, else of these rows."""
    made: dict[str, float] = {}
    if found.kept:
        pair = [trained.get("eval_loss"), trained.get("base_eval_loss")]
        if None in pair:
            pair = [side.losses.of(found.kept).mean for side in (found.adapter, found.base)]
        for prefix, loss in zip(("", "base_"), pair, strict=True):
            assert loss is not None
            made |= {f"{prefix}eval_loss": loss, f"{prefix}eval_perplexity": perplexity(loss)}
    for scored in found.scores:
        made |= {scored.name: scored.adapter, f"base_{scored.name}": scored.base}
    if found.stop_rate is not None:
        made["stop_rate"] = found.stop_rate
    return made
