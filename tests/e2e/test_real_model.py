"""The default base model, for real: few and slow, one service and one adapter for all of them."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.settings import SMOLLM2
from examples.demo import DATA, MAPPING, SYSTEM
from tests.conftest import ROOT
from tests.service import QUICK, Service

PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, row = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter).eval()
ids = tokenizer.apply_chat_template(row, add_generation_prompt=True, return_tensors="pt", return_dict=True)
stops = json.load(open(adapter + "/prompt_contract.json"))["stop_token_ids"]
out = model.generate(**ids, max_new_tokens=40, do_sample=False, eos_token_id=stops)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def models_dir() -> Path:
    return Path(os.environ.get("GRAFT_MODELS_DIR", ROOT / ".graft" / "models"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("real") / "home"
    subprocess.run(
        [sys.executable, "-m", "worker.child.prepare"],
        check=True,
        env=os.environ | {"GRAFT_MODELS_DIR": str(models_dir)},
    )
    made = Service(home, QUICK | {"GRAFT_MODELS_DIR": str(models_dir)})
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def job(service: Service) -> dict:
    with service.client() as client:
        train = client.upload(DATA / "train.jsonl", mapping=MAPPING)
        held_back = service.home / "held_back.jsonl"
        held_back.write_text("\n".join((DATA / "valid.jsonl").read_text().splitlines()[:8]))
        valid = client.upload(held_back, mapping=MAPPING)
        body = {
            "dataset_id": train["id"],
            "validation": {"dataset_id": valid["id"]},
            "seed": 42,
            "lora": {"r": 16, "alpha": 32},
            "training": {
                "max_steps": 24,
                "effective_batch_size": 4,
                "learning_rate": 1.5e-3,
                "scheduler": "cosine",
            },
        }
        *_, job = client.watch(client.create_job(body)["id"])
    assert job["status"] == "succeeded", (job["error"], service.logs())
    return job


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM.format(context=row["context"])},
        {"role": "user", "content": row["question"]},
    ]


def held_back() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "valid.jsonl").read_text().splitlines()]


def test_the_adapter_learns_what_the_base_does_not_know(job: dict) -> None:
    assert job["model"] == SMOLLM2
    assert job["metrics"]["eval_loss"] < 0.25 * job["metrics"]["base_eval_loss"]


def test_the_adapter_answers_with_sql_and_stops_and_the_base_does_not(service: Service, job: dict) -> None:
    row = held_back()[1]
    with service.client() as client:
        base = client.generate(messages=messages(row), max_new_tokens=40)["outputs"][0]
        adapter = client.generate(messages=messages(row), max_new_tokens=40, adapter_id=job["adapter_id"])[
            "outputs"
        ][0]
        again = client.generate(messages=messages(row), max_new_tokens=40)["outputs"][0]
    assert adapter["text"].startswith("SELECT ")
    assert adapter["finish_reason"] == "stop"
    assert not base["text"].startswith("SELECT ")
    assert again == base


def test_plain_peft_in_another_process_gives_the_same_answer(
    service: Service, job: dict, models_dir: Path, tmp_path: Path
) -> None:
    with service.client() as client:
        client.download(job["adapter_id"], tmp_path / "adapter.zip")
        row = held_back()[1]
        answer = client.generate(messages=messages(row), max_new_tokens=40, adapter_id=job["adapter_id"])
    with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
        archive.extractall(tmp_path / "adapter")
    base = models_dir / SMOLLM2.replace("/", "--")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(base), str(tmp_path / "adapter"), json.dumps(messages(row))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer["outputs"][0]["text"]


def test_a_preview_shows_the_tokens_that_are_trained(service: Service) -> None:
    with service.client() as client:
        dataset = client.upload(DATA / "train.jsonl", mapping=MAPPING)
        (row,) = client.preview(dataset["id"], n=1)["rows"]
    trained = "".join(token["text"] for token in row["tokens"] if token["trained"])
    first = json.loads((DATA / "train.jsonl").read_text().splitlines()[0])
    assert trained == first["answer"] + "<|im_end|>\n"
    assert row["text"] == "".join(token["text"] for token in row["tokens"])


@pytest.mark.parametrize(("folder", "mapping"), [("sql_create_context", MAPPING), ("restaurant_slots", None)])
def test_real_data_sets_are_read_whole(
    service: Service, shared_data: Path, folder: str, mapping: dict | None
) -> None:
    file = shared_data / folder / "train.jsonl"
    with service.client() as client:
        dataset = client.upload(file, mapping=mapping)
        preview = client.preview(dataset["id"], n=20)
    assert dataset["rows"] == len(file.read_text().splitlines())
    assert dataset["format"] == ("mapping" if mapping else "messages")
    for row in preview["rows"]:
        answer = json.loads(file.read_text().splitlines()[row["line"] - 1])
        text = answer["answer"] if mapping else answer["messages"][-1]["content"]
        assert "".join(token["text"] for token in row["tokens"] if token["trained"]) == text + "<|im_end|>\n"
