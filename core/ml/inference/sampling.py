"""How the next token is chosen: per request, from float32 logits."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Below it, dividing by the temperature leaves one token only.
_COLD = 1e-4
# The likely tokens among which top_p nearly always finds its share; sorting the whole vocabulary takes ten times as long.
_LIKELY = 512


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token each time. `logprobs`: how many of the most likely tokens are told with
    each that was taken; None tells nothing."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether it takes the most likely token of the logits as they are, and tells nothing of them."""
        return (
            self.temperature < _COLD
            and self.repetition_penalty == 1
            and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
            and self.logprobs is None
        )


@dataclass(frozen=True)
class Choice:
    """A token that was taken. `logprob` and `top` (the likeliest first) are the model's own, before temperature,
    penalties and bias."""

    token: int
    logprob: float | None = None
    top: Mapping[int, float] = field(default_factory=dict)


class Sampler:
    """Chooses the tokens of one answer; its draws depend on its seed alone."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], device: torch.device) -> None:
        self.sampling = sampling
        self.read = set(prompt)
        self.new: Counter[int] = Counter()
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> Choice:
        """From float32 [vocabulary], which stays as it is."""
        adjusted = self._adjusted(logits)
        if self.sampling.temperature < _COLD:
            token = int(adjusted.argmax())
        else:
            token = self._drawn(adjusted / self.sampling.temperature)
        self.new[token] += 1
        if self.sampling.logprobs is None:
            return Choice(token)
        own = logits.log_softmax(-1)
        values, ids = own.topk(min(self.sampling.logprobs, len(own)))
        return Choice(token, float(own[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))

    def _adjusted(self, logits: Tensor) -> Tensor:
        asked = self.sampling
        if asked.repetition_penalty != 1:
            seen = torch.tensor(sorted(self.read | self.new.keys()), device=logits.device)
            values = logits[seen]
            values = torch.where(
                values > 0, values / asked.repetition_penalty, values * asked.repetition_penalty
            )
            logits = logits.index_copy(0, seen, values)
        if self.new and (asked.presence_penalty or asked.frequency_penalty):
            penalties = {
                token: -asked.presence_penalty - asked.frequency_penalty * count
                for token, count in self.new.items()
            }
            logits = _added(logits, penalties)
        return _added(logits, asked.logit_bias) if asked.logit_bias else logits

    def _drawn(self, logits: Tensor) -> int:
        """The rest of the vocabulary is masked where it stands: every token keeps its own random number, so that what
        neighbours in the batch change in the last digit cannot exchange two tokens."""
        asked = self.sampling
        if 0 < asked.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(asked.top_k).values[-1], -torch.inf)
        if asked.top_p < 1:
            logits = logits.masked_fill(logits < _threshold(logits, asked.top_p), -torch.inf)
        probabilities = logits.softmax(-1)
        if asked.min_p > 0:
            probabilities = probabilities * (probabilities >= asked.min_p * probabilities.max())
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def _added(logits: Tensor, amounts: Mapping[int, float]) -> Tensor:
    places = torch.tensor(list(amounts), device=logits.device)
    return logits.index_add(
        0, places, torch.tensor(list(amounts.values()), dtype=logits.dtype, device=logits.device)
    )


def _threshold(logits: Tensor, top_p: float) -> Tensor:
    """The logit of the last of the likeliest tokens that together have `top_p` of the probability."""
    total = logits.logsumexp(-1)
    for count in (min(_LIKELY, len(logits)), len(logits)):
        values = logits.topk(count).values
        shares = (values - total).exp().cumsum(-1)
        if count == len(logits) or shares[-1] >= top_p:
            return values[min(int((shares < top_p).sum()), count - 1)]
    raise AssertionError
