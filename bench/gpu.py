"""A model of seven billion weights on one GPU: memory and speed of Graft's trainer, of a plain TRL script, of Unsloth.

    python -m bench.gpu [--config llama-7b] [--folder FOLDER] [--cases qlora,packed] [--peers graft,trl] [--steps 8]

Needs no network: the weights are random (13 GB in FOLDER, or in a temporary folder that goes at the end), so are the
rows. NF4 with double quantisation, r 64 on all linear layers, paged AdamW in 32 bits, the same rows in the same order.
Each run has a process of its own. The first steps, in which kernels are chosen, count for the memory, not for the
speed. `--config tiny` does the same on a CPU in a minute.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from bench import random_model
from core.ml import base_model

LENGTH = 512
PAPER = "QLoRA paper, table 6 (arXiv 2305.14314), 7B, 512 tokens, batch 1, gradient checkpointing: 6.9 GB"
# The first one chooses kernels, the second one meets the optimizer's new state.
_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """`tokens` of a row as given; `rows` at a time and rows of a step, packed ones counted as they are fed.
    `rows` None: as each trainer does by itself, Graft by its plan and the others with the whole step at once."""

    tokens: int = LENGTH
    rows: int | None = 1
    step_rows: int = 1
    packing: bool = False
    checkpointing: bool = True


CASES = {
    "qlora": Case(),
    "kept": Case(checkpointing=False),
    "accumulated": Case(step_rows=16),
    "short": Case(tokens=LENGTH // 4),
    "packed": Case(tokens=LENGTH // 4, packing=True),
    "own": Case(rows=None, step_rows=16),
}
PEERS = {"trl": "bench.plain_trl", "graft": "bench.graft_run", "unsloth": "bench.unsloth_run"}
_COLUMNS = "{:12} {:8} {:>9} {:>6} {:>6} {:>10} {:>9} {:>7} {:>8} {:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=random_model.SHAPES, default="llama-7b")
    parser.add_argument("--folder", type=Path, help="where the model is kept for another call")
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"some of {', '.join(PEERS)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=240, help="that one run may take")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases.split(",")}
    peers = [name for name in options.peers.split(",") if name != "unsloth" or _unsloth()]
    with tempfile.TemporaryDirectory() as folder:
        keep = options.folder or Path(folder)
        model = random_model.write(keep / options.config, options.config)
        flash = "flash attention" if is_flash_attn_2_available() else "no flash attention"
        print(f"{base_model.device_name()}, torch {torch.__version__}, {flash}; {options.config}, r 64")
        print(PAPER)
        heads = "case|trainer|tokens/s|ratio|batch|allocated|reserved|device|planned|loss"
        print(_COLUMNS.format(*heads.split("|")) + "   (GB; of a CPU the process)", flush=True)
        for name, case in cases.items():
            told: dict[str, dict[str, Any]] = {}
            for peer in peers:
                with tempfile.TemporaryDirectory() as work:
                    found = run(peer, asked(case, peer, options.steps, model, Path(work)), options.seconds)
                print(line(name, peer, found, told.get("trl"), options.steps), flush=True)
                if "error" not in found:
                    told[peer] = found
            if {"trl", "graft"} <= told.keys() and not case.packing:
                print(f"{name}: losses of the steps at most {100 * apart(told):.2f} % apart", flush=True)


def _unsloth() -> bool:
    return importlib.util.find_spec("unsloth") is not None


def asked(case: Case, peer: str, steps: int, model: Path, work: Path) -> dict[str, Any]:
    """What a run is told on its command line; writes its rows."""
    # As many rows for all: the order of a seed depends on their number.
    count = steps * case.step_rows * (LENGTH // case.tokens if case.packing else 1)
    rows = random_model.write_rows(work / "rows.jsonl", count, case.tokens)
    told = {
        "model": str(model),
        "train": str(rows),
        "output": str(work / "output"),
        "seed": 42,
        "steps": steps,
        "learning_rate": 2e-4,
    }
    lora = {"r": 64, "lora_alpha": 16}
    if peer == "graft":
        return told | {
            "rows": case.rows or "auto",
            "step_rows": case.step_rows,
            "r": lora["r"],
            "alpha": lora["lora_alpha"],
            "length": LENGTH,
            "packing": case.packing,
            "checkpointing": case.checkpointing if case.rows else "auto",
        }
    rows_at_once = case.rows or case.step_rows
    config = {
        "gradient_accumulation_steps": case.step_rows // rows_at_once,
        "max_length": LENGTH,
        "packing": case.packing,
        "gradient_checkpointing": case.checkpointing,
        "optim": "paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch",
    }
    attention = "flash_attention_2" if case.packing and is_flash_attn_2_available() else None
    return told | {"rows": rows_at_once, "lora": lora, "config": config, "attention": attention}


def run(peer: str, asked: dict[str, Any], seconds: int) -> dict[str, Any]:
    """What the run prints, or its {error}."""
    Path(asked["output"]).mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-m", PEERS[peer], json.dumps(asked)],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {seconds} s"}
    if done.returncode:
        print(done.stderr[-1000:], file=sys.stderr)
        last = [said for said in done.stderr.splitlines() if said.strip()][-1:]
        return {"error": " ".join(last)[:200] or f"exit code {done.returncode}"}
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def speed(told: dict[str, Any]) -> float:
    """Tokens per second of the warm steps; all steps have as many tokens."""
    seconds = told["seconds"]
    warm = seconds[_WARM_UP:] or seconds[-1:]
    return float(told["tokens"]) / len(seconds) * len(warm) / sum(warm)


def line(case: str, peer: str, told: dict[str, Any], plain: dict[str, Any] | None, steps: int) -> str:
    if "error" in told:
        return f"{case:12} {peer:8} {told['error']}"
    if len(told["seconds"]) != steps:
        return f"{case:12} {peer:8} took {len(told['seconds'])} steps instead of {steps}"
    gpu = told["gpu"] or {"device": told["peak_bytes"]}
    sizes = [gpu.get(name) for name in ("allocated", "reserved", "device")] + [told.get("planned_bytes")]
    chosen = f"{told['batch']}{'c' if told['checkpointing'] else ''}" if "batch" in told else ""
    ratio = f"{speed(told) / speed(plain):.2f}" if plain and peer != "trl" else ""
    shown = [f"{size / 1e9:.2f}" if size else "" for size in sizes]
    return _COLUMNS.format(
        case, peer, f"{speed(told):.0f}", ratio, chosen, *shown, f"{told['losses'][-1]:.4f}"
    )


def apart(told: dict[str, dict[str, Any]]) -> float:
    """The largest difference of two losses of a step, as a share."""
    pairs = zip(told["graft"]["losses"], told["trl"]["losses"], strict=True)
    return max(abs(ours / theirs - 1) for ours, theirs in pairs)


if __name__ == "__main__":
    main()
