"""How soon does a job begin? From `POST /jobs` to the first optimizer step, on a warm worker.

    python -m bench.first_step [--jobs 5]

Three moments of each job, in seconds after the post: training begins, the first step is done, and
what of it was loading the model.
"""

import argparse
import statistics
import time
from datetime import datetime

from bench.service import running
from examples.demo import DATA, JOB, MAPPING
from graft_client.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=5)
    options = parser.parse_args()
    body = {name: JOB[name] for name in ("seed", "lora")} | {
        "training": JOB["training"] | {"max_steps": 1, "scheduler": "constant"}
    }
    rows = []
    with running() as service, service.client() as client:
        dataset = client.upload(DATA / "train.jsonl", mapping=MAPPING)["id"]
        for number in range(options.jobs + 1):
            time.sleep(2)
            *_, job = client.watch(client.create_job({"dataset_id": dataset, **body})["id"])
            moments = measure(client, job)
            if number:  # the first job waits for the fork server's imports
                rows.append(moments)
                begun, first, model = moments
                print(
                    f"job {number}: training begins {begun:.2f} s, first step done {first:.2f} s, "
                    f"model {model:.2f} s"
                )
    begun, first, model = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"median: training begins {begun:.2f} s after the post ({begun - model:.2f} s beyond loading the model), "
        f"first step done {first:.2f} s"
    )


def measure(client: Client, job: dict) -> tuple[float, float, float]:
    """Seconds from the post to the beginning of training and to the end of its first step; of the model."""
    events = list(client.events(job["id"]))
    training = next(e for e in events if e["type"] == "phase" and e["data"]["phase"] == "training")
    first = next(e for e in events if e["type"] == "first_step")["data"]
    begun = datetime.fromisoformat(training["created_at"]) - datetime.fromisoformat(job["created_at"])
    return begun.total_seconds(), first["seconds"], first["model_seconds"]


if __name__ == "__main__":
    main()
