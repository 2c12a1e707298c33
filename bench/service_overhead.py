"""What does the service cost? A job's training phase over the same call made in a process of its own.

    python -m bench.service_overhead [--steps 40] [--rounds 4]

Both train the default base model on the example data with the same seed, in turns, in one run. The
weights must come out the same, bit for bit: else it would not be the same work.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from bench.service import running
from core import settings
from core.hashes import sha256
from examples.demo import DATA, JOB, MAPPING
from tests.service import Service

DIRECT = """
import json, sys, time
from pathlib import Path
from core.ml import catalogue
from core.ml.formats.validate import Reading
from core.ml.training import config, sft
from core.ml.training.run import Run, Source

spec, mapping, models, model, data, work = json.loads(sys.argv[1])
phases = {}
def report(kind, /, **values):
    if kind == "phase":
        phases[values["phase"]] = time.monotonic()
Path(work).mkdir()
sft.train(
    Run(catalogue.find(catalogue.Catalogue(Path(models), {}), model), config.settle(config.Spec(**spec)),
        Source(Path(data), Reading("jsonl", False, "mapping", mapping)), None, None, Path(work)),
    report, lambda: False,
)
print(phases["saving"] - phases["training"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    config = settings.load()
    spec = {name: JOB[name] for name in ("seed", "lora")}
    spec["training"] = JOB["training"] | {"max_steps": options.steps}
    served, direct = [], []
    with running() as service, tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            work = Path(folder) / f"direct-{turn}"
            # The order changes from round to round: neither always has the machine that is warmer.
            if turn % 2:
                direct.append(directly(service, spec, config, work))
                seconds, weights = by_service(service, spec)
            else:
                seconds, weights = by_service(service, spec)
                direct.append(directly(service, spec, config, work))
            served.append(seconds)
            print(
                f"round {turn + 1}: service {seconds:.2f} s, direct {direct[-1]:.2f} s, "
                f"ratio {seconds / direct[-1]:.3f}",
                flush=True,
            )
            if sha256(work / "adapter" / "adapter_model.safetensors") != weights:
                sys.exit("the two runs gave different weights")
    print(
        f"median: service {statistics.median(served):.2f} s, direct {statistics.median(direct):.2f} s, "
        f"ratio {statistics.median(served) / statistics.median(direct):.3f} (same weights, bit for bit)"
    )


def by_service(service: Service, spec: dict) -> tuple[float, str]:
    with service.client() as client:
        dataset = client.upload(DATA / "train.jsonl", mapping=MAPPING)
        *_, job = client.watch(client.create_job({"dataset_id": dataset["id"], **spec})["id"])
        if job["status"] != "succeeded":
            sys.exit(f"the job {job['status']}: {job['error']}")
        phases = {
            e["data"]["phase"]: datetime.fromisoformat(e["created_at"])
            for e in client.events(job["id"])
            if e["type"] == "phase"
        }
        adapter = next(row for row in client.adapters() if row["id"] == job["adapter_id"])
    weights = next(f["sha256"] for f in adapter["files"] if f["path"] == "adapter_model.safetensors")
    return (phases["saving"] - phases["training"]).total_seconds(), weights


def directly(service: Service, spec: dict, config: settings.Settings, work: Path) -> float:
    arguments = [
        spec,
        MAPPING,
        str(config.models_folder),
        config.default_model,
        str(DATA / "train.jsonl"),
        str(work),
    ]
    done = subprocess.run(
        [sys.executable, "-c", DIRECT, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=service.environment,
    )
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
