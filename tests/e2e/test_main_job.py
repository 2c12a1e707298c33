"""Upload, train, download and generate through a service started as users start it."""

import hashlib
import json
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import httpx
import pytest

from graft_client.client import ApiError
from tests.service import GRAFT, Service, wait_until

LOADS_PLAINLY = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
ids = tokenizer.apply_chat_template([{"role": "user", "content": "name 3"}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)["input_ids"]
before = base(ids).logits
after = PeftModel.from_pretrained(base, sys.argv[2])(ids).logits
assert not torch.allclose(before, after), "the adapter changes nothing"
print(sum(1 for name, p in base.named_parameters() if "lora_B" in name and p.abs().sum() > 0))
"""


@pytest.fixture(scope="module")
def job(service: Service, rows_file: Path) -> dict:
    """A finished job, shared by the tests of this module."""
    with service.client() as client:
        dataset = client.upload(rows_file, name="rows")
        created = client.create_job(
            {
                "dataset_id": dataset["id"],
                "validation": {"fraction": 0.2},
                "training": {"max_steps": 8, "learning_rate": 0.02, "effective_batch_size": 4},
                "checkpoints": {"every_steps": 3, "keep": 2},
                "evaluation": {"every_steps": 4},
                "metadata": {"team": "a"},
            }
        )
        assert created["status"] == "queued"
        *_, finished = client.watch(created["id"])
    assert finished["status"] == "succeeded", (finished["error"], service.logs())
    return finished


def test_nothing_is_left_auto(job: dict) -> None:
    assert '"auto"' not in json.dumps(job["spec"])
    assert job["progress"]["step"] == job["progress"]["total_steps"] == 8
    assert job["progress"]["percent"] == 100
    assert job["metadata"] == {"team": "a"}
    assert job["attempt"] == 1


def test_both_losses_are_measured_on_the_held_back_rows(job: dict) -> None:
    metrics = job["metrics"]
    assert metrics["eval_loss"] < metrics["base_eval_loss"]


def test_metrics_events_and_checkpoints(service: Service, job: dict) -> None:
    with httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {service.key}"}) as http:
        series = http.get(f"/jobs/{job['id']}/metrics").json()["data"]
        assert [row["step"] for row in series] == list(range(1, 9))
        assert "eval_loss" in series[3]
        stream = http.get(f"/jobs/{job['id']}/events", headers={"accept": "text/event-stream"}).text
        kinds = [line[7:] for line in stream.splitlines() if line.startswith("event: ")]
        assert kinds[0] == "created"
        assert kinds[-1] == "succeeded"
        with service.client() as client:
            assert [event["type"] for event in client.events(job["id"], page_size=3)] == kinds[::-1]
        assert {"plan", "first_step", "checkpoint", "phase"} <= set(kinds)
        kept = http.get(f"/jobs/{job['id']}/checkpoints").json()["data"]
        assert [row["step"] for row in kept] == [8, 6]


def test_the_log_tells_how_it_went(service: Service, job: dict) -> None:
    with service.client() as client:
        lines = list(client.logs(job["id"]))
    assert lines[0].endswith("Attempt 1 begins.")
    for said in ("Phase: training.", "Step 1: loss", "Checkpoint of step 3.", "Phase: saving."):
        assert any(said in line for line in lines), (said, lines)


def test_the_download_is_whole_and_loads_with_plain_peft(
    service: Service, job: dict, tiny_model: Path, tmp_path: Path
) -> None:
    archive, folder = tmp_path / "adapter.zip", tmp_path / "adapter"
    with service.client() as client:
        client.download(job["adapter_id"], archive)
        adapter = next(row for row in client.adapters() if row["id"] == job["adapter_id"])
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == adapter["sha256"]
    with zipfile.ZipFile(archive) as source:
        assert set(source.namelist()) == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "certificate.json",
            "chat_template.jinja",
            "prompt_contract.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        source.extractall(folder)
    assert str(tiny_model) not in (folder / "adapter_config.json").read_text()
    done = subprocess.run(
        [sys.executable, "-c", LOADS_PLAINLY, str(tiny_model), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 14  # seven linear modules in each of two layers


def test_base_and_adapter_answer_and_the_stream_says_the_same(service: Service, job: dict) -> None:
    question = {"messages": [{"role": "user", "content": "name 3"}], "max_new_tokens": 12}
    with service.client() as client:
        base = client.generate(**question)
        adapter = client.generate(**question, adapter_id=job["adapter_id"])
        streamed = list(client.stream(**question, adapter_id=job["adapter_id"]))
        again = client.generate(**question)
    text = adapter["outputs"][0]["text"]
    assert text != base["outputs"][0]["text"]
    assert again["outputs"] == base["outputs"]
    assert "".join(data["text"] for event, data in streamed if event == "token") == text
    assert streamed[-1][0] == "done"
    assert streamed[-1][1]["finish_reason"] == adapter["outputs"][0]["finish_reason"]
    assert streamed[-1][1]["usage"] == adapter["usage"]


def test_one_prompt_is_answered_side_by_side(service: Service, job: dict) -> None:
    question = {"messages": [{"role": "user", "content": "name 3"}], "max_new_tokens": 12}
    targets = ["base", job["adapter_id"], f"{job['id']}@6", f"{job['id']}@latest", "ad_none"]
    with service.client() as client:
        with pytest.raises(ApiError) as caught:
            client.compare(**question, targets=targets)
        assert caught.value.code == "adapter_not_found"
        base, adapter, _, newest = client.compare(**question, targets=targets[:4])["outputs"]
        assert base["text"] == client.generate(**question)["outputs"][0]["text"]
        alone = client.generate(**question, adapter_id=job["adapter_id"])["outputs"][0]["text"]
    assert adapter["text"] == newest["text"] == alone != base["text"]
    assert newest["adapter_id"] == f"{job['id']}@8"


def test_a_job_can_be_talked_to_while_it_trains(service: Service, job: dict) -> None:
    body = {
        "dataset_id": job["dataset_id"],
        "training": {"max_steps": 5000, "learning_rate": 0.02, "warmup_ratio": 0.0},
        "checkpoints": {"every_steps": 20, "keep": 2},
    }
    question = {"messages": [{"role": "user", "content": "name 3"}], "max_new_tokens": 12}
    with service.client() as client:
        job_id = client.create_job(body)["id"]
        with pytest.raises(ApiError) as caught:
            client.generate(**question, adapter_id=f"{job_id}@latest")
        assert caught.value.code == "checkpoint_not_found"

        def said() -> dict | None:
            try:
                return client.generate(**question, adapter_id=f"{job_id}@latest")
            except ApiError as error:
                if error.code not in ("checkpoint_not_found", "file_missing", "adapter_missing"):
                    raise
                return None

        answers: list[dict | None] = []
        wait_until(lambda: answers.append(said()) or answers[-1], "a checkpoint answers")
        assert client.job(job_id)["status"] == "running"
        answer = answers[-1]
        assert answer["adapter_id"].startswith(f"{job_id}@")
        assert answer["outputs"] != client.generate(**question)["outputs"]
        client.cancel(job_id)
        wait_until(lambda: client.job(job_id)["status"] == "cancelled", "the job is cancelled")


def test_sampling_is_repeatable_and_stops_where_asked(service: Service) -> None:
    with service.client() as client:
        hot = {"prompt": "name", "max_new_tokens": 16, "temperature": 1.5, "seed": 7}
        one, two = client.generate(**hot), client.generate(**hot, n=2)
        assert one["outputs"][0] == two["outputs"][0]
        assert two["outputs"][0] != two["outputs"][1]
        text = one["outputs"][0]["text"]
        assert len(text) > 4
        stopped = client.generate(**hot, stop=text[3:5])["outputs"][0]
        assert stopped == {"text": text[: text.index(text[3:5])], "finish_reason": "stop"}


def test_the_engine_refuses_what_it_cannot_read(service: Service) -> None:
    with service.client() as client, pytest.raises(ApiError) as caught:
        client.generate(prompt="name " * 600, max_new_tokens=4)
    assert caught.value.code == "prompt_too_long"


def test_the_trainer_leaves_no_memory_behind(service: Service, job: dict) -> None:  # noqa: ARG001
    """The job's process is gone; the worker itself never loaded the learning libraries."""
    (worker,) = service.pids("worker.main")
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    trainers = [
        pid for child in children for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()
    ]
    assert trainers == []
    resident = int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * 4096
    assert resident < 250e6
    assert "libtorch" not in Path(f"/proc/{worker}/maps").read_text()


def run_graft(service: Service, *words: str) -> str:
    done = subprocess.run(
        [str(GRAFT), *words, "--url", service.url, "--home", str(service.home)],
        capture_output=True,
        text=True,
        env=service.environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_cli_trains_lists_and_chats(service: Service, rows_file: Path, tmp_path: Path) -> None:
    graft = partial(run_graft, service)
    saved = tmp_path / "adapter.zip"
    assert "quick_cpu@1" in graft("presets")
    options = ("--preset", "quick_cpu", "--steps", "2", "--name", "from-cli", "-o", str(saved))
    said = graft("train", str(rows_file), *options)
    assert "Succeeded" in said
    assert zipfile.is_zipfile(saved)
    assert "from-cli" in graft("jobs")
    adapter = next(word for word in said.split() if word.startswith("ad_")).rstrip(",")
    assert graft("chat", "--adapter", adapter, "-m", "name 3", "--max-new-tokens", "8").endswith("\n")


def test_a_conversation_goes_on_after_an_answer_that_failed(service: Service) -> None:
    said = subprocess.run(
        [str(GRAFT), "chat", "--url", service.url, "--max-new-tokens", "8"],
        input=b"name " * 1000 + b"\nname 3\n\xff\xfe\n",
        capture_output=True,
        env=service.environment | {"GRAFT_CLIENT_KEY": service.key},
        timeout=60,
        check=False,
    )
    assert said.returncode == 2
    assert b"the 512 that the model reads" in b" ".join(said.stderr.split())
    assert len(said.stdout) > 2  # there is an answer behind the one that failed
    assert said.stderr.endswith(b"What you wrote is not UTF-8.\n")


def test_the_cli_exports_an_adapter(service: Service, job: dict, tmp_path: Path) -> None:
    saved = tmp_path / "merged.zip"
    said = run_graft(service, "export", "adapter", job["adapter_id"], "-o", str(saved))
    assert str(saved) in said.replace("\n", "")
    assert "model.safetensors" in zipfile.ZipFile(saved).namelist()


def test_the_cli_pauses_resumes_cancels_and_retries(service: Service, job: dict) -> None:
    graft = partial(run_graft, service)
    with service.client() as client:
        body = {"dataset_id": job["dataset_id"], "training": {"max_steps": 5000}}
        job_id = client.create_job(body)["id"]
        graft("pause", job_id)
        wait_until(lambda: client.job(job_id)["status"] == "paused", "the job is paused")
        assert graft("resume", job_id) == f"Job {job_id} is queued.\n"
        graft("cancel", job_id)
        wait_until(lambda: client.job(job_id)["status"] == "cancelled", "the job is cancelled")
        said = graft("retry", job_id, "--set", "training.max_steps=1", "--set", "seed=7")
        assert said == f"Job {job_id} is queued.\n"
        *_, again = client.watch(job_id)
    assert (again["status"], again["progress"]["step"], again["spec"]["seed"]) == ("succeeded", 1, 7)
