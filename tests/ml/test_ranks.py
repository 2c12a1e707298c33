"""A training in two processes on the CPU, started as a worker starts it: the same losses as one process gives."""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from torch import allclose

from core import log
from core.errors import BadRequest
from core.ml.training import plan
from core.ml.training.config import Spec, settle
from core.ml.training.files import checkpoints
from core.ml.training.run import Run
from tests.ml import runs
from tests.ml.runs import MakeRun, Reports, saved, series
from worker.child import spawn, trainer

# Ten rows in an epoch of three steps: the last one is half a step, and one rank has no row left.
PRECISE: dict[str, Any] = {
    "quantization": {"bits": 16, "compute_dtype": "float32"},
    "training": {"batch_size": 2, "max_steps": 7, "learning_rate": 0.01},
    "evaluation": {"every_steps": 3},
}
NF4: dict[str, Any] = {"training": {"batch_size": 2, "max_steps": 30}, "checkpoints": {"every_steps": 10}}


@pytest.fixture
def few(make_run: MakeRun, tmp_path: Path) -> MakeRun:
    """Runs of 10 training and 7 validation rows."""
    train = runs.source(runs.ROWS[:10], tmp_path / "few.jsonl")
    valid = runs.source(runs.ROWS[10:17], tmp_path / "valid.jsonl")
    return lambda *args, **spec: replace(make_run(*args, **spec), train=train, valid=valid)


def in_two(run: Run) -> Run:
    return replace(run, processes=2)


@pytest.fixture
def start() -> Iterator[Callable[[Run], spawn.Child]]:
    started: list[spawn.Child] = []

    def begin(run: Run) -> spawn.Child:
        spawn.warm_up()
        started.append(spawn.start("train", run, "job", patience=60))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def watched(process: spawn.Child, on_step: Callable[[int], None]) -> Reports:
    """All reports of a trainer; `on_step` is told of every step it has made."""
    reports: Reports = []
    until = time.monotonic() + 120
    for news in process.news(0.2):
        assert time.monotonic() < until
        process.tell("beat")
        reports += news
        for kind, data in news:
            if kind == "metrics" and data["progress"]:
                on_step(data["step"])
    return reports


def test_two_processes_give_the_losses_and_the_adapter_of_one(few: MakeRun) -> None:
    alone, expected = runs.train(few("one", **PRECISE))
    reports: Reports = []
    trainer.train(
        in_two(few("two", **PRECISE)),
        "job",
        lambda kind, /, **data: reports.append((kind, data)),
        lambda: False,
    )
    kind, done = reports[-1]
    assert kind == "done", done
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert series(reports, name) == pytest.approx(series(expected, name), rel=1e-5), name
    assert done["metrics"].pop("train_seconds") > 0
    assert done["metrics"] == pytest.approx(alone.metrics, rel=1e-5)
    assert [data for kind, data in reports if kind == "samples"] == [
        data for kind, data in expected if kind == "samples"
    ]
    assert alone.adapter is not None
    one, two = (
        load_file(Path(folder) / "adapter_model.safetensors") for folder in (alone.adapter, done["folder"])
    )
    assert one.keys() == two.keys()
    assert all(allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def test_two_processes_stop_resume_and_end_together(
    few: MakeRun, start: Callable[[Run], spawn.Child]
) -> None:
    _, whole = runs.train(few("one", **NF4))
    expected = series(whole, "loss")
    first = start(in_two(few("first", **NF4)))
    reports = watched(first, lambda step: first.tell("stop") if step == 2 else None)
    assert reports[-1] == ("stopped", {})
    (step,) = saved(reports)
    assert step < 10
    folder = saved(reports)[step]
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {file.name for file in folder.iterdir()}

    second = start(in_two(few("second", resume=folder, **NF4)))
    family: list[psutil.Process] = []

    def kill_one(at: int) -> None:
        if at == step + 4:
            family.extend(psutil.Process(second.process.pid).children(recursive=True))
            ranks = [one for one in family if one.cmdline()[-2:] == ["-m", "worker.child.rank"]]
            assert len(ranks) == 2
            ranks[1].send_signal(signal.SIGKILL)

    resumed = watched(second, kill_one)
    # A crash as that of one process, from which the worker goes on; and none is left behind.
    assert second.exit_code == -signal.SIGKILL
    assert not {kind for kind, _ in resumed} & {"done", "stopped", "again", "error"}
    assert len(family) == 3
    assert not psutil.wait_procs(family, timeout=5)[1]
    told = series(reports, "loss") | series(resumed, "loss")
    assert list(told) == list(range(1, len(told) + 1))
    assert len(told) >= step + 4
    assert list(told.values()) == pytest.approx([expected[at] for at in told], rel=1e-4)


def test_a_fault_of_one_process_is_no_lack_of_memory(
    few: MakeRun, start: Callable[[Run], spawn.Child]
) -> None:
    run = in_two(few("broken", **NF4))
    process = start(run)

    def break_one(at: int) -> None:
        if at == 2:
            family = psutil.Process(process.process.pid).children(recursive=True)
            ranks = [one for one in family if one.cmdline()[-2:] == ["-m", "worker.child.rank"]]
            ranks[1].send_signal(signal.SIGSEGV)

    told = watched(process, break_one)
    assert process.exit_code == 1
    assert not {kind for kind, _ in told} & {"done", "stopped", "again", "error"}
    assert "Segmentation fault" in (run.work / log.FILE).read_text()


@pytest.mark.parametrize(
    ("training", "param"),
    [
        ({"effective_batch_size": 9}, "training.effective_batch_size"),
        ({"effective_batch_size": 8, "batch_size": 8}, "training.batch_size"),
    ],
)
def test_a_step_that_cannot_be_divided_is_refused(training: dict[str, Any], param: str) -> None:
    spec = settle(Spec.model_validate({"training": training}))
    with pytest.raises(BadRequest) as caught:
        plan._share(spec.training, 2)
    assert (caught.value.code, caught.value.param) == ("batch_not_divisible", param)
    assert plan._share(spec.training, 1) == training["effective_batch_size"]


def test_more_processes_than_devices_are_refused(make_run: MakeRun) -> None:
    """Sharing a model needs GPUs, and the CPU of a test has none."""
    reports: Reports = []
    run = replace(make_run(), processes=64, sharding="fsdp")
    trainer.train(run, "job", lambda kind, /, **data: reports.append((kind, data)), lambda: False)
    ((kind, data),) = reports
    assert (kind, data["code"]) in [("error", "sharding_needs_gpus"), ("error", "too_few_devices")]


def test_a_checkpoint_without_a_ranks_random_states_is_not_sealed(tmp_path: Path) -> None:
    for name in checkpoints.required(2) - {"rng_state_1.pth"}:
        (tmp_path / name).touch()
    with pytest.raises(RuntimeError, match=r"rng_state_1\.pth"):
        checkpoints.seal(tmp_path, 2)
