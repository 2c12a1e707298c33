"""The proof of saved adapters: what it finds in good ones, and that no damaged one passes."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.control import adapters
from core.control.tables import Adapter
from core.errors import GraftError
from core.hashes import sha256
from core.ml import base_model, catalogue, prompts
from core.ml import contract as contracts
from core.ml.catalogue import BaseModel, Catalogue
from core.ml.inference import greedy
from core.ml.inference.greedy import Answer
from core.ml.proof import checks, evaluate, loading, measure, questions
from core.ml.proof.evaluate import Evaluation, Side
from core.ml.proof.measure import Losses
from core.ml.scores.choice import Row
from core.ml.scores.metrics import Scored
from core.ml.training import data
from core.ml.training.run import Run, Trained
from tests import tiny
from tests.ml import runs
from worker.child import trainer

Made = tuple[Run, Path, dict[str, float]]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def tiny_base(tiny_model: Path, folder: Path) -> BaseModel:
    return catalogue.find(Catalogue(folder / "models", {tiny.NAME: str(tiny_model)}), tiny.NAME)


@pytest.fixture(scope="module")
def make(tiny_base: BaseModel, folder: Path) -> runs.MakeRun:
    return runs.maker(tiny_base, folder)


@pytest.fixture(scope="module")
def trained(make: runs.MakeRun) -> Made:
    """Twelve steps with validation rows held back; what it learns is that answers begin with SELECT."""
    run = make("trained", fraction=0.4, training={"max_steps": 12, "learning_rate": 0.02})
    result, _ = runs.train(run)
    assert result.adapter is not None
    return run, result.adapter, result.metrics


@pytest.fixture
def saved(trained: Made, tmp_path: Path) -> Made:
    """The same in a folder of its own."""
    run, adapter, metrics = trained
    return run, Path(shutil.copytree(adapter, tmp_path / "adapter")), metrics


def prove(made: Made, stop: Callable[[], bool] = lambda: False, **facts: Any) -> tuple[str, dict[str, Any]]:
    """The end that the proof reports."""
    run, adapter, metrics = made
    reports: runs.Reports = []
    facts = {"metrics": metrics, "job_id": "job_1"} | facts
    trainer.prove(run, adapter, facts, lambda kind, /, **told: reports.append((kind, told)), stop)
    assert [kind for kind, _ in reports[:-1]] == ["alive"] * (len(reports) - 1)
    return reports[-1]


def test_a_good_adapter_is_proved_and_its_card_tells_what_it_is_worth(saved: Made) -> None:
    run, adapter, metrics = saved
    files = {file.name: sha256(file) for file in adapter.iterdir() if file.name != "README.md"}
    kind, proved = prove(saved, dataset="my rows", spec=run.spec.model_dump())
    assert kind == "proved"
    certificate = proved["certificate"]
    failed = [check["name"] for check in certificate["checks"] if not check["ok"]]
    assert set(failed) <= {"stop_rate"}
    assert certificate["ok"] is not bool(failed)
    held = {check["name"]: check for check in certificate["checks"]}
    assert held["check_loss"]["value"] == pytest.approx(metrics["check_loss"], rel=0.01)
    assert held["eval_loss"]["value"] == pytest.approx(metrics["eval_loss"], rel=0.01)
    assert (held["keys"]["value"], held["not_zero"]["value"]) == (28, 14)
    assert certificate["hashes"]["files"] == files
    assert certificate["hashes"]["dataset"] == sha256(run.train.path)
    assert "model.safetensors" in certificate["hashes"]["base"]
    assert certificate["versions"]["torch"] == torch.__version__

    evaluation = certificate["evaluation"]
    assert evaluation["base"]["loss"] == pytest.approx(metrics["base_eval_loss"], rel=0.01)
    assert evaluation["loss"]["interval"][1] < 0
    assert set(evaluation["scores"]) == {"rouge_l", "exact_match"}
    assert evaluation["verdict"]["better"] == "better"
    assert proved["metrics"].keys() >= {"eval_perplexity", "base_eval_perplexity", "rouge_l", "base_rouge_l"}
    assert json.loads((adapter / "certificate.json").read_text()) == certificate
    card = (adapter / "README.md").read_text()
    assert f"base_model: {tiny.NAME}" in card.split("---")[1]
    assert evaluation["verdict"]["words"] in card
    assert all(
        text in card for text in ("my rows", certificate["hashes"]["dataset"], "PeftModel", "| keys |")
    )


def test_every_loss_of_a_certificate_is_the_mean_of_all_tokens(saved: Made) -> None:
    _, proved = prove(saved)
    evaluation = proved["certificate"]["evaluation"]
    for name in ("base", "adapter"):
        assert evaluation["loss"][name] == pytest.approx(evaluation[name]["loss"], rel=1e-9)
    low, high = evaluation["loss"]["interval"]
    assert low <= evaluation["loss"]["difference"] <= high


def test_rows_that_stand_in_the_data_twice_may_be_learnt_by_heart(make: runs.MakeRun, folder: Path) -> None:
    train = runs.source(runs.ROWS[:4] * 5, folder / "repeated.jsonl")
    valid = runs.source(runs.ROWS[20:28], folder / "others.jsonl")
    run = replace(make("repeated", training={"max_steps": 5}), train=train, valid=valid)
    result, _ = runs.train(run)
    assert result.adapter is not None
    _, proved = prove((run, result.adapter, result.metrics))
    evaluation = proved["certificate"]["evaluation"]
    assert evaluation["training_rows"]["passes"] == 1
    assert "no row more than once" not in evaluation["verdict"]["words"]


def test_an_adapter_that_goes_on_names_what_the_first_was_trained_on(make: runs.MakeRun) -> None:
    run = make("first", fraction=0.3, training={"max_steps": 2})
    result, _ = runs.train(run)
    assert result.adapter is not None
    earlier = (Trained("0" * 64, None), Trained(sha256(run.train.path), "1" * 64))
    spec = {"continue_from": "ad_1", "training": {"max_steps": 2}}
    second = replace(make("second", fraction=0.3, start=result.adapter, **spec), earlier=earlier)
    result, _ = runs.train(second)
    assert result.adapter is not None
    _, proved = prove((second, result.adapter, result.metrics))
    certificate = proved["certificate"]
    assert certificate["evaluation"]["rows"] == 0
    assert "All validation rows are trained, too" in certificate["evaluation"]["verdict"]["words"]
    found = adapters.trained_on(Adapter(certificate=certificate))
    assert found == (*earlier, Trained(sha256(run.train.path), certificate["hashes"]["held_back"]))
    third = replace(second, earlier=found[2:])
    rows = data.rows_of(third, contracts.load(run.model.path), context=512)
    assert (rows.in_both, bool(rows.held_back)) == ([], True)


def test_a_metric_that_was_asked_for_and_scores_no_row_marks_the_adapter(make: runs.MakeRun) -> None:
    asked = {"metrics": ["json_validity", "exact_match"], "rows": 4}
    run = make("unscored", fraction=0.2, evaluation=asked)
    result, _ = runs.train(run)
    assert result.adapter is not None
    kind, proved = prove((run, result.adapter, result.metrics))
    assert kind == "proved"
    assert set(proved["certificate"]["evaluation"]["scores"]) == {"exact_match"}
    held = {check["name"]: check for check in proved["certificate"]["checks"]}
    assert (held["metrics"]["ok"], held["metrics"]["value"]) == (False, ["json_validity"])
    assert not proved["certificate"]["ok"]


def test_without_validation_rows_nothing_is_said_of_better_or_worse(make: runs.MakeRun) -> None:
    run = make("alone")
    result, _ = runs.train(run)
    assert result.adapter is not None
    kind, proved = prove((run, result.adapter, result.metrics))
    assert kind == "proved"
    evaluation = proved["certificate"]["evaluation"]
    assert (evaluation["rows"], evaluation["base"], evaluation["scores"]) == (0, None, {})
    assert evaluation["verdict"] | {"words": "", "stops": None} == {
        "better": None,
        "stops": None,
        "memorised": None,
        "words": "",
    }
    assert evaluation["stop_rate"] is not None
    assert set(proved["metrics"]) == {"stop_rate"}
    assert "check_loss" in {check["name"] for check in proved["certificate"]["checks"]}


def test_an_adapter_that_is_worse_even_on_its_own_rows_is_told_so(make: runs.MakeRun) -> None:
    run = make("spoiled", lora={"alpha": 1024}, training={"learning_rate": 1.0, "max_steps": 3})
    result, _ = runs.train(run)
    assert result.adapter is not None
    kind, proved = prove((run, result.adapter, result.metrics))
    assert kind == "proved"
    verdict = proved["certificate"]["evaluation"]["verdict"]
    assert verdict["better"] == "worse"
    assert "Even on rows that it was trained on" in verdict["words"]


def test_validation_rows_that_are_all_trained_prove_nothing_and_break_nothing(
    make: runs.MakeRun, folder: Path
) -> None:
    valid = runs.source(runs.ROWS[20:28], folder / "copied.jsonl")
    run = replace(make("copied"), valid=valid)
    result, _ = runs.train(run)
    assert result.adapter is not None
    kind, proved = prove((run, result.adapter, result.metrics))
    assert kind == "proved"
    evaluation = proved["certificate"]["evaluation"]
    assert (evaluation["rows"], evaluation["base"]) == (0, None)
    assert evaluation["answers"] == 16  # to prompts that were trained: does it stop?


def side(unseen: float, seen: float, stops: int = 0) -> Side:
    """Twenty rows of one loss, as many of another that were trained, and twenty answers."""
    rows = [Losses(np.full(20, loss), np.ones(20)) for loss in (unseen, seen)]
    answers = [Answer("", "stop" if place < stops else "length") for place in range(20)]
    return Side(rows[0], rows[1], answers)


@pytest.mark.parametrize(
    ("tokens", "half", "value", "holds"),
    [
        (100, True, 0.52, True),  # 0.03 is what half precision rounds over so few tokens
        (100, True, 0.54, False),
        (100, False, 0.506, False),
        (10_000, True, 0.506, False),  # of many it rounds nothing
        (10_000, True, 0.504, True),
        (10_000, False, 0.504, True),
    ],
)
def test_losses_may_differ_by_one_percent_and_what_is_rounded(
    tokens: int, half: bool, value: float, holds: bool
) -> None:
    measured = Losses(np.full(10, value * tokens / 10), np.full(10, tokens / 10))
    found = Evaluation(side(2.0, 2.0), Side(measured, None, []), list(range(10)), 1.0, [], 10)
    with nullcontext() if holds else pytest.raises(GraftError, match="saved files have a loss"):
        checks.losses(found, {"check_loss": 0.5, "eval_loss": 0.5}, half=half)


def test_of_few_rows_nothing_is_said() -> None:
    found = Evaluation(side(2.0, 2.0), side(1.0, 1.0), [0, 1, 2, 3], 3.0, [], 4)
    verdict = evaluate.verdict(found)
    assert verdict["better"] is None
    assert "few validation rows" in verdict["words"]


def test_a_score_of_few_rows_does_not_decide() -> None:
    few = Scored("json_valid", 0.0, 1.0, 1.0, (1.0, 1.0), rows=1, left_out=19)
    found = Evaluation(side(2.0, 2.0), side(2.5, 2.5), list(range(20)), 3.0, [few], 20)
    assert evaluate.verdict(found)["better"] == "worse"  # by the loss
    many = few._replace(rows=5, left_out=15)
    assert evaluate.verdict(replace(found, scores=[many]))["better"] == "better"


@pytest.mark.parametrize(
    ("adapter", "better", "memorised", "stops"),
    [
        (side(1.0, 0.9, stops=20), "better", False, True),
        (side(1.9, 0.1, stops=16), "better", True, True),
        (side(2.5, 0.1, stops=15), "worse", True, False),
        (side(2.0, 2.0), "no better", False, False),
        (side(2.0, 1.95), "no better", False, False),  # too little to speak of
    ],
)
def test_the_verdict_says_better_stopping_and_learnt_by_heart(
    adapter: Side, better: str, memorised: bool, stops: bool
) -> None:
    found = Evaluation(side(2.0, 2.0), adapter, list(range(20)), 3.0, [], 20)
    verdict = evaluate.verdict(found)
    assert (verdict["better"], verdict["memorised"], verdict["stops"]) == (better, memorised, stops)
    assert f"{better} " in verdict["words"]
    assert ("did not learn" in verdict["words"]) is not memorised


def change(adapter: Path, alter: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    alter(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})


def change_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def zeroed(adapter: Path) -> None:
    change(adapter, lambda tensors: [tensors[name].zero_() for name in tensors if "lora_B" in name])


def with_one_missing(adapter: Path) -> None:
    change(adapter, lambda tensors: tensors.pop(sorted(tensors)[0]))


def with_one_too_many(adapter: Path) -> None:
    name = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"
    change(adapter, lambda tensors: tensors.update({name: torch.ones(16, 64)}))


def with_a_nan(adapter: Path) -> None:
    change(adapter, lambda tensors: tensors[sorted(tensors)[0]].fill_(torch.nan))


def cut_short(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])


def of_another_rank(adapter: Path) -> None:
    change_config(adapter, r=8)


def with_fewer_targets(adapter: Path) -> None:
    change_config(adapter, target_modules=["q_proj", "v_proj"])


def with_a_target_of_no_module(adapter: Path) -> None:
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    change_config(adapter, target_modules=[*names, "w_pack"])


def of_another_scale(adapter: Path) -> None:
    change_config(adapter, lora_alpha=64)


def of_another_base(adapter: Path) -> None:
    change_config(adapter, base_model_name_or_path="tests/other")


def retemplated(adapter: Path) -> None:
    file = adapter / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", "<|endoftext|>"))


def retemplated_throughout(adapter: Path) -> None:
    """Consistent with itself: only the base model's contract tells."""
    retemplated(adapter)
    (adapter / contracts.CONTRACT_FILE).unlink()
    contracts.save(contracts.load(adapter), adapter)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (zeroed, "inert_adapter"),
        (with_one_missing, "adapter_incomplete"),
        (with_one_too_many, "adapter_incomplete"),
        (with_a_nan, "adapter_incomplete"),
        (cut_short, "adapter_incomplete"),
        (of_another_rank, "adapter_incomplete"),
        (with_fewer_targets, "adapter_incomplete"),
        (with_a_target_of_no_module, "adapter_incomplete"),
        (of_another_scale, "adapter_differs"),
        (of_another_base, "adapter_mismatch"),
        (retemplated, "contract_broken"),
        (retemplated_throughout, "contract_broken"),
    ],
)
def test_a_damaged_adapter_does_not_pass(saved: Made, damage: Callable[[Path], None], code: str) -> None:
    damage(saved[1])
    kind, error = prove(saved)
    assert (kind, error.get("code")) == ("error", code)
    assert not (saved[1] / "certificate.json").exists()


def test_another_runs_adapter_does_not_pass(saved: Made, make: runs.MakeRun) -> None:
    result, _ = runs.train(make("another", seed=7, training={"max_steps": 3}))
    assert result.adapter is not None
    shutil.copy(result.adapter / WEIGHTS, saved[1] / WEIGHTS)
    kind, error = prove(saved)
    assert (kind, error.get("code")) == ("error", "adapter_differs")


def test_asked_to_stop_it_stops(saved: Made) -> None:
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 3

    assert prove(saved, stop) == ("stopped", {})
    assert not (saved[1] / "certificate.json").exists()


def test_answers_are_those_of_one_prompt_at_a_time(trained: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where no rounding decides."""
    run, adapter, _ = trained
    contract = contracts.load(run.model.path)
    rows = data.rows_of(run, contract, context=512)
    model = loading.load(run.model, base_model.settle(run.spec.quantization), adapter).float()
    asked = [
        example["input_ids"][: next(i for i, label in enumerate(example["labels"]) if label >= 0)]
        for example in [*rows.valid_examples, *rows.train_examples]
    ]
    # It was not trained for long enough to end an answer: a word of some of its answers shall be the end.
    end_word = contract.tokenizer(" the", add_special_tokens=False)["input_ids"][-1]
    contract = replace(contract, stop_token_ids=(*contract.stop_token_ids, end_word))
    monkeypatch.setattr(greedy, "_TOKENS", 200)  # several batches
    ticks: list[int] = []
    answers = greedy.answers(model, contract, asked, 12, lambda: ticks.append(1))
    stops = list(contract.stop_token_ids)
    ends = set()
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            eos_token_id=stops, pad_token_id=stops[0],
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        end = next((place for place, token in enumerate(made) if token in stops), None)
        assert answer.text == prompts.text_of(contract, made[:end])
        assert answer.finish_reason == ("length" if end is None else "stop")
        ends.add(end)
    assert None in ends
    assert len(ends) > 1
    assert len(ticks) > 12


@pytest.mark.parametrize("numbers", [50_000_000, 1])
@pytest.mark.parametrize("whole", [False, True])
def test_losses_are_those_of_one_row_at_a_time(
    trained: Made, whole: bool, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, adapter, _ = trained
    contract = contracts.load(run.model.path)
    rows = data.rows_of(run, contract, context=512)
    model = loading.load(run.model, base_model.settle(run.spec.quantization), adapter).float()
    monkeypatch.setattr(measure, "_NUMBERS", numbers)
    asked = [
        example | {"labels": example["input_ids"]} if whole else example for example in rows.train_examples
    ]
    losses = measure.losses(model, asked, lambda: None)
    for one, total, count in zip(asked, losses.sums, losses.counts, strict=True):
        ids, labels = (torch.tensor([one[name]]) for name in ("input_ids", "labels"))
        assert total / count == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
        assert count == (labels[:, 1:] >= 0).sum()


def test_long_answers_are_fewer() -> None:
    """Else a proof would take as long as the training."""
    question = questions.Question([1, 2], Row("a", "b"), 0)
    for length, count in ((20, 32), (600, 16)):
        asked = {line: replace(question, length=length) for line in range(32)}
        fitting, _ = evaluate._fitting({line: {"input_ids": [1, 2]} for line in asked}, asked, 4096)
        assert len(fitting) == count
