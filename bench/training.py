"""How fast is a training step? Graft's trainer beside a plain TRL script of TRL's defaults, in one run.

    python -m bench.training FOLDER [--steps 12] [--rows 8] [--rounds 1]

FOLDER is the data set sql_create_context. Both train the service's base model in processes of their own: the same rows
in the same order, the same hyperparameters, NF4 with double quantisation, bfloat16 where the processor has units for it
and float32 elsewhere. The losses of every step and the
loss of the saved adapters on held-back rows, read by one evaluator, are compared: else it would not be the same work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from core import settings
from core.ml import base_model
from core.ml.quantization import Quantization
from examples.demo import MAPPING, SYSTEM

GRAFT = """
import json, resource, sys, time
from pathlib import Path
from core.ml import catalogue
from core.ml.formats.validate import Reading
from core.ml.training import config, sft
from core.ml.training.run import Run, Source

asked = json.loads(sys.argv[1])
told = []
spec = config.settle(config.Spec.model_validate({
    "seed": asked["seed"], "lora": {"r": 16, "alpha": 16}, "checkpoints": {"every_steps": 100000},
    "training": {"max_steps": asked["steps"], "effective_batch_size": asked["rows"], "warmup_ratio": 0,
                 "learning_rate": asked["learning_rate"], "scheduler": "linear", "max_grad_norm": 0.3}}))
source = Source(Path(asked["data"]), Reading("jsonl", False, "mapping", asked["mapping"]))
result = sft.train(
    Run(catalogue.find(catalogue.Catalogue(Path(asked["models"]), {}), asked["name"]), spec, source, None, None,
        Path(asked["output"])),
    lambda kind, /, **data: told.append((kind, data)), lambda: False)
steps = [data["values"] for kind, data in told if kind == "metrics" and "loss" in data["values"]]
tokens = [0.0, *(step["tokens"] for step in steps)]
print(json.dumps({
    "losses": [step["loss"] for step in steps], "tokens": tokens[-1],
    "seconds": [(now - before) / step["tokens_per_second"] for before, now, step in zip(tokens, tokens[1:], steps)],
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""

EVALUATE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
asked = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(asked["model"])
for folder in asked["adapters"]:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32), folder).eval()
    total = count = 0
    for row in map(json.loads, open(asked["rows"])):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[len(prompt):]), reduction="sum").item()
        count += len(ids) - len(prompt)
    print(total / count)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.folder, options.steps, options.rows, options.rounds)


def compare(work: Path, data: Path, steps: int, rows: int, rounds: int) -> None:
    config = settings.load()
    asked: dict[str, Any] = {
        "name": config.default_model,
        "models": str(config.models_folder),
        "model": str(config.models_folder / config.default_model.replace("/", "--")),
        "seed": 42,
        "steps": steps,
        "rows": rows,
        "learning_rate": 2e-4,
        "mapping": MAPPING,
        "dtype": (dtype := base_model.settle(Quantization()).dtype),
        "config": {"bf16": dtype == "bfloat16"},
    }
    print(f"in {dtype}")
    # As many rows for both: the order of a seed depends on their number.
    lines = (data / "train.jsonl").read_text().splitlines()[: steps * rows * 2]
    asked["data"] = str(written(work / "rows.jsonl", [json.loads(line) for line in lines]))
    asked["train"] = str(written(work / "pairs.jsonl", [pair(json.loads(line)) for line in lines]))
    held_back = (data / "valid.jsonl").read_text().splitlines()[:48]
    asked["valid"] = str(written(work / "valid.jsonl", [pair(json.loads(line)) for line in held_back]))
    ratios = []
    for turn in range(rounds):
        plain = called(["-m", "bench.plain_trl"], asked | {"output": str(work / f"plain-{turn}")})
        graft = called(["-c", GRAFT], asked | {"output": str(work / f"graft-{turn}")})
        ratios.append(show(plain, graft))
    adapters = [str(work / f"plain-{rounds - 1}"), str(work / f"graft-{rounds - 1}" / "adapter")]
    told = run(["-c", EVALUATE], {"model": asked["model"], "rows": asked["valid"], "adapters": adapters})
    theirs, ours = map(float, told.split())
    print(
        f"loss of the saved adapters on {len(held_back)} held-back rows: plain {theirs:.4f}, Graft {ours:.4f}",
        end="",
    )
    print(f" ({100 * (ours / theirs - 1):+.2f} %)")
    print(f"median ratio of tokens per second: {statistics.median(ratios):.2f}")


def show(plain: dict[str, Any], graft: dict[str, Any]) -> float:
    """Print one round; Graft's tokens per second over the plain script's."""
    speeds = []
    for name, told in (("plain TRL", plain), ("Graft", graft)):
        speeds.append(told["tokens"] / sum(told["seconds"]))
        print(
            f"{name}: {speeds[-1]:.0f} tokens/s ({told['tokens']:.0f} tokens in {sum(told['seconds']):.1f} s), "
            f"peak {told['peak_bytes'] / 1e9:.2f} GB"
        )
    apart = [abs(ours / theirs - 1) for ours, theirs in zip(graft["losses"], plain["losses"], strict=True)]
    print(
        f"losses of the steps: at most {100 * max(apart):.2f} % apart, {100 * statistics.mean(apart):.2f} % on average"
    )
    return speeds[1] / speeds[0]


def pair(row: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM.format(context=row["context"])},
            {"role": "user", "content": row["question"]},
        ],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def called(command: list[str], asked: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(run(command, asked).splitlines()[-1])
    return told


def run(command: list[str], asked: dict[str, Any]) -> str:
    Path(asked.get("output", ".")).mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *command, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


if __name__ == "__main__":
    main()
