"""The same few prompts, answered again and again while a model learns: one can watch it. Training never notices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from core.ml import prompts
from core.ml.inference import greedy
from core.ml.inference.greedy import Tick
from core.ml.prompts import Contract
from core.ml.training import ranks
from core.ml.training.config import Spec
from core.ml.training.data import Rows
from core.ml.training.loop.reporter import Report, alive

_ROWS = 3
_NEW_TOKENS = 64
# Of a plain text: what the model goes on from.
_BEGINNING = 32
# Characters of a prompt that are told; its end is what matters.
_SHOWN = 2000


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    shown: str
    expected: str | None


def prompts_of(spec: Spec, contract: Contract, rows: Rows, context: int, report: Report) -> list[Prompt]:
    """The spec's prompts, or those of the first validation rows; those that leave no room for an answer are named."""
    asked = spec.evaluation.prompts
    found = [_given(contract, text) for text in asked] if asked else _from_rows(contract, rows)
    fitting = [prompt for prompt in found if prompt.ids and len(prompt.ids) + _NEW_TOKENS <= context]
    if asked and len(fitting) < len(found):
        left_out = [number for number, prompt in enumerate(found) if prompt not in fitting]
        message = (
            f"Not answered, as they leave no room for {_NEW_TOKENS} tokens within the {context} that the model reads: "
            f"evaluation.prompts {', '.join(map(str, left_out))}."
        )
        report("note", type="prompts_left_out", level="warning", message=message, data={"prompts": left_out})
    return fitting


def _given(contract: Contract, text: str) -> Prompt:
    if contract.rows == "text":
        return Prompt(prompts.encode_beginning(contract, text), text, None)
    return Prompt(prompts.encode_prompt(contract, [{"role": "user", "content": text}]), text, None)


def _from_rows(contract: Contract, rows: Rows) -> list[Prompt]:
    """An answer is told from its prompt by the loss mask; where all of a row is trained, by its first half."""
    return [
        _of_row(contract, example["input_ids"], example["labels"]) for example in rows.valid_examples[:_ROWS]
    ]


def _of_row(contract: Contract, ids: list[int], labels: list[int]) -> Prompt:
    first = next((place for place, label in enumerate(labels) if label >= 0), 0)
    if first == 0:
        first = min(len(ids) // 2, _BEGINNING)
    stops = set(contract.stop_token_ids)
    end = next((place for place in range(first, len(ids)) if ids[place] in stops), len(ids))
    expected = ids[first : min(end, first + _NEW_TOKENS)]
    return Prompt(
        ids[:first], prompts.text_of(contract, ids[:first])[-_SHOWN:], prompts.text_of(contract, expected)
    )


def answered(
    model: Any, contract: Contract, asked: Sequence[Prompt], tick: Tick = lambda: None
) -> list[dict[str, Any]]:
    """{prompt, expected, text, finish_reason} of each prompt."""
    made = greedy.answers(model, contract, [prompt.ids for prompt in asked], _NEW_TOKENS, tick)
    return [
        {
            "prompt": prompt.shown,
            "expected": prompt.expected,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
        }
        for prompt, answer in zip(asked, made, strict=True)
    ]


class _StoppedError(Exception):
    """Somebody asked the run to leave."""


class Sampler(TrainerCallback):
    """Reports the answers at every evaluation; `told` are the steps of which it did."""

    def __init__(
        self, report: Report, stop: Callable[[], bool], contract: Contract, asked: Sequence[Prompt]
    ) -> None:
        self.report, self.stop, self.contract, self.asked = report, stop, contract, asked
        self.told: set[int] = set()

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.tell(state.global_step, model)

    def tell(self, step: int, model: Any) -> None:
        """Once a step, by the first rank; where the ranks share the model all of them have to take part."""
        shared = isinstance(model, FSDPModule)
        if not self.asked or step in self.told or not (shared or ranks.is_first()):
            return

        def tick() -> None:
            if self.stop() and not shared:  # of those that share a model none may leave alone
                raise _StoppedError

        try:
            with alive(self.report):
                made = answered(model, self.contract, self.asked, tick)
        except _StoppedError:
            return
        self.told.add(step)
        self.report("samples", step=step, samples=made)
