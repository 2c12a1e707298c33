"""Whether an adapter is at work on an engine that does not vouch for it."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.engine.client import Engine, Target
from api.engine.effect import verdict
from core.errors import GraftError
from tests import tiny
from tests.serving.vllm import Vllm

PROMPT = list(range(3, 400))


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    made = Vllm(tiny.NAME)
    yield made
    made.stop()


@pytest.fixture
def target(tmp_path: Path) -> Target:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return Target("ad_a@0123", tiny.NAME, str(tmp_path))


def asked(vllm: Vllm, target: Target, **options: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        engine = Engine(vllm.url, None)
        try:
            return await engine.complete(target, PROMPT, {"max_tokens": 3, **options})
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.05])
def test_one_that_is_passed_over_is_refused_however_the_last_digits_differ(
    vllm: Vllm, target: Target, noise: float
) -> None:
    vllm.noise, vllm.passes_over = noise, True
    with pytest.raises(GraftError) as caught:
        asked(vllm, target)
    assert (caught.value.code, caught.value.status) == ("adapter_inert", 502)
    vllm.passes_over = False
    vllm.restart()
    assert asked(vllm, target)["choices"]


def test_it_is_tried_under_salts_of_nobody_else(vllm: Vllm, target: Target) -> None:
    """Or what the engine knows of a prompt, of this project or another, would change the numbers."""
    asked(vllm, target, cache_salt="ours")
    assert len(vllm.bodies) == 4
    salts = {one["cache_salt"] for one in vllm.bodies}
    assert len(salts) == 4
    assert all(len(salt) >= 16 for salt in salts - {"ours"})
    assert all(len(one["prompt"]) == 256 for one in vllm.bodies[:-1])


def test_a_base_under_another_name_is_said_of_adapters_too(vllm: Vllm, target: Target) -> None:
    vllm.served_name = "another/name"
    with pytest.raises(GraftError) as caught:
        asked(vllm, target)
    assert (caught.value.code, caught.value.status) == ("model_not_served", 503)


def told(values: list[dict[str, float]]) -> dict[str, Any]:
    return {"tokens": [max(one, key=lambda token: one[token]) for one in values], "top_logprobs": values}


def base(noise: float, draw: random.Random, effect: float = 0.0) -> dict[str, Any]:
    return told(
        [
            {f"token_id:{n}": -n - place / 7 + draw.gauss(0, noise) + effect * (-1) ** n for n in range(5)}
            for place in range(8)
        ]
    )


def test_the_same_numbers_are_of_one_that_is_inert() -> None:
    draw = random.Random(0)
    assert verdict(base(0, draw), (base(0, draw), base(0, draw))) == "inert"
    # However little it changes where nothing else does.
    assert verdict(base(0, draw, effect=1e-7), (base(0, draw), base(0, draw))) == "at work"


def test_a_difference_counts_from_twice_that_of_the_base_to_itself() -> None:
    draw = random.Random(1)

    def said(effect: float) -> list[str]:
        return [verdict(base(0.05, draw, effect), (base(0.05, draw), base(0.05, draw))) for _ in range(300)]

    # One wrong yes in three tries would be one in a hundred here.
    assert said(0.0).count("at work") <= 1
    assert said(0.3).count("at work") == 300
    assert "inert" not in said(0.0)


def test_another_text_is_an_effect() -> None:
    draw = random.Random(2)
    other = told([{f"token_id:{n}": -float(n) for n in range(9, 14)}])
    assert verdict(other, (base(0.05, draw), base(0.05, draw))) == "at work"


def test_one_that_tells_no_probabilities_is_not_taken_for_one_at_work() -> None:
    assert verdict(None, (None, None)) == "inert"
    assert (
        verdict({"top_logprobs": None, "tokens": []}, ({"top_logprobs": None, "tokens": []},) * 2) == "inert"
    )
