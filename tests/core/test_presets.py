"""Presets: their files say what was published, and a job's own settings come before theirs."""

import re
from typing import Any

import pytest

from core.errors import BadRequest
from core.ml.training.config import Spec, settle
from core.ml.training.spec import presets
from tests.conftest import ROOT

ZEPHYR = presets.find("zephyr_7b_sft")
BAND = {
    "metric": "eval_loss",
    "low": 0.9,
    "high": 1.0,
    "models": ["m"],
    "loss_on": "all",
    "what": "two runs",
}


def flat(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in spec.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def spec_of(choice: str) -> dict[str, Any]:
    return flat(Spec.model_validate(presets.find(choice).settings.spec).model_dump())


# ---- The files

# What the sources say, for both modes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "default_qlora@1": {
        "quantization.bits": 4,
        "quantization.type": "nf4",
        "quantization.double_quant": True,
        "lora.r": 16,
        "lora.alpha": 16,
        "lora.dropout": 0.0,
        "lora.target_modules": "all-linear",
        "training.learning_rate": 2e-4,
        "training.scheduler": "linear",
        "training.warmup_ratio": 0.03,
        "training.effective_batch_size": 8,
        "training.max_grad_norm": 0.3,
        "evaluation.every_steps": "auto",
    },
    "quick_cpu@1": {"training.effective_batch_size": 8, "training.max_steps": 60, "evaluation.rows": 32},
    "zephyr_7b_sft@1": {
        "quantization.bits": 4,
        "quantization.type": "nf4",
        "quantization.double_quant": False,
        "lora.r": 64,
        "lora.alpha": 16,
        "lora.dropout": 0.1,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "training.epochs": 1,
        "training.learning_rate": 2e-5,
        "training.scheduler": "cosine",
        "training.warmup_ratio": 0,
        "training.effective_batch_size": 128,
        "training.max_grad_norm": 1.0,
        "training.max_length": 2048,
    },
    "phi2_medquad@1": {
        "quantization.double_quant": False,
        "lora.r": 64,
        "lora.alpha": 16,
        "lora.dropout": 0.05,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj", "dense"],
        "training.epochs": 1,
        "training.learning_rate": 2e-4,
        "training.scheduler": "cosine",
        "training.warmup_ratio": 0.03,
        "training.effective_batch_size": 4,
        "training.optimizer": "paged_adamw_32bit",
        "training.weight_decay": 0.001,
        "training.max_grad_norm": 0.3,
    },
    "guanaco_7b@1": {
        "seed": 0,
        "quantization.double_quant": True,
        "lora.r": 64,
        "lora.alpha": 16,
        "lora.dropout": 0.1,
        "lora.target_modules": "all-linear",
        "training.max_steps": 1875,
        "training.learning_rate": 2e-4,
        "training.effective_batch_size": 16,
        "training.optimizer": "paged_adamw_32bit",
        "training.weight_decay": 0,
        "training.max_grad_norm": 0.3,
        "evaluation.every_steps": 187,
    },
    "text_to_sql_7b@1": {
        "quantization.double_quant": True,
        "lora.r": 256,
        "lora.alpha": 128,
        "lora.dropout": 0.05,
        "lora.target_modules": "all-linear",
        "training.epochs": 3,
        "training.learning_rate": 2e-4,
        "training.effective_batch_size": 6,
        "training.optimizer": "adamw",
        "training.max_grad_norm": 0.3,
        "training.max_length": 3072,
        "evaluation.rows": 1000,
    },
}
# What only the mode that keeps the faults has.
KEPT: dict[str, dict[str, Any]] = {
    "zephyr_7b_sft": {"training.batch_size": 1, "training.packing": True, "training.loss_on": "all"},
    "phi2_medquad": {
        "training.batch_size": 4,
        "training.loss_on": "all",
        "quantization.compute_dtype": "float16",
    },
    "guanaco_7b": {"training.batch_size": 1, "training.scheduler": "constant", "training.max_length": 528},
    "text_to_sql_7b": {
        "training.batch_size": 3,
        "training.scheduler": "constant",
        "training.loss_on": "all",
        "training.packing": True,
    },
}


def test_these_are_the_presets_and_the_documentation_names_them() -> None:
    assert [f"{preset.name}@{preset.version}" for preset in presets.known()] == sorted(PUBLISHED)
    text = (ROOT / "docs" / "presets.md").read_text()
    assert set(re.findall(r"`(\w+@\d+)` \|", text)) == set(PUBLISHED)


@pytest.mark.parametrize("mode", ["fixed", "faithful"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_says_what_was_published(name: str, mode: str) -> None:
    assert PUBLISHED[name].items() <= spec_of(f"{name}:{mode}").items()


@pytest.mark.parametrize("name", KEPT)
def test_only_the_faithful_mode_keeps_faults_and_it_names_them(name: str) -> None:
    assert KEPT[name].items() <= spec_of(f"{name}:faithful").items()
    fixed = spec_of(name)
    assert all(fixed[field] != value for field, value in KEPT[name].items())
    assert fixed["training.loss_on"] == "auto"
    assert presets.find(name).settings.validation is not None
    warnings = presets.find(f"{name}:faithful").settings.warnings
    assert all(warning.startswith(("Kept: ", "Not reproduced: ")) for warning in warnings)
    assert {warning.split(":")[0] for warning in warnings} == {"Kept", "Not reproduced"}


def test_the_published_slip_is_in_the_faithful_prompt_alone() -> None:
    prompts = [str(presets.find(f"text_to_sql_7b:{mode}").settings.mapping) for mode in ("fixed", "faithful")]
    assert ["an text to SQL" in prompt for prompt in prompts] == [False, True]


def test_default_qlora_is_what_a_job_without_a_preset_does_and_evaluates_besides() -> None:
    default, plain = settle(Spec.model_validate(presets.find("default_qlora").settings.spec)), settle(Spec())
    assert default.evaluation.every_steps == "auto"
    assert default.model_copy(update={"evaluation": plain.evaluation}) == plain


# ---- Names


@pytest.mark.parametrize(
    ("choice", "name", "mode"),
    [
        ("guanaco_7b", "guanaco_7b@1", "fixed"),
        ("guanaco_7b@1", "guanaco_7b@1", "fixed"),
        ("guanaco_7b:faithful", "guanaco_7b@1", "faithful"),
        ("guanaco_7b@1:fixed", "guanaco_7b@1", "fixed"),
    ],
)
def test_a_preset_is_found_by_name_version_and_mode(choice: str, name: str, mode: str) -> None:
    chosen = presets.find(choice)
    assert (chosen.name, chosen.mode) == (name, mode)


def test_a_name_alone_means_the_newest_version(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = ZEPHYR.preset.model_copy(update={"version": 2})
    monkeypatch.setattr(presets, "known", lambda: (newer, ZEPHYR.preset))
    assert presets.find("zephyr_7b_sft").name == "zephyr_7b_sft@2"
    assert presets.find("zephyr_7b_sft@1").name == "zephyr_7b_sft@1"


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("zephyr-7b-sft", 'did you mean "zephyr_7b_sft"'),
        ("text2sql_7b@1", 'did you mean "text_to_sql_7b"'),
        ("zephyr_7b_sft@7", "there is zephyr_7b_sft@1"),
        ("zephyr_7b_sft:as_published", "its modes are fixed and faithful"),
        ("../secrets@1", 'There is no preset "../secrets@1"'),
        ("", 'There is no preset ""'),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(choice: str, told: str) -> None:
    with pytest.raises(BadRequest) as caught:
        presets.find(choice)
    assert (caught.value.code, caught.value.param) == ("unknown_preset", "preset")
    assert told in caught.value.message


# ---- What a job says comes first


def asked(choice: str, **said: Any) -> dict[str, Any]:
    made = presets.under(presets.find(choice), said)
    validation = made.pop("validation")
    return flat(Spec.model_validate(made).model_dump()) | {"validation": validation}


def test_a_jobs_own_settings_win_field_by_field() -> None:
    made = asked("zephyr_7b_sft", lora={"r": 8}, training={"learning_rate": 1e-4, "optimizer": "auto"})
    assert (made["lora.r"], made["lora.alpha"], made["lora.dropout"]) == (8, 16, 0.1)
    assert (made["training.learning_rate"], made["training.scheduler"]) == (1e-4, "cosine")
    assert made["training.optimizer"] == "auto"  # said, although it is the default
    assert made["validation"] == {"fraction": 0.05}


def test_epochs_and_steps_take_each_others_place() -> None:
    made = asked("zephyr_7b_sft", training={"max_steps": 5})
    assert (made["training.epochs"], made["training.max_steps"]) == (None, 5)
    made = asked("guanaco_7b", training={"epochs": 2})
    assert (made["training.epochs"], made["training.max_steps"]) == (2, None)
    assert asked("guanaco_7b", training={"epochs": None})["training.max_steps"] == 1875


def test_rows_held_back_can_be_other_ones_or_none() -> None:
    assert asked("guanaco_7b", validation={"dataset_id": "ds_1"})["validation"] == {"dataset_id": "ds_1"}
    made = asked("text_to_sql_7b", validation=None)
    assert made["validation"] is None
    assert (made["evaluation.every_steps"], made["evaluation.metrics"]) == (None, "auto")
    assert made["evaluation.rows"] == 1000


def test_an_adapter_to_continue_from_has_its_own_lora() -> None:
    made = asked("zephyr_7b_sft", continue_from="ad_1")
    assert (made["lora.r"], made["training.learning_rate"]) == (16, 2e-5)


def test_a_preset_is_not_changed_by_the_jobs_that_take_it() -> None:
    before = ZEPHYR.preset.model_dump_json()
    asked("zephyr_7b_sft", lora={"r": 8}, training={"max_steps": 5}, validation=None)
    assert ZEPHYR.preset.model_dump_json() == before


# ---- What the job keeps of it


def recorded(
    choice: str, said: dict[str, Any], *, model: str = "mistralai/Mistral-7B-v0.1"
) -> dict[str, Any]:
    made = presets.under(presets.find(choice), said)
    validation = made.pop("validation")
    return presets.record(
        presets.find(choice),
        model=model,
        spec=Spec.model_validate(made),
        validation=validation,
        same_data=True,
    )


def test_a_job_without_settings_of_its_own_differs_in_nothing() -> None:
    for name in PUBLISHED:
        for mode in ("fixed", "faithful"):
            model = presets.find(name).preset.model or "any"
            kept = recorded(f"{name}:{mode}", {}, model=model)
            assert (kept["name"], kept["mode"], kept["diff"]) == (name, mode, {})


def test_the_difference_has_every_changed_field_and_no_other() -> None:
    kept = recorded(
        "zephyr_7b_sft:faithful",
        {
            "training": {"max_steps": 9, "learning_rate": 1e-4, "scheduler": "cosine"},
            "lora": {"target_modules": ["q_proj"], "use_dora": True},
            "evaluation": {"early_stopping": {"patience": 2}},
            "validation": {"dataset_id": "ds_1"},
        },
        model="m",
    )
    assert kept["diff"] == {
        "model": {"preset": "mistralai/Mistral-7B-v0.1", "yours": "m"},
        "training.epochs": {"preset": 1.0, "yours": None},
        "training.max_steps": {"preset": None, "yours": 9},
        "training.learning_rate": {"preset": 2e-5, "yours": 1e-4},
        "lora.target_modules": {"preset": ["q_proj", "k_proj", "v_proj", "o_proj"], "yours": ["q_proj"]},
        "lora.use_dora": {"preset": False, "yours": True},
        "evaluation.early_stopping.patience": {"preset": None, "yours": 2},
        "evaluation.early_stopping.min_delta": {"preset": None, "yours": 0.0},
        "validation.fraction": {"preset": 0.05, "yours": None},
        "validation.dataset_id": {"preset": None, "yours": "ds_1"},
    }
    assert kept["warnings"] == ZEPHYR.preset.faithful.warnings
    assert (kept["band"]["low"], kept["band"]["high"]) == (0.9439, 0.9693)


# ---- The band


@pytest.mark.parametrize(
    ("value", "where"),
    [(0.899, "below"), (0.9, "inside"), (0.95, "inside"), (1.0, "inside"), (1.01, "above")],
)
def test_a_result_lies_inside_below_or_above(value: float, where: str) -> None:
    found = presets.against_band(
        BAND, model="m", same_data=True, loss_on="all", metrics={"eval_loss": value, "train_loss": 0.95}
    )
    assert found is not None
    assert (found["where"], found["value"], found["low"], found["high"]) == (where, value, 0.9, 1.0)
    assert where in found["words"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "other"}, "the base model is other, not m"),
        ({"same_data": False}, "the data set is not the preset's"),
        ({"loss_on": "assistant"}, "training.loss_on is assistant, not all"),
        ({"metrics": {"train_loss": 0.95}}, "the job has no eval_loss"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(changes: dict[str, Any], told: str) -> None:
    facts: dict[str, Any] = {
        "model": "m",
        "same_data": True,
        "loss_on": "all",
        "metrics": {"eval_loss": 0.95},
    }
    found = presets.against_band(BAND, **(facts | changes))
    assert found is not None
    assert found["where"] == "not comparable"
    assert told in found["words"]


def test_without_a_band_there_is_nothing_to_compare() -> None:
    assert presets.against_band(None, model="m", same_data=True, loss_on="all", metrics={}) is None


@pytest.mark.parametrize(
    ("names", "rows", "its"),
    [
        (["chat", "UltraChat-200k-train.jsonl.gz"], 207_865, True),
        (["HuggingFaceH4/ultrachat_200k", "rows.parquet"], 207_865, True),
        (["ultrachat_200k", "train.jsonl"], 100, False),
        (["mine", "train.jsonl"], 207_865, False),
    ],
)
def test_the_data_are_the_presets_by_name_and_number_of_rows(names: list[str], rows: int, its: bool) -> None:
    assert presets.is_its_data(ZEPHYR.preset, names=names, rows=rows) is its


def test_a_preset_without_data_of_its_own_has_none_to_be_recognised() -> None:
    assert not presets.is_its_data(presets.find("default_qlora").preset, names=["x"], rows=1)
