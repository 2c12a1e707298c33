"""How soon does a job begin? From `POST /jobs` to the first optimizer step, on a warm worker.

    python -m bench.first_step [--jobs 5]

Three moments of each job, in seconds after the post: training begins, the first step is done, and
what of it was loading the model.
"""

import argparse
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path

from core import settings
from examples.demo import DATA, JOB, MAPPING
from tests.service import Service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=5)
    options = parser.parse_args()
    body = {name: JOB[name] for name in ("seed", "lora")} | {
        "training": JOB["training"] | {"max_steps": 1, "scheduler": "constant"}
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = str(settings.load().models_folder)
        service = Service(Path(folder) / "home", {"GRAFT_MODELS_DIR": models, "HF_HUB_OFFLINE": "1"})
        try:
            service.start()
            with service.client() as client:
                dataset = client.upload(DATA / "train.jsonl", mapping=MAPPING)["id"]
                for number in range(options.jobs + 1):
                    time.sleep(2)
                    *_, job = client.watch(client.create_job({"dataset_id": dataset, **body})["id"])
                    events = {
                        e["type"] + str(e["data"].get("phase", "") if e["data"] else ""): e
                        for e in client.events(job["id"])
                    }
                    posted = datetime.fromisoformat(job["created_at"])
                    begun = (
                        datetime.fromisoformat(events["phasetraining"]["created_at"]) - posted
                    ).total_seconds()
                    first = events["first_step"]["data"]
                    if number:  # the first job waits for the fork server's imports
                        rows.append((begun, first["seconds"], first["model_seconds"]))
                        print(
                            f"job {number}: training begins {begun:.2f} s, first step done {first['seconds']:.2f} s, "
                            f"model {first['model_seconds']:.2f} s"
                        )
        finally:
            service.stop()
    begun, first, model = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"median: training begins {begun:.2f} s after the post ({begun - model:.2f} s beyond loading the model), "
        f"first step done {first:.2f} s"
    )


if __name__ == "__main__":
    main()
