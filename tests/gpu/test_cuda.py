"""What only a CUDA device can show. Needs no database and no fixture of the other tests:

pytest --noconftest -n0 -m gpu -s tests/gpu
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from core.ml.quantization import Quantization
from core.ml.training import sft
from tests.gpu.runs import MODEL, ROOT, catalogue_in, run
from tests.ml.inference.asking import ask
from worker.child import spawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_in(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trained(models: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> sft.Result:
    reports: list[tuple[str, dict[str, Any]]] = []
    started = time.monotonic()
    torch.cuda.reset_peak_memory_stats()
    result = sft.train(
        run(models, tmp_path_factory.mktemp("run") / "work", 80),
        lambda kind, /, **data: reports.append((kind, data)),
        lambda: False,
    )
    seconds = time.monotonic() - started
    plan = next(data for kind, data in reports if kind == "plan")
    assert plan["spec"]["quantization"]["compute_dtype"] == "bfloat16"
    print(
        f"\n{torch.cuda.get_device_name()}: 80 steps in {seconds:.1f} s with loading, "
        f"peak {torch.cuda.max_memory_allocated() / 1e6:.0f} MB, {result.metrics}"
    )
    return result


def test_qlora_trains_on_cuda(trained: sft.Result) -> None:
    assert trained.metrics["eval_loss"] < 0.5 * trained.metrics["base_eval_loss"]


def test_the_base_is_in_four_bits(models: Catalogue) -> None:
    model = base_model.load(catalogue.find(models, MODEL), base_model.settle(Quantization()))
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.device.type == "cuda"


def test_the_engine_answers_on_cuda_with_the_adapter(models: Catalogue, trained: sft.Result) -> None:
    from core.ml import prompts

    assert trained.adapter is not None
    engine = Engine(models, base_model.settle(Quantization()))
    engine.register("ad@1", MODEL, trained.adapter)
    contract = contracts.load(trained.adapter)
    rows = [
        json.loads(line) for line in (ROOT / "examples/text_to_sql/valid.jsonl").read_text().splitlines()[:20]
    ]
    heard = {MODEL: [], "ad@1": []}
    for row in rows:
        messages = [
            {"role": "system", "content": f"Answer with SQL.\n{row['context']}"},
            {"role": "user", "content": row["question"]},
        ]
        for name, answers in heard.items():
            answers.append(ask(engine, name, prompts.encode_prompt(contract, messages), Sampling(48)))
    right = {
        name: sum(one.wait().text == row["answer"] for one, row in zip(answers, rows, strict=True))
        for name, answers in heard.items()
    }
    engine.close()
    print(f"\nexact answers of 20: {right}")
    assert right["ad@1"] >= right[MODEL] + 10


def test_trainers_of_the_fork_server_reach_the_device(models: Catalogue, tmp_path: Path) -> None:
    """CUDA must not be open in the server, or its children cannot use it; two of them, one after the other."""
    spawn.warm_up()
    for number in range(2):
        posted = time.monotonic()
        trainer = spawn.start("train", run(models, tmp_path / str(number), 3), "job", patience=60)
        reports: list[tuple[str, dict[str, Any]]] = []
        for news in trainer.news(0.2):
            reports += news
            first = [data for kind, data in news if kind == "first_step"]
            if first:
                print(f"\nchild {number}: first step {time.monotonic() - posted:.2f} s after its start")
        assert any(kind == "done" for kind, _ in reports), reports[-1]
        trainer.close()
    spawn.cool_down()
