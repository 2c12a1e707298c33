"""A training on two GPUs, each process holding the model or half of it: the losses are those of one GPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from core.ml.training.run import Run
from tests.gpu.runs import catalogue_in, run
from tests.ml.runs import Reports, saved, series
from worker.child import spawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

SPEC: dict[str, Any] = {
    "training": {"batch_size": 1, "optimizer": "adamw", "learning_rate": 5e-4},
    "evaluation": {"every_steps": 5},
    "checkpoints": {"every_steps": 5},
}


@pytest.fixture(autouse=True, scope="module")
def _warm() -> Iterator[None]:
    spawn.warm_up()
    yield
    spawn.cool_down()


def trained(given: Run) -> Reports:
    """All reports, from the process that a worker would start."""
    process = spawn.start("train", given, "job", patience=60)
    reports: Reports = []
    try:
        for news in process.news(0.2):
            process.tell("beat")
            reports += news
    finally:
        process.close()
    assert reports[-1][0] == "done", reports[-1]
    return reports


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_gpus_give_the_losses_of_one_and_resume(tmp_path: Path, sharding: Literal["ddp", "fsdp"]) -> None:
    models = catalogue_in(tmp_path)
    alone = trained(run(models, tmp_path / "one", 10, **SPEC))
    two = replace(run(models, tmp_path / "two", 10, **SPEC), processes=2, sharding=sharding)
    both = trained(two)
    for name in ("loss", "eval_loss"):
        assert series(both, name) == pytest.approx(series(alone, name), rel=0.02), name
    weights = load_file(Path(both[-1][1]["folder"]) / "adapter_model.safetensors")
    assert weights.keys() == load_file(Path(alone[-1][1]["folder"]) / "adapter_model.safetensors").keys()
    assert all(tensor.dtype is torch.float32 for tensor in weights.values())
    resume = replace(two, work=tmp_path / "resumed", resume=saved(both)[5])
    resume.work.mkdir()
    resumed = series(trained(resume), "loss")
    assert list(resumed) == [6, 7, 8, 9, 10]
    assert resumed == pytest.approx({step: series(both, "loss")[step] for step in resumed}, rel=1e-3)
    memory = {
        name: max(series(reports, "memory_bytes").values())
        for name, reports in [("one", alone), ("two", both)]
    }
    print(f"\n{sharding}: peak memory of a GPU {memory}")
