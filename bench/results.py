"""Does an adapter help on real data? Every set through the API with the preset quick_cpu; the table of docs/results.md.

    python -m bench.results FOLDER [--set sql_create_context] [--steps 60] [--output docs/results.md]

FOLDER holds the data sets below, each with a training and a validation file. Scores and verdict are those of the adapters'
certificates: base and adapter on the same rows, greedy answers, 95 % bootstrap intervals. A second table says what
preflight told of each job beforehand: measured, and reckoned while the job kept the worker busy.
"""

import argparse
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.service import running
from examples.demo import MAPPING
from graft_client.client import Client

INTENTS = {
    "messages": [
        {"role": "system", "content": "Name the intent of the customer's message."},
        {"role": "user", "content": "{text}"},
        {"role": "assistant", "content": "{category}"},
    ]
}
# Its files' ending, and the mapping where the columns need one.
SETS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "sql_create_context": ("jsonl", MAPPING),
    "restaurant_slots": ("jsonl", None),
    "e2e_nlg": ("jsonl", None),
    "banking77": ("csv", INTENTS),
    "medquad": ("jsonl", None),
    "multiturn_chat": ("jsonl", None),
    "glaive_toolcall": ("jsonl", None),
}
HEAD = """| set | steps | tokens | loss, base → adapter | score | base → adapter (95 % of the difference) | answers end | verdict | training, proof |
|---|---|---|---|---|---|---|---|---|
"""
FORETOLD = """| set | memory: measured, reckoned | the process | seconds to the last step: measured, by earlier jobs | taken |
|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", choices=SETS, action="append")
    parser.add_argument("--steps", type=int, help="instead of the preset's 60")
    parser.add_argument("--output", type=Path, help="where the table goes, too")
    options = parser.parse_args()
    print(HEAD, end="")
    table, foretold = HEAD, FORETOLD
    with running() as service, service.client() as client:
        for name in options.set or SETS:
            job, measured, reckoned = trained(client, options.folder / name, *SETS[name], options.steps)
            line = row(name, job, client)
            print(line, end="", flush=True)
            table += line
            most = max(step.get("memory_bytes", 0) for step in client.metrics(job["id"]))
            foretold += estimates(name, measured, reckoned, most, phases(client, job)["foretold"])
            if options.output is not None:
                options.output.write_text(f"{table}\n{foretold}")
    print(f"\n{foretold}", end="")


def trained(
    client: Client, folder: Path, ending: str, mapping: dict[str, Any] | None, steps: int | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The finished job; what preflight measured before it, and what it reckoned while the job ran."""
    train, valid = (
        client.upload(folder / f"{part}.{ending}", mapping=mapping)["id"] for part in ("train", "valid")
    )
    body: dict[str, Any] = {
        "dataset_id": train,
        "validation": {"dataset_id": valid},
        "preset": "quick_cpu",
        "name": folder.name,
    }
    if steps is not None:
        body["training"] = {"max_steps": steps}
    measured = client.preflight(body)
    if not measured["memory"]["measured"]:
        raise SystemExit(f"{folder.name}: {measured['not_measured']}")
    reckoned = None
    for job in client.watch(client.create_job(body)["id"]):
        if reckoned is None and job["phase"] == "loading_model":
            reckoned = client.preflight(body)
    if job["status"] != "succeeded" or reckoned is None:
        raise SystemExit(f"{folder.name}: {job['status']} {job['error']}")
    return job, measured, reckoned


def estimates(
    name: str, measured: dict[str, Any], reckoned: dict[str, Any], most: float, taken: float
) -> str:
    """`most` is the memory of the trainer's process after a step, with the libraries' files, about 0.4 GB."""
    memory = [f"{found['memory']['needed_bytes'] / 1e9:.2f} GB" for found in (measured, reckoned)]
    seconds = [
        "" if found["eta_seconds"] is None else f"{found['eta_seconds']:.0f}"
        for found in (measured, reckoned)
    ]
    return f"| {name} | {', '.join(memory)} | {most / 1e9:.2f} GB | {', '.join(seconds)} | {taken:.0f} |\n"


def row(name: str, job: dict[str, Any], client: Client) -> str:
    proof = client.adapter(job["adapter_id"])["certificate"]["evaluation"]
    metrics, seconds = job["metrics"], phases(client, job)
    scores = [
        (
            score,
            f"{found['base']:.2f} → {found['adapter']:.2f} ({found['interval'][0]:+.2f} to {found['interval'][1]:+.2f})",
        )
        for score, found in proof["scores"].items()
    ] or [("", "")]
    fields = [
        name,
        job["progress"]["step"],
        f"{metrics['tokens']:,.0f}",
        f"{metrics['base_eval_loss']:.3f} → {metrics['eval_loss']:.3f}",
        "<br>".join(score for score, _ in scores),
        "<br>".join(found for _, found in scores),
        "" if proof["stop_rate"] is None else f"{proof['stop_rate']:.0%}",
        proof["verdict"]["better"] + (", memorised" if proof["verdict"]["memorised"] else ""),
        f"{seconds['training']:.0f} s, {seconds['proof']:.0f} s",
    ]
    return f"| {' | '.join(map(str, fields))} |\n"


def phases(client: Client, job: dict[str, Any]) -> dict[str, float]:
    """Seconds of the training with its evaluations, and of the proof; and what preflight foretells: from loading the
    model to the last step."""
    told = [event for event in client.events(job["id"]) if event["type"] == "phase"]
    # Newest first: of each phase its first beginning stays, also where the run was resumed.
    began = {event["data"]["phase"]: _epoch(event["created_at"]) for event in told}
    proof = max(_epoch(event["created_at"]) for event in told)
    return {
        "training": began["saving"] - began["training"],
        "proof": _epoch(job["finished_at"]) - proof,
        "foretold": began["evaluating"] - began["loading_model"],
    }


def _epoch(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")
