"""In half precision no two batches round alike, so answers are judged by what a request alone thinks of their tokens."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel

from core.ml import base_model, catalogue
from core.ml.base_model import Precision
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from tests import tiny
from tests.ml.inference import strong
from tests.ml.inference.asking import ask

# No end token: every answer is of the same length.
SAMPLING = Sampling(24, logit_bias={2: -1e4})
PROMPTS = [strong.prompt(length, seed=9) for length in (3, 20, 45)]


def regret(
    models: Catalogue, precision: Precision, folder: Path | None, told: list[list[int]]
) -> torch.Tensor:
    """How far the logit of each token lies below the highest, as the model alone sees it."""
    model = base_model.load(catalogue.find(models, tiny.NAME), precision).eval()
    base_model.unfuse(model)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    found = []
    for prompt, tokens in zip(PROMPTS, told, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        logits[:, 2] = -torch.inf
        found.append(logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)])
    return torch.cat(found)


@pytest.mark.parametrize("bits", [16, 4])
def test_no_token_is_one_that_a_request_alone_would_not_have_taken(
    models: Catalogue, adapters: list[Path], bits: Literal[4, 16]
) -> None:
    precision = Precision(bits=bits, type="nf4", double_quant=True, dtype="bfloat16")
    engine = Engine(models, precision)
    folders = {tiny.NAME: None, **{f"ad_{number}": adapters[number] for number in range(4)}}
    for name, folder in folders.items():
        if folder is not None:
            engine.register(name, tiny.NAME, folder)
    heard = {name: [ask(engine, name, prompt, SAMPLING) for prompt in PROMPTS] for name in folders}
    told = {name: [one.wait().tokens for one in ones] for name, ones in heard.items()}
    engine.close()
    names = list(folders)
    for place, name in enumerate(names):
        right = regret(models, precision, folders[name], told[name])
        wrong = regret(models, precision, folders[names[place - 1]], told[name])
        assert right.max() <= 0.25
        assert wrong.mean() >= 100 * right.mean()


def test_an_adapter_that_dequantises_its_base_answers_as_peft_alone(
    models: Catalogue, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """The batch has the weights packed by then; from packed ones peft computes other norms."""
    precision = Precision(bits=4, type="nf4", double_quant=True, dtype="bfloat16")
    engine = Engine(models, precision)
    dora = strong.adapter(tmp_path / "dora", base, 3, use_dora=True)
    engine.register("dora", tiny.NAME, dora)
    engine.register("ad", tiny.NAME, adapters[0])
    try:
        before = [ask(engine, "ad", prompt, SAMPLING).wait().tokens for prompt in PROMPTS]
        told = [ask(engine, "dora", prompt, SAMPLING).wait().tokens for prompt in PROMPTS]
        after = [ask(engine, "ad", prompt, SAMPLING).wait().tokens for prompt in PROMPTS]
    finally:
        engine.close()
    assert regret(models, precision, dora, told).max() <= 0.25
    for tokens in (before, after):
        assert regret(models, precision, adapters[0], tokens).max() <= 0.25
