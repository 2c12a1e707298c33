"""A GPU's memory: what a run takes of it against what was reckoned and probed, and what happens when it is short."""

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, random_model
from core.ml.catalogue import Catalogue
from core.ml.training import sft
from core.ml.training.config import Spec
from core.ml.training.loop.watchdog import Again
from core.ml.training.probe import measure
from core.ml.training.run import Run
from core.ml.training.spec import changes
from tests.gpu.runs import GIGABYTE, at_most, catalogue_in, let_go, run
from tests.ml.runs import Reports, losses, train
from worker.child import spawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# Some ten gigabytes of activations at a time.
LARGE = {"effective_batch_size": 64, "batch_size": 64, "gradient_checkpointing": False, "packing": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_in(tmp_path_factory.mktemp("models"))


def until_it_fits(first: Run) -> tuple[Reports, list[dict[str, Any]]]:
    """Begin again with what each attempt asks for, as the worker does; the last one's reports, and the changes."""
    recoveries: list[dict[str, Any]] = []
    spec = first.spec.model_dump()
    for attempt in range(10):
        work = first.work / str(attempt)
        work.mkdir()
        try:
            now = replace(first, spec=Spec.model_validate(spec), work=work, recoveries=tuple(recoveries))
            return train(now)[1], recoveries
        except Again as again:
            if again.cause != "out_of_memory" or not isinstance(again.__cause__, torch.OutOfMemoryError):
                raise
            recoveries.append({"step": 0, "cause": again.cause, "changes": again.changes})
            spec = changes.merged(spec | {"validation": None}, again.changes)
            del spec["validation"]
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError(f"it never fits: {recoveries}")


def test_a_batch_too_large_is_halved_until_it_fits_and_learns_the_same(
    models: Catalogue, tmp_path: Path
) -> None:
    at_once, _ = until_it_fits(run(models, tmp_path / "at-once", 2, training=LARGE))
    with at_most(3 * GIGABYTE):
        reports, recoveries = until_it_fits(run(models, tmp_path / "halved", 2, training=LARGE))
    sizes = [recovery["changes"]["training"]["batch_size"] for recovery in recoveries]
    print(f"\n64 rows in 3 GB: {sizes}")
    assert sizes == [32, 16, 8, 4, 2, 1][: len(sizes)]
    assert len(sizes) >= 2
    plan = next(data for kind, data in reports if kind == "plan")
    assert plan["spec"]["training"]["batch_size"] == sizes[-1]
    assert plan["spec"]["training"]["effective_batch_size"] == 64
    assert losses(reports) == pytest.approx(losses(at_once), rel=0.02)


def test_a_probe_without_memory_says_so(models: Catalogue, tmp_path: Path) -> None:
    with at_most(GIGABYTE), pytest.raises(torch.OutOfMemoryError):
        measure(run(models, tmp_path / "work", 2, training=LARGE))


def test_a_probe_measures_what_the_run_then_takes(models: Catalogue, tmp_path: Path) -> None:
    training = {"effective_batch_size": 16, "batch_size": 16}
    spawn.warm_up()
    try:
        probe = spawn.start("probe", run(models, tmp_path / "probe", 30, training=training), patience=120)
        reports: Reports = []
        for news in probe.news(0.5):
            reports += news
            probe.tell("beat")
        probe.close()
    finally:
        spawn.cool_down()
    (measured,) = [data for kind, data in reports if kind == "measured"]
    assert not list((tmp_path / "probe").rglob("checkpoint-*"))
    let_go()
    told: Reports = []
    reserved: list[int] = []
    began: list[float] = []

    def report(kind: str, /, **data: Any) -> None:
        told.append((kind, data))
        if kind == "metrics" and "loss" in data["values"]:
            torch.cuda.synchronize()
            began.append(time.monotonic())
            reserved.append(torch.cuda.max_memory_reserved())  # before the evaluation at the end

    sft.train(run(models, tmp_path / "run", 30, training=training), report, lambda: False)
    seconds = (began[-1] - began[10]) / (len(began) - 11)
    print(
        f"\nprobed {measured['memory_needed_bytes'] / 1e6:.0f} MB and {measured['seconds_per_step']:.3f} s a step, "
        f"taken {reserved[-1] / 1e6:.0f} MB and {seconds:.3f} s; loading {measured['load_seconds']:.1f} s"
    )
    assert measured["memory_needed_bytes"] == pytest.approx(reserved[-1], rel=0.2)
    assert 0.5 < measured["seconds_per_step"] / seconds < 2
    assert measured["memory_present_bytes"] <= torch.cuda.mem_get_info()[1]
    assert measured["device"] == torch.cuda.get_device_name()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [
        gpu.Case(rows=8, step_rows=8, checkpointing=False),
        gpu.Case(rows=16, step_rows=16),
        gpu.Case(rows=None, step_rows=16),
    ],
    ids=["kept", "computed again", "planned"],
)
def test_the_reckoned_memory_is_within_a_fifth_of_what_a_run_takes(
    case: gpu.Case, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A model of a billion random weights, in a process of its own."""
    let_go()
    model = random_model.write(tmp_path_factory.getbasetemp() / "llama-1b", "llama-1b")
    told = gpu.run("graft", gpu.asked(case, "graft", 4, model, tmp_path), 240)
    assert "error" not in told, told
    print(f"\n{case}: reckoned {told['planned_bytes'] / 1e9:.2f} GB, taken {told['gpu']}")
    assert told["planned_bytes"] == pytest.approx(told["gpu"]["reserved"], rel=0.2)
