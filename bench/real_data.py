"""Does an adapter help on real data? Base against adapter on held-back rows, through the API.

    python -m bench.real_data FOLDER [--set sql_create_context] [--steps 80] [--rows 40]

FOLDER holds the data sets `sql_create_context` (question, context, answer) and `restaurant_slots`
(messages, answers are JSON), each with train.jsonl and valid.jsonl. Scored are answers that equal the
reference: SQL after lower-casing and collapsing spaces, JSON as the same object.
"""

import argparse
import json
import time
from pathlib import Path

from bench.service import running
from examples.demo import MAPPING, SYSTEM
from graft_client.client import Client

SETS = ("sql_create_context", "restaurant_slots")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", choices=SETS, action="append")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    with running() as service, service.client() as client:
        for name in options.set or SETS:
            compare(client, options.folder / name, options.steps, options.rows)


def compare(client: Client, folder: Path, steps: int, count: int) -> None:
    started = time.monotonic()
    mapping = MAPPING if folder.name == "sql_create_context" else None
    train = client.upload(folder / "train.jsonl", mapping=mapping)
    valid = client.upload(folder / "valid.jsonl", mapping=mapping)
    body = {
        "dataset_id": train["id"],
        "lora": {"r": 16, "alpha": 32},
        "training": {
            "max_steps": steps,
            "effective_batch_size": 4,
            "learning_rate": 1e-3,
            "scheduler": "cosine",
        },
        "validation": {"dataset_id": valid["id"]},
    }
    *_, job = client.watch(client.create_job(body)["id"])
    if job["status"] != "succeeded":
        raise SystemExit(f"{folder.name}: {job['status']} {job['error']}")
    rows = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()[:count]]
    scores = {}
    for who, which in (("base", {}), ("adapter", {"adapter_id": job["adapter_id"]})):
        scores[who] = sum(
            same(ask(client, messages, which), answer) for messages, answer in map(conversation, rows)
        ) / len(rows)
    metrics = job["metrics"]
    print(
        f"{folder.name}: {steps} steps of 4 rows; loss on all {valid['rows']} validation rows: base "
        f"{metrics['base_eval_loss']:.3f}, adapter {metrics['eval_loss']:.3f}; right on the first {len(rows)}: "
        f"base {scores['base']:.0%}, adapter {scores['adapter']:.0%} ({time.monotonic() - started:.0f} s)",
        flush=True,
    )


def conversation(row: dict) -> tuple[list[dict[str, str]], str]:
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1]["content"]
    system = {"role": "system", "content": SYSTEM.format(context=row["context"])}
    return [system, {"role": "user", "content": row["question"]}], row["answer"]


def ask(client: Client, messages: list[dict[str, str]], which: dict[str, str]) -> str:
    text: str = client.generate(messages=messages, max_new_tokens=64, **which)["outputs"][0]["text"]
    return text


def same(given: str, wanted: str) -> bool:
    try:
        return bool(json.loads(given) == json.loads(wanted))
    except ValueError:
        return " ".join(given.lower().split()) == " ".join(wanted.lower().split())


if __name__ == "__main__":
    main()
