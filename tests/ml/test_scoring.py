"""The loss of labelled positions: what torch and trl give for the same logits."""

import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from core.ml.training.speed.scoring import Scoring

PLAIN = (1.0, 64, None, 1.0, ("log_probs", "entropy", "is_top1"))


def inputs(positions: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, 32, generator=made).requires_grad_()
    return hidden, torch.randn(97, 32, generator=made), torch.randint(0, 97, (positions,), generator=made)


def test_scores_and_gradients_are_those_of_cross_entropy() -> None:
    # More positions than are in memory at once.
    hidden, weight, targets = inputs()
    scores, _, _, _, best = Scoring.apply(hidden, weight, None, targets, *PLAIN)
    weights = torch.linspace(0.1, 2, len(targets))
    (got,) = torch.autograd.grad((scores * weights).sum(), hidden)
    logits = hidden @ weight.T
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (wanted,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(best, logits.argmax(-1) == targets)


def test_they_are_those_of_trls_own_function_too() -> None:
    hidden, weight, targets = inputs(50)
    bias = torch.linspace(-1, 1, len(weight))
    ours = Scoring.apply(hidden, weight, bias, targets, *PLAIN)
    theirs = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *PLAIN)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[4], theirs[4])


def test_no_labelled_position_is_a_zero_that_can_be_differentiated() -> None:
    hidden, weight, targets = inputs(0)
    scores = Scoring.apply(hidden, weight, None, targets, *PLAIN)[0]
    scores.sum().backward()
    assert scores.shape == (0,)
    assert hidden.grad is not None


def test_scaled_logits_are_left_to_trl() -> None:
    hidden, weight, targets = inputs(20)
    scaled = (1.0, 64, 30.0, 0.5, PLAIN[4])
    ours = Scoring.apply(hidden, weight, None, targets, *scaled)
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, *scaled)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].abs().sum() > 0
