"""The main job from upload to answers, on the text-to-SQL example: what `make demo` runs.

It starts the service in ./.graft (or uses the one GRAFT_CLIENT_URL names), trains an adapter, scores
base and adapter by running their SQL, and ends 0 only if the adapter is far better.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli import show, tokens
from core.ml.scores import sql
from graft_client.client import ApiError, Client, UnreachableError

HERE = Path(__file__).parent
DATA = HERE / "text_to_sql"
HOME = Path(".graft")
HELD_BACK = 30
# The adapter must answer at least this much more of the held-back questions than the base.
FAR_ABOVE = 0.4
SYSTEM = "Answer with SQL.\n{context}"
MAPPING = {
    "messages": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "{question}"},
        {"role": "assistant", "content": "{answer}"},
    ]
}
# Chosen by measurement, see README.md beside this file.
JOB = {
    "name": "text-to-sql demo",
    "seed": 42,
    "lora": {"r": 16, "alpha": 32},
    "training": {
        "max_steps": 80,
        "effective_batch_size": 4,
        "learning_rate": 1.5e-3,
        "scheduler": "cosine",
        "warmup_ratio": 0.05,
    },
}

console = Console()


class DemoError(Exception):
    """What went wrong, in a sentence."""


def main() -> None:
    started = time.monotonic()
    with _service() as client:
        console.rule("1  Upload")
        dataset = client.upload(DATA / "train.jsonl", name="text-to-sql", mapping=MAPPING)
        console.print(f"{dataset['id']}: {dataset['rows']} rows, columns {', '.join(dataset['columns'])}")
        console.rule("2  What will be trained")
        _show_preview(client.preview(dataset["id"], n=2))
        console.rule("3  Train")
        job = show.follow(console, client, client.create_job({"dataset_id": dataset["id"], **JOB})["id"])
        if job["status"] != "succeeded":
            raise DemoError(f"The job {job['status']}: {(job['error'] or {}).get('message')}")
        first_step = next(e for e in client.events(job["id"]) if e["type"] == "first_step")
        console.print(
            f"Adapter {job['adapter_id']}, training loss {job['metrics']['train_loss']:.3f}. {first_step['message']}"
        )
        console.rule(f"4  Score on {HELD_BACK} held-back rows, by running the SQL")
        rows = [json.loads(line) for line in (DATA / "valid.jsonl").read_text().splitlines()[:HELD_BACK]]
        base, base_answers = _score(client, "base", rows, None)
        adapter, adapter_answers = _score(client, "adapter", rows, job["adapter_id"])
        console.rule("5  Download")
        console.print(f"Adapter in PEFT's layout: {_download(client, job['adapter_id'])}")
        console.rule("6  The same questions, both answers")
        _side_by_side(rows, base_answers, adapter_answers)
    console.print(
        f"Right answers on the same {HELD_BACK} rows: base {base:.0%}, adapter {adapter:.0%}. "
        f"Took {time.monotonic() - started:.0f} s.",
        style="bold",
    )
    if adapter < base + FAR_ABOVE:
        raise DemoError(f"The adapter is not far above the base ({adapter:.0%} against {base:.0%}).")


@contextlib.contextmanager
def _service() -> Iterator[Client]:
    """A running service: the one of GRAFT_CLIENT_URL, or one of our own that ends with the demo."""
    if url := os.environ.get("GRAFT_CLIENT_URL"):
        with Client(
            url, os.environ.get("GRAFT_CLIENT_KEY") or (HOME / "admin.key").read_text().strip()
        ) as client:
            yield client
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    graft = Path(sys.executable).parent / "graft"
    up = subprocess.Popen(
        [str(graft), "up", "--home", str(HOME), "--port", str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        with console.status("Starting the service …"):
            key = _wait(up, port)
        with Client(f"http://127.0.0.1:{port}", key) as client:
            yield client
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait()


def _wait(up: "subprocess.Popen[str]", port: int) -> str:
    while up.poll() is None:
        file = HOME / "admin.key"
        if file.is_file() and (key := file.read_text().strip()):
            with Client(f"http://127.0.0.1:{port}", key) as client:
                if client.ready():
                    return key
        time.sleep(0.3)
    raise DemoError(
        "The service did not start. If one runs in ./.graft already, set GRAFT_CLIENT_URL to its address."
    )


def _show_preview(preview: dict[str, Any]) -> None:
    for row in preview["rows"]:
        tokens.print_row(console, row)
        console.print()
    totals = preview["totals"]
    console.print(
        f"{tokens.legend(console)}: {totals['trained']} of {totals['tokens']} tokens, the end of the answer among them."
    )


def _score(
    client: Client, who: str, rows: list[dict[str, str]], adapter_id: str | None
) -> tuple[float, list[str]]:
    answers, right = [], 0
    with console.status(f"{who} …") as status:
        for number, row in enumerate(rows, 1):
            system = {"role": "system", "content": SYSTEM.format(context=row["context"])}
            messages = [system, {"role": "user", "content": row["question"]}]
            which = {"adapter_id": adapter_id} if adapter_id else {}
            answer = client.generate(messages=messages, max_new_tokens=48, **which)["outputs"][0]["text"]
            answers.append(answer)
            right += bool(sql.same_results(row["context"], row["answer"], answer))
            status.update(f"{who}: {right} of {number} right")
    console.print(f"{who:<8} {right} of {len(rows)} right ({right / len(rows):.0%})")
    return right / len(rows), answers


def _download(client: Client, adapter_id: str) -> Path:
    folder = HOME / "demo" / adapter_id
    folder.mkdir(parents=True, exist_ok=True)
    client.download(adapter_id, folder.with_suffix(".zip"))
    with zipfile.ZipFile(folder.with_suffix(".zip")) as archive:
        archive.extractall(folder)
    return folder.resolve()


def _side_by_side(rows: list[dict[str, str]], base: list[str], adapter: list[str]) -> None:
    table = Table("question", "base", "adapter", show_lines=True)
    for row, one, two in list(zip(rows, base, adapter, strict=True))[:3]:
        table.add_row(f"{row['question']}\n{row['context']}", one, two)
    console.print(table, markup=False)


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"The demo failed: {error}")
    except (ApiError, UnreachableError) as error:
        sys.exit(f"The demo failed: {error} {getattr(error, 'hint', None) or ''}")
