"""Answers of a model to many prompts at a time, always with its most likely token: for samples and for the proof."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from core.ml import prompts
from core.ml.prompts import Contract

# Tokens of prompts and answers that a batch may hold: each new token copies the keys and values of all of them.
_TOKENS = 8_192

# Called again and again, to show that the work goes on; raises to end it.
Tick = Callable[[], None]


@dataclass(frozen=True)
class Answer:
    """`stop`: the model ended the answer itself; `length`: it was cut."""

    text: str
    finish_reason: Literal["stop", "length"]


def answers(
    model: Any, contract: Contract, asked: Sequence[list[int]], limit: int, tick: Tick = lambda: None
) -> list[Answer]:
    """An answer of at most `limit` tokens to each of the prompts, which are token ids.

    The random state, the mode of the model and its own settings of generation stay as they are.
    """
    found: dict[int, Answer] = {}
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
    while order:
        size = max(1, _TOKENS // (len(asked[order[-1]]) + limit))
        order, places = order[:-size], order[-size:]
        made = tokens(model, contract, [asked[place] for place in places], limit, tick)
        found |= {place: _answer(contract, new) for place, new in zip(places, made, strict=True)}
    return [found[place] for place in range(len(asked))]


def tokens(
    model: Any, contract: Contract, batch: Sequence[list[int]], limit: int, tick: Tick = lambda: None
) -> list[list[int]]:
    """The new tokens of each prompt, read together; with whatever fills them up after their end."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    stops = contract.stop_token_ids
    longest = max(map(len, batch))
    # Padded on the left: an answer must follow its prompt at once.
    ids = [[stops[0]] * (longest - len(prompt)) + prompt for prompt in batch]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]
    training, makers = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()  # penalties of the model's makers must not mix in
    asking: Any = base
    if isinstance(model, FSDPModule):  # its parts come together at the door of the whole model
        asking = model
        asking.generation_config = base.generation_config
    try:
        with torch.random.fork_rng():
            made = asking.generate(
                input_ids=torch.tensor(ids, device=base.device),
                attention_mask=torch.tensor(mask, device=base.device),
                generation_config=GenerationConfig(
                    max_new_tokens=limit, do_sample=False, eos_token_id=list(stops), pad_token_id=stops[0]
                ),
                stopping_criteria=StoppingCriteriaList([_Ticking(tick)]),
            )
    finally:
        base.generation_config = makers
        model.train(training)
    return [new[longest:] for new in made.tolist()]


def _answer(contract: Contract, new: list[int]) -> Answer:
    end = next((place for place, token in enumerate(new) if token in contract.stop_token_ids), None)
    return Answer(prompts.text_of(contract, new[:end]), "length" if end is None else "stop")


class _Ticking(StoppingCriteria):
    """Ticks with every token, and ends nothing."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
