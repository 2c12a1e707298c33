"""The best weights are kept, whatever happens on the way; and the stops before the last step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.ml.formats.validate import Reading
from core.ml.training.loop import samples
from core.ml.training.run import Source
from tests.ml import runs
from tests.ml.runs import MakeRun, Reports, adapter, notes, saved, series, train

SPEC: dict[str, Any] = {
    "evaluation": {"every_steps": 2},
    "checkpoints": {"every_steps": 3},
    "lora": {"dropout": 0.1},
    "training": {"max_steps": 10, "learning_rate": 0.1, "scheduler": "constant"},
}
# Other answers than those that are trained: the better these are known, the worse are those.
VALID = [
    {"prompt": f"name {n % 9} of table {n}", "completion": "user of a FROM" * (n % 3 + 1)} for n in range(9)
]


@pytest.fixture
def make_run(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Runs with validation rows, and short answers."""
    monkeypatch.setattr(samples, "_NEW_TOKENS", 4)
    valid = runs.source(VALID, tmp_path / "valid.jsonl")
    return lambda *args, **spec: replace(make_run(*args, **spec), valid=valid)


def best_step(reports: Reports) -> int:
    losses = series(reports, "eval_loss")
    return min(losses, key=lambda step: (losses[step], step))


def test_a_best_loss_of_another_precision_is_measured_again(make_run: MakeRun) -> None:
    """As after the watchdog's last rung; the proof compares with what the kept weights give now."""
    whole, reports = train(make_run("half", quantization={"compute_dtype": "bfloat16"}, **SPEC))
    folders, best = saved(reports), best_step(reports)
    single = {"quantization": {"compute_dtype": "float32"}, **SPEC}
    resumed, _ = train(make_run("single", resume=folders[10], best=folders[best], **single))
    assert adapter(resumed) == adapter(whole)
    assert resumed.metrics["eval_loss"] != whole.metrics["eval_loss"]
    assert resumed.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], rel=0.1)


def test_the_adapter_is_the_best_one_and_it_is_so_after_a_kill_at_any_checkpoint(make_run: MakeRun) -> None:
    whole, reports = train(make_run("whole", **SPEC))
    best = best_step(reports)
    assert best < 10
    losses = series(reports, "eval_loss")
    lowest = [step for step in losses if losses[step] == min(losses[at] for at in losses if at <= step)]
    assert lowest[-1] == best
    (note,) = notes(reports, "best_kept")
    assert note["data"]["step"] == best
    folders = saved(reports)
    assert set(folders) == {3, 6, 9, 10, *lowest}
    assert adapter(whole) == (folders[best] / "adapter_model.safetensors").read_bytes()
    assert whole.metrics["eval_loss"] == losses[best]
    for step, folder in folders.items():
        so_far = [at for at in lowest if at <= step]
        kept = folders[so_far[-1]] if so_far else None
        resumed, _ = train(make_run(f"resumed-{step}", resume=folder, best=kept, **SPEC))
        assert adapter(resumed) == adapter(whole)
        assert resumed.metrics == whole.metrics


def test_a_resumed_run_evaluates_and_saves_at_the_intervals_of_its_own_spec(make_run: MakeRun) -> None:
    spec = SPEC | {"evaluation": {"every_steps": 2}, "checkpoints": {"every_steps": 2}}
    _, reports = train(make_run("first", **spec))
    other = SPEC | {"evaluation": {"every_steps": 5}, "checkpoints": {"every_steps": 3}}
    _, after = train(make_run("other", resume=saved(reports)[2], **other))
    evaluated = set(series(after, "eval_loss"))
    assert evaluated == {5, 10}
    assert {3, 6, 9, 10} <= set(saved(after)) <= {3, 6, 9, 10} | evaluated
    never = SPEC | {"evaluation": {"every_steps": None}}
    _, reports = train(make_run("never", **never))
    stopping = SPEC | {"evaluation": {"every_steps": 2, "early_stopping": {"patience": 1}}}
    _, after = train(make_run("now", resume=saved(reports)[3], **stopping))
    assert notes(after, "early_stop")


def test_what_ended_a_run_does_not_end_it_with_other_settings(make_run: MakeRun) -> None:
    spec = SPEC | {"evaluation": {"every_steps": 2, "early_stopping": {"patience": 1}}}
    _, reports = train(make_run("first", **spec))
    (stopped,) = notes(reports, "early_stop")
    last = stopped["data"]["step"]
    assert last < 10
    _, same = train(make_run("same", resume=saved(reports)[last], **spec))
    assert not series(same, "loss")
    slower = spec | {"training": spec["training"] | {"learning_rate": 0.001}}
    _, other = train(make_run("other", resume=saved(reports)[last], **slower))
    assert min(series(other, "loss")) == last + 1


def test_a_lost_best_is_replaced_by_the_next_evaluation(make_run: MakeRun) -> None:
    _, reports = train(make_run("whole", **SPEC))
    assert best_step(reports) < 9
    resumed, after = train(make_run("resumed", resume=saved(reports)[9], **SPEC))
    (note,) = notes(after, "best_kept")
    assert note["data"]["step"] == 10
    assert resumed.metrics["eval_loss"] == min(series(after, "eval_loss").values())


def test_early_stopping_waits_its_patience_and_stays_stopped(make_run: MakeRun) -> None:
    spec = {**SPEC, "evaluation": {"every_steps": 1, "early_stopping": {"patience": 2}}}
    spec["training"] = {**SPEC["training"], "max_steps": 60}
    whole, reports = train(make_run("whole", **spec))
    (note,) = notes(reports, "early_stop")
    stopped = note["data"]["step"]
    best = best_step(reports)
    assert stopped == best + 2 < 60
    assert note["data"]["best_step"] == best
    folders = saved(reports)
    assert adapter(whole) == (folders[best] / "adapter_model.safetensors").read_bytes()
    # Killed between its stop and its end, it does not go on.
    again, after = train(make_run("again", resume=folders[stopped], best=folders[best], **spec))
    assert series(after, "loss") == {}
    assert adapter(again) == adapter(whole)
    # With more patience it does.
    spec["evaluation"]["early_stopping"]["patience"] = 4
    _, more = train(make_run("more", resume=folders[stopped], best=folders[best], **spec))
    assert series(more, "loss")


def test_min_delta_counts_small_gains_as_none(make_run: MakeRun) -> None:
    spec = {**SPEC, "evaluation": {"every_steps": 1, "early_stopping": {"patience": 2, "min_delta": 50}}}
    _, reports = train(make_run(**spec))
    assert notes(reports, "early_stop")[0]["data"]["step"] == 3


def test_the_time_limit_counts_all_attempts_and_keeps_the_best(make_run: MakeRun) -> None:
    limited = {**SPEC, "training": {**SPEC["training"], "max_steps": 5000}, "limits": {"max_seconds": 1}}
    result, reports = train(make_run("limited", **limited))
    (note,) = notes(reports, "time_limit")
    stopped = note["data"]["step"]
    assert note["data"]["seconds"] >= 1
    assert stopped < 5000
    assert stopped in series(reports, "eval_loss")
    assert result.metrics["eval_loss"] == min(series(reports, "eval_loss").values())
    folders = saved(reports)
    again, after = train(
        make_run("again", resume=folders[stopped], best=folders[best_step(reports)], **limited)
    )
    assert series(after, "loss") == {}
    assert adapter(again) == adapter(result)


def test_without_evaluations_the_last_step_is_kept(make_run: MakeRun) -> None:
    _, reports = train(make_run())
    assert not notes(reports, "best_kept")
    assert list(series(reports, "eval_loss")) == [6]


def test_answers_are_told_at_every_evaluation_and_change_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {**SPEC, "quantization": {"bits": 4}}
    watched, reports = train(make_run("watched", **spec))
    told = {data["step"]: data["samples"] for kind, data in reports if kind == "samples"}
    assert list(told) == [2, 4, 6, 8, 10]
    assert len(told[2]) == 3
    for sample in told[2]:
        assert sample["prompt"].endswith("assistant\n")
        assert sample["expected"].startswith("user of")
        assert "<|im_end|>" not in sample["text"]
        assert sample["finish_reason"] in ("stop", "length")
    monkeypatch.setattr(samples, "prompts_of", lambda *_: [])
    unwatched, without = train(make_run("unwatched", **spec))
    assert not [data for kind, data in without if kind == "samples"]
    assert adapter(watched) == adapter(unwatched)


def test_given_prompts_are_answered_at_the_end_without_any_validation(make_run: MakeRun) -> None:
    _, reports = train(
        replace(
            make_run(evaluation={"prompts": ["name 3", "a much longer prompt than the other"]}), valid=None
        )
    )
    (told,) = [data for kind, data in reports if kind == "samples"]
    assert told["step"] == 6
    assert [(sample["prompt"], sample["expected"]) for sample in told["samples"]] == [
        ("name 3", None),
        ("a much longer prompt than the other", None),
    ]


def test_tokens_go_on_at_a_resume(make_run: MakeRun) -> None:
    _, reports = train(make_run("whole", checkpoints={"every_steps": 3}))
    _, after = train(make_run("resumed", checkpoints={"every_steps": 3}, resume=saved(reports)[3]))
    whole, rest = series(reports, "tokens"), series(after, "tokens")
    assert list(rest) == [4, 5, 6]
    assert rest == {step: whole[step] for step in rest}
    assert all(value > 0 for value in series(after, "memory_bytes").values())


def test_plain_texts_are_continued_from_their_beginning(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(evaluation={"every_steps": 3})
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(f'{{"text": "SELECT the name of table {n} FROM the table"}}\n' for n in range(30))
    )
    texts = Source(file, Reading("jsonl", False, "text", {"text": "{text}"}))
    _, reports = train(replace(run, train=texts, valid=texts))
    first = next(data["samples"][0] for kind, data in reports if kind == "samples")
    assert first["prompt"]
    assert first["expected"]
    assert "SELECT the name of table 0 FROM the table".startswith(first["prompt"] + first["expected"])
