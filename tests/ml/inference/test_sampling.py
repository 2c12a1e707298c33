"""How the next token is chosen."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.ml.inference.sampling import Sampler, Sampling

CPU = torch.device("cpu")


def logits(size: int = 40, seed: int = 0, scale: float = 2) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def sampler(prompt: tuple[int, ...] = (), **settings: Any) -> Sampler:
    return Sampler(Sampling(**{"max_tokens": 1, "seed": 1, **settings}), prompt, CPU)


def drawn(count: int = 4_000, given: torch.Tensor | None = None, **settings: Any) -> Counter[int]:
    one = sampler(**settings)
    given = logits() if given is None else given
    return Counter(one._drawn(given / settings.get("temperature", 1.0)) for _ in range(count))


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_cold_takes_the_likeliest(temperature: float) -> None:
    one = sampler(temperature=temperature, top_p=0.001, top_k=1, min_p=1.0)
    assert one.choose(logits()).token == int(logits().argmax())


@pytest.mark.parametrize(
    ("settings", "warper"),
    [
        ({"temperature": 0.7}, TemperatureLogitsWarper(0.7)),
        ({"temperature": 1.0, "top_k": 5}, TopKLogitsWarper(5)),
        ({"temperature": 1.0, "top_p": 0.6}, TopPLogitsWarper(0.6)),
        ({"temperature": 1.0, "min_p": 0.2}, MinPLogitsWarper(0.2)),
    ],
)
def test_draws_are_distributed_as_transformers_has_them(settings: dict[str, float], warper: Any) -> None:
    wanted = warper(torch.tensor([[0]]), logits()[None])[0].softmax(-1)
    found = drawn(**settings)
    assert set(found) <= set(wanted.nonzero().flatten().tolist())
    for token, share in enumerate(wanted.tolist()):
        # Five standard deviations.
        assert abs(found[token] / 4_000 - share) <= 5 * math.sqrt(share * (1 - share) / 4_000) + 1e-9


def test_top_p_of_a_flat_vocabulary_looks_beyond_the_likeliest() -> None:
    given = logits(5_000, scale=0.1)
    found = drawn(20_000, given, temperature=1.0, top_p=0.9)
    allowed = TopPLogitsWarper(0.9)(torch.tensor([[0]]), given[None])[0].isfinite()
    assert len(found) > 3_000
    assert all(bool(allowed[token]) for token in found)


def test_a_tiny_top_p_leaves_the_likeliest() -> None:
    assert set(drawn(100, temperature=2.0, top_p=1e-9)) == {int(logits().argmax())}


def test_repetition_penalty_is_that_of_transformers() -> None:
    prompt = (3, 7, 7)
    one = sampler(prompt, repetition_penalty=1.7)
    one.new[11] += 1
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 7, 7, 11]]), logits()[None])[0]
    assert torch.equal(one._adjusted(logits()), wanted)


def test_presence_and_frequency_count_what_was_written() -> None:
    one = sampler((3,), presence_penalty=0.5, frequency_penalty=0.25)
    one.new.update([7, 7, 9])
    change = one._adjusted(logits()) - logits()
    expected = torch.zeros(40)
    expected[7], expected[9] = -1.0, -0.75
    assert torch.allclose(change, expected, atol=1e-6)


def test_bias_forces_and_forbids() -> None:
    best = int(logits().argmax())
    assert sampler(logit_bias={best: -100}).choose(logits()).token != best
    assert sampler(logit_bias={2: 100}).choose(logits()).token == 2


def test_log_probabilities_are_the_models_own() -> None:
    own = logits().log_softmax(-1)
    choice = sampler(logprobs=3, temperature=0.3, top_k=2, logit_bias={4: 100}).choose(logits())
    assert choice.token == 4
    assert choice.logprob == pytest.approx(float(own[4]))
    assert list(choice.top) == own.topk(3).indices.tolist()
    assert list(choice.top.values()) == pytest.approx(own.topk(3).values.tolist())
    assert sampler(logprobs=0).choose(logits()).top == {}
    assert sampler().choose(logits()).logprob is None


def test_a_seed_gives_the_same_draws_and_another_gives_others() -> None:
    def draws(seed: int | None) -> list[int]:
        one = sampler(temperature=1.0, seed=seed)
        return [one.choose(logits(seed=step)).token for step in range(20)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_the_last_digits_change_no_draw() -> None:
    """Neighbours in a batch change them. Nearly equal tokens must not be exchanged."""
    given = torch.zeros(1_000)
    for seed in range(50):
        noise = torch.randn(1_000, generator=torch.Generator().manual_seed(seed)) * 1e-6
        settings = {"temperature": 1.0, "seed": seed, "top_k": 0}
        assert sampler(**settings).choose(given).token == sampler(**settings).choose(given + noise).token


def test_the_logits_stay_as_they_are() -> None:
    given = logits()
    one = sampler(
        (1, 2), repetition_penalty=1.3, presence_penalty=1, logit_bias={1: 5}, top_p=0.5, temperature=1
    )
    one.choose(given)
    one.choose(given)
    assert torch.equal(given, logits())
