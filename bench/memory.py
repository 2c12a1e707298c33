"""Who holds how much memory, before and after work? Resident megabytes of each process.

python -m bench.memory
"""

from pathlib import Path

from bench.service import running
from examples.demo import DATA, JOB, MAPPING
from tests.service import Service

PARTS = {
    "API": "api.main",
    "worker": "worker.main",
    "fork server": "multiprocessing.forkserver",
    "engine": "worker.inference",
}


def main() -> None:
    with running() as service, service.client() as client:
        client.jobs()
        show(service, "after the start")
        dataset = client.upload(DATA / "train.jsonl", mapping=MAPPING)["id"]
        client.preview(dataset)
        show(service, "after a preview (tokenizer loaded)")
        body = {name: JOB[name] for name in ("seed", "lora")} | {
            "training": JOB["training"] | {"max_steps": 3}
        }
        for number in (1, 2):
            *_, job = client.watch(client.create_job({"dataset_id": dataset, **body})["id"])
            show(service, f"after job {number} ({job['status']})")
        client.generate(prompt="Say hello.", max_new_tokens=8, adapter_id=job["adapter_id"])
        show(service, "after a generation")


def show(service: Service, when: str) -> None:
    sizes = []
    for name, words in PARTS.items():
        for pid in service.pids(words):
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
            sizes.append(f"{name} {resident:.0f}")
    print(f"{when}: {', '.join(sizes)} MB")


if __name__ == "__main__":
    main()
