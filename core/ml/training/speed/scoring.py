"""The loss of the labelled positions on a CPU: two products with the words' matrix instead of trl's six.

trl multiplies tiles of the vocabulary twice, once more in the backward pass, there in single precision. Here the
gradient of a position's logit row is made while the row is there: it is linear in what comes from above, one number
a position, so that the backward pass has nothing left to multiply.
"""

from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor

from core.ml.training.spec.memory import SCORED

_TILED = trl.trainer.utils._ChunkedLogProbFunction


class LogProbabilities(torch.autograd.Function):
    """log p(target) of [positions, width] hidden states, and whether the target is the likeliest word."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Any:
        scores = hidden.new_empty(len(hidden), dtype=torch.float32)
        best = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), SCORED):
            part = slice(start, start + SCORED)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
            places = targets[part, None]
            highest, argmax = logits.max(-1, keepdim=True)
            wanted = logits.gather(-1, places) - highest
            best[part] = (argmax == places)[:, 0]
            powers = logits.sub_(highest).exp_()
            total = powers.sum(-1, keepdim=True)
            scores[part] = (wanted - total.log())[:, 0]
            if slopes is not None:
                shares = powers.div_(total.neg_())
                shares.scatter_add_(-1, places, torch.ones_like(wanted))
                slopes[part] = shares.to(weight.dtype) @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(best)
        return scores, best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _best: Any) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradient[:, None].to(slopes.dtype), None, None, None


class Scoring:
    """Stands where trl calls its own function, and calls that one for what only it can: GPUs and scaled logits."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> Any:
        plain = (temperature, softcap, scale) == (1.0, None, 1.0) and not weight.requires_grad
        if hidden.device.type != "cpu" or not plain:
            return _TILED.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )
        scores, best = LogProbabilities.apply(hidden.to(weight.dtype), weight, bias, targets)
        # The entropy is for trl's log alone, which nobody reads here.
        return scores, torch.zeros_like(scores), None, None, best


def install() -> None:
    # On a CPU trl scores every position, where nine of ten cost time and change nothing: its switch.
    trl.trainer.utils._use_triton = lambda _device: True
    trl.trainer.utils._ChunkedLogProbFunction = Scoring
