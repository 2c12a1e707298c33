"""Graft's trainer on rows of plain text, measured. What bench.gpu runs beside bench.plain_trl.

    python -m bench.graft_run '{"model": …, "train": …, "output": …, "steps": …, "rows": …, …}'

Prints one line of JSON: {losses, tokens, seconds, peak_bytes, gpu, planned_bytes, batch, checkpointing}.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from bench import device
from core.ml import catalogue
from core.ml.formats.validate import Reading
from core.ml.training import config, sft
from core.ml.training.run import Run, Source

NAME = "bench/model"


def main() -> None:
    print(json.dumps(run(json.loads(sys.argv[1]))))


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """`rows` and `checkpointing` may be "auto": then the plan decides, and what it chose is told."""
    folder = Path(asked["model"])
    models = catalogue.Catalogue(folder.with_name(f"{folder.name}-made"), {NAME: str(folder)})
    settled = Run(
        catalogue.find(models, NAME),
        spec(asked),
        Source(Path(asked["train"]), Reading("jsonl", False, "text", {"text": "{text}"})),
        None,
        None,
        Path(asked["output"]),
    )
    measured: dict[str, Any] = {"losses": [], "seconds": []}
    tokens = [0.0]

    def report(kind: str, /, **data: Any) -> None:
        if kind == "plan":
            training = data["spec"]["training"]
            measured["planned_bytes"] = data["memory_bytes"]
            measured["batch"] = training["batch_size"]
            measured["checkpointing"] = training["gradient_checkpointing"]
        elif (kind, data.get("phase")) == ("phase", "training"):
            device.reset()
        elif kind == "metrics" and "loss" in data["values"]:
            values = data["values"]
            tokens.append(values["tokens"])
            measured["losses"].append(values["loss"])
            measured["seconds"].append((tokens[-1] - tokens[-2]) / values["tokens_per_second"])
            measured["gpu"] = device.taken()  # before what comes after the last step

    sft.train(settled, report, lambda: False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return measured | {"tokens": tokens[-1], "peak_bytes": peak}


def spec(asked: dict[str, Any]) -> config.Spec:
    training = {
        "max_steps": asked["steps"],
        "batch_size": asked["rows"],
        "effective_batch_size": asked["step_rows"],
        "learning_rate": asked["learning_rate"],
        "warmup_ratio": 0,
        "optimizer": "paged_adamw_32bit" if torch.cuda.is_available() else "adamw",
        "max_length": asked["length"],
        "packing": asked["packing"],
        "gradient_checkpointing": asked["checkpointing"],
    }
    return config.settle(
        config.Spec.model_validate(
            {
                "seed": asked["seed"],
                "lora": {"r": asked["r"], "alpha": asked["alpha"]},
                "checkpoints": {"every_steps": 1_000_000},
                "training": training,
            }
        )
    )


if __name__ == "__main__":
    main()
