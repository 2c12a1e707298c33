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
    assert len(vllm.bodies) == 7
    salts = {one["cache_salt"] for one in vllm.bodies}
    assert len(salts) == 7
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
    assert verdict(several(0, draw), several(0, draw)) == "inert"
    # However little it changes where nothing else does.
    assert verdict(several(0, draw, effect=1e-7), several(0, draw)) == "at work"


def several(noise: float, draw: random.Random, effect: float = 0.0) -> list[dict[str, Any]]:
    return [base(noise, draw, effect) for _ in range(3)]


def test_a_difference_counts_from_twice_that_to_itself() -> None:
    draw = random.Random(1)

    def said(effect: float) -> list[str]:
        return [verdict(several(0.05, draw, effect), several(0.05, draw)) for _ in range(300)]

    assert said(0.0).count("at work") == 0
    assert said(0.3).count("at work") == 300
    assert "inert" not in said(0.0)


def test_another_text_is_an_effect() -> None:
    draw = random.Random(2)
    other = told([{f"token_id:{n}": -float(n) for n in range(9, 14)}])
    assert verdict([other] * 3, several(0.05, draw)) == "at work"


@pytest.mark.parametrize("often", [0.1, 0.3, 0.5])
def test_noise_that_comes_and_goes_is_no_effect(often: float) -> None:
    """As that of other requests in the batch, which are there for some answers and not for others."""
    draw = random.Random(3)

    def one() -> dict[str, Any]:
        return base(1e-3 if draw.random() < often else 0, draw)

    found = [verdict([one() for _ in range(3)], [one() for _ in range(3)]) for _ in range(1000)]
    assert found.count("at work") == 0


def test_one_that_tells_no_probabilities_is_not_taken_for_one_at_work() -> None:
    nothing: list[dict[str, Any] | None] = [
        None,
        {"tokens": [], "top_logprobs": None},
        {"top_logprobs": [None]},
    ]
    for one in nothing:
        assert verdict([one] * 3, [one] * 3) == "inert"
