"""Training runs of the tiny model, called directly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.ml.catalogue import BaseModel
from core.ml.formats.validate import Reading
from core.ml.training import config, sft
from core.ml.training.run import Run, Source

ROWS = [
    {"prompt": f"name {n % 9} of table {n}", "completion": f"SELECT {n % 5}" + " and the" * (n % 4)}
    for n in range(40)
]

Reports = list[tuple[str, dict[str, Any]]]
MakeRun = Callable[..., Run]


def source(rows: list[dict[str, str]], file: Path) -> Source:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(file, Reading("jsonl", False, "prompt_completion", None))


def maker(model: BaseModel, folder: Path) -> MakeRun:
    """make(name, fraction=…, resume=…, **spec): a run in a folder of its own, 6 steps of 4 rows."""
    rows = source(ROWS, folder / "rows.jsonl")

    def make(name: str = "work", fraction: float | None = None, **given: Any) -> Run:
        work = folder / name
        work.mkdir()
        outside = {key: given.pop(key) for key in ("resume", "best", "start", "recoveries") if key in given}
        training = {
            "max_steps": 6,
            "effective_batch_size": 4,
            "learning_rate": 0.01,
            **given.pop("training", {}),
        }
        settled = config.settle(config.Spec.model_validate({"training": training, **given}))
        return Run(model, settled, rows, None, fraction, work, **outside)

    return make


def train(run: Run, stop: Callable[[], bool] = lambda: False) -> tuple[sft.Result, Reports]:
    reports: Reports = []
    result = sft.train(run, lambda kind, /, **data: reports.append((kind, data)), stop)
    return result, reports


def adapter(result: sft.Result) -> bytes:
    assert result.adapter is not None
    return (result.adapter / "adapter_model.safetensors").read_bytes()


def series(reports: Reports, name: str) -> dict[int, float]:
    """A metric by its steps."""
    return {
        data["step"]: data["values"][name]
        for kind, data in reports
        if kind == "metrics" and name in data["values"]
    }


def losses(reports: Reports) -> list[float]:
    return list(series(reports, "loss").values())


def notes(reports: Reports, kind: str) -> list[dict[str, Any]]:
    return [data for name, data in reports if name == "note" and data["type"] == kind]


def saved(reports: Reports) -> dict[int, Path]:
    """The checkpoints of a run by their steps."""
    return {data["step"]: Path(data["folder"]) for kind, data in reports if kind == "checkpoint"}
