"""What a job's request comes to: its preset, the adapter it continues from, and combinations that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.control.running import attempts
from core.control.tables import Job
from core.ml.training.spec import presets
from tests import tiny
from tests.api.conftest import Api, only_sqlite, refused
from tests.control import rows
from tests.core.test_training_config import WRITTEN

MISTRAL = "mistralai/Mistral-7B-v0.1"


def posted(api: Api, status: int = 201, code: str | None = None, **body: Any) -> dict[str, Any]:
    """The job, or the error, which a preflight must give too."""
    body = {"dataset_id": api.dataset_id(), **body}
    answer = api.client.post("/jobs", json=body)
    if status != 201:
        refused(api.client.post("/jobs/preflight", json=body), status, code)
        return refused(answer, status, code)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


# ---- Presets


def test_a_job_starts_from_a_preset_and_shows_what_it_changed(api: Api) -> None:
    job = posted(
        api,
        preset="zephyr_7b_sft",
        model=tiny.NAME,
        training={"learning_rate": 1e-4, "max_steps": 3},
        priority=5,
    )
    assert (job["model"], job["priority"], job["kind"], job["recoveries"]) == (tiny.NAME, 5, "train", [])
    assert (job["preset"]["name"], job["preset"]["mode"]) == ("zephyr_7b_sft@1", "fixed")
    assert job["preset"]["diff"] == {
        "model": {"preset": MISTRAL, "yours": tiny.NAME},
        "training.learning_rate": {"preset": 2e-5, "yours": 1e-4},
        "training.epochs": {"preset": 1.0, "yours": None},
        "training.max_steps": {"preset": None, "yours": 3},
    }
    assert (job["preset"]["band"]["metric"], job["preset"]["result"]) == ("eval_loss", None)
    assert (job["spec"]["lora"]["r"], job["spec"]["training"]["scheduler"]) == (64, "cosine")
    assert job["validation"] == {"dataset_id": None, "fraction": 0.05}
    assert api.client.get(f"/jobs/{job['id']}").json() == job


def test_a_job_without_a_preset_has_none(api: Api) -> None:
    job = posted(api)
    assert (job["preset"], job["priority"]) == (None, 0)


@only_sqlite
def test_every_preset_can_be_asked_for_in_both_modes(api: Api) -> None:
    for preset in presets.known():
        for mode in ("fixed", "faithful"):
            name = f"{preset.name}@{preset.version}:{mode}"
            job = posted(api, preset=name, model=tiny.NAME, lora={"target_modules": "all-linear"})
            assert job["preset"]["mode"] == mode
            assert job["preset"]["diff"].keys() <= {"model", "lora.target_modules"}


@only_sqlite
def test_a_preset_brings_its_base_model_unless_the_job_names_one(api: Api) -> None:
    assert posted(api, preset="quick_cpu")["model"] == tiny.NAME
    error = posted(api, 404, "model_not_found", preset="guanaco_7b")
    assert "huggyllama/llama-7b" in error["message"]


@only_sqlite
def test_an_unknown_preset_is_refused_with_the_nearest(api: Api) -> None:
    error = posted(api, 422, "unknown_preset", preset="quick-cpu")
    assert error["param"] == "preset"
    assert 'did you mean "quick_cpu"' in error["message"]
    posted(api, 422, "invalid_request", preset=7)


@only_sqlite
def test_settings_are_checked_together_with_those_of_the_preset(api: Api) -> None:
    """Neither half is judged alone: 16 divides the preset's 128, and not the default of 8."""
    job = posted(api, preset="zephyr_7b_sft", model=tiny.NAME, training={"batch_size": 16})
    assert job["spec"]["training"]["batch_size"] == 16
    error = posted(api, 422, "invalid_request", preset="zephyr_7b_sft", training={"batch_size": 3})
    assert "effective_batch_size (128) must be a multiple of batch_size (3)" in error["message"]


def test_the_result_is_held_against_the_band_once_the_job_has_succeeded(api: Api) -> None:
    job = posted(api, preset="zephyr_7b_sft:faithful", model=tiny.NAME, training={"max_steps": 3})
    fence = rows.claimed(api.sessions, job["id"]).fence
    with api.sessions.begin() as session:
        row = session.get_one(Job, job["id"])
        attempts.renew(session, row.id, fence, 60, metrics={"eval_loss": 0.95})
        attempts.succeed(session, row.id, fence, rows.adapter(api.project_id, row.id))
    result = api.client.get(f"/jobs/{job['id']}").json()["preset"]["result"]
    assert (result["metric"], result["value"], result["where"]) == ("eval_loss", 0.95, "not comparable")
    assert f"the base model is {tiny.NAME}" in result["words"]
    with api.sessions.begin() as session:
        row = session.get_one(Job, job["id"])
        row.model, row.preset = MISTRAL, (row.preset or {}) | {"same_data": True}
    result = api.client.get(f"/jobs/{job['id']}").json()["preset"]["result"]
    assert (result["where"], result["low"], result["high"]) == ("inside", 0.9439, 0.9693)


@only_sqlite
def test_the_presets_are_listed_with_both_modes(api: Api) -> None:
    listed = api.client.get("/presets").json()
    assert (listed["object"], listed["has_more"], len(listed["data"])) == ("list", False, 6)
    zephyr = next(preset for preset in listed["data"] if preset["id"] == "zephyr_7b_sft@1")
    assert (zephyr["model"], zephyr["band"]["high"]) == (MISTRAL, 0.9693)
    assert zephyr["modes"]["fixed"]["spec"]["training"]["learning_rate"] == 2e-5
    assert zephyr["modes"]["faithful"]["warnings"]
    assert zephyr["source"]


@only_sqlite
def test_a_preflight_shows_what_the_preset_makes_of_a_job(api: Api) -> None:
    body = {"dataset_id": api.dataset_id(), "preset": "quick_cpu", "lora": {"r": 4}, "validation": None}
    found = api.client.post("/jobs/preflight", json=body).json()
    assert found["preset"]["diff"]["lora.r"] == {"preset": 16, "yours": 4}
    assert (found["spec"]["lora"]["r"], found["total_steps"]) == (4, 60)


# ---- Combinations


@only_sqlite
@pytest.mark.parametrize(
    "evaluation",
    [
        {"every_steps": 5},
        {"every_steps": "auto", "early_stopping": {"patience": 1}},
        {"metrics": ["exact_match"]},
    ],
)
def test_an_evaluation_needs_rows_that_are_not_trained(api: Api, evaluation: dict[str, Any]) -> None:
    error = posted(api, 422, "invalid_request", evaluation=evaluation)
    assert error["param"] == "validation"
    assert "has nothing to evaluate on" in error["message"]
    job = posted(api, evaluation=evaluation, validation={"fraction": 0.4})
    assert evaluation.items() <= job["spec"]["evaluation"].items() or "early_stopping" in evaluation


@only_sqlite
def test_a_job_continues_on_a_base_held_as_its_adapter_was_trained_on(api: Api, tmp_path: Path) -> None:
    held = {"bits": 16, "type": "nf4", "double_quant": True, "compute_dtype": "float32"}
    adapter = adapter_id(api, tmp_path, certificate={"spec": {"quantization": held}})
    assert posted(api, continue_from=adapter)["spec"]["quantization"] == held | {"compute_dtype": "auto"}
    given = posted(api, continue_from=adapter, quantization={"bits": 4})["spec"]["quantization"]
    assert given["bits"] == 4


@only_sqlite
def test_a_value_out_of_bounds_is_refused_with_what_it_is_about(api: Api) -> None:
    error = posted(api, 422, "invalid_request", training={"learning_rate": 2})
    assert error["param"] == "training.learning_rate"
    assert "1e-5 to 2e-3 is usual" in error["hint"]
    for priority in (-101, 101, 0.5):
        error = posted(api, 422, "invalid_request", priority=priority)
        assert "highest starts first" in error["hint"]


# ---- An adapter to continue from


def adapter_id(api: Api, folder: Path, config: Any = WRITTEN, **fields: Any) -> str:
    row = rows.adapter(api.project_id, **fields)
    file = folder / "adapter_config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    api.storage.put(file, f"{row.key}/files/adapter_config.json")
    with api.sessions.begin() as session:
        session.add(row)
        return row.id


def test_a_job_continues_from_an_adapter_with_its_model_and_settings(api: Api, tmp_path: Path) -> None:
    adapter = adapter_id(api, tmp_path)
    job = posted(api, continue_from=adapter)
    assert (job["model"], job["spec"]["continue_from"]) == (tiny.NAME, adapter)
    assert (job["spec"]["lora"]["r"], job["spec"]["lora"]["target_modules"]) == (8, ["q_proj", "v_proj"])
    assert job["spec"]["quantization"]["bits"] == 4
    job = posted(api, continue_from=adapter, preset="zephyr_7b_sft")
    assert (job["model"], job["spec"]["lora"]["r"]) == (tiny.NAME, 8)
    assert job["preset"]["diff"]["lora.r"] == {"preset": 64, "yours": 8}


@only_sqlite
def test_an_adapter_of_another_model_is_not_continued(api: Api, tmp_path: Path) -> None:
    adapter = adapter_id(api, tmp_path, base_model="tests/other")
    error = posted(api, 422, "continue_from_other_model", continue_from=adapter, model=tiny.NAME)
    assert "tests/other" in error["message"]
    assert tiny.NAME in error["message"]
    posted(api, 404, "model_not_found", continue_from=adapter)


@only_sqlite
def test_an_adapter_brings_its_own_lora_settings(api: Api, tmp_path: Path) -> None:
    error = posted(api, 422, "invalid_request", continue_from=adapter_id(api, tmp_path), lora={"r": 8})
    assert error["param"] == "lora"
    assert "brings its own lora settings" in error["message"]


@only_sqlite
def test_settings_that_an_adapter_brings_are_checked_too(api: Api, tmp_path: Path) -> None:
    adapter = adapter_id(api, tmp_path, WRITTEN | {"use_dora": True})
    posted(api, 422, "dora_not_with_8_bit", continue_from=adapter, quantization={"bits": 8})


@only_sqlite
@pytest.mark.parametrize("config", [WRITTEN | {"init_lora_weights": "pissa"}, "{", "[" * 5000, "null"])
def test_an_adapter_that_cannot_be_trained_is_refused(api: Api, tmp_path: Path, config: Any) -> None:
    adapter = adapter_id(api, tmp_path, config)
    error = posted(api, 422, "adapter_not_trainable", continue_from=adapter)
    assert adapter in error["message"]


@only_sqlite
def test_an_adapter_that_is_not_ours_is_not_found(api: Api, tmp_path: Path) -> None:
    error = posted(api, 404, "adapter_not_found", continue_from="ad_none")
    assert error["param"] == "continue_from"
    adapter = adapter_id(api, tmp_path)
    dataset = api.stranger.post("/datasets", files={"file": ("a.jsonl", b'{"prompt":"a","completion":"b"}')})
    body = {"dataset_id": dataset.json()["id"], "continue_from": adapter}
    refused(api.stranger.post("/jobs", json=body), 404, "adapter_not_found")


def test_the_same_request_finds_its_job_when_the_adapter_is_gone(api: Api, tmp_path: Path) -> None:
    adapter = adapter_id(api, tmp_path)
    headers = {"idempotency-key": "once"}
    body = {"dataset_id": api.dataset_id(), "continue_from": adapter}
    first = api.client.post("/jobs", json=body, headers=headers).json()
    api.client.post(f"/jobs/{first['id']}/cancel")  # until then the adapter is in use
    assert api.client.delete(f"/adapters/{adapter}").status_code == 200
    assert api.client.post("/jobs", json=body, headers=headers).json()["id"] == first["id"]


# ---- Names of modules


@only_sqlite
@pytest.mark.parametrize("names", [["q_prj"], ["q_proj", "nope"], ["norm"], ["self_attn"], ["proj"]])
def test_modules_that_the_base_model_has_not_are_refused_with_those_it_has(
    api: Api, names: list[str]
) -> None:
    error = posted(api, 422, "unknown_target_modules", lora={"target_modules": names})
    assert error["param"] == "lora.target_modules"
    assert names[-1] in error["message"]
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in error["hint"]


@only_sqlite
def test_modules_are_adapted_once_however_often_they_are_named(api: Api) -> None:
    names = ["q_proj", "up_proj", "q_proj"]
    assert posted(api, lora={"target_modules": names})["spec"]["lora"]["target_modules"] == names[:2]
    posted(api, 422, "invalid_request", lora={"target_modules": ["q_proj"] * 201})
