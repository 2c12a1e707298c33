"""The prompt contract: the one place where a conversation becomes tokens and a loss mask.

Preview, training, evaluation and generation all call `encode`, so they cannot differ in a token.
Needs transformers' tokenizers only, no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from core.errors import BadRequest

LossOn = Literal["assistant", "completion", "all"]
Message = Mapping[str, Any]

CONTRACT_FILE = "prompt_contract.json"
# The turn-end token need not be the very last trained one: many templates add a line break.
_TAIL = 3


@dataclass(frozen=True)
class Contract:
    """A tokenizer with its chat template and the tokens that end an answer."""

    tokenizer: Any
    stop_token_ids: tuple[int, ...]

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation; `trained[i]` says whether the loss counts token i.

    `prompt` counts the tokens before the first answer that `loss_on` is about.
    """

    ids: list[int]
    trained: list[bool]
    prompt: int


def load(folder: Path) -> Contract:
    """The contract of a base model or an adapter, from its folder.

    Raises:
        BadRequest: `no_chat_template` or `eos_not_trained`, when the tokenizer cannot carry a chat.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    if not isinstance(tokenizer.chat_template, str):
        raise BadRequest(
            "no_chat_template",
            "The base model has no chat template, so conversations cannot be written for it.",
            hint="Choose the instruction-tuned (chat) version of this model.",
        )
    saved = folder / CONTRACT_FILE
    if saved.is_file():
        stops = tuple(json.loads(saved.read_text())["stop_token_ids"])
    else:
        stops = _stop_token_ids(tokenizer, folder)
    return Contract(tokenizer, stops)


@lru_cache(maxsize=8)
def load_cached(folder: Path) -> Contract:
    """`load` for a server. The folder's content must never change under the same path."""
    return load(folder)


def save(contract: Contract, folder: Path) -> None:
    """Write the tokenizer, the chat template and the contract beside an adapter."""
    contract.tokenizer.save_pretrained(str(folder))
    sample = _sample()
    encoded = encode(contract, sample, loss_on="assistant")
    (folder / CONTRACT_FILE).write_text(
        json.dumps(
            {
                "version": 1,
                "template_sha256": contract.template_sha256,
                "stop_token_ids": list(contract.stop_token_ids),
                "bos_token_id": contract.tokenizer.bos_token_id,
                "control_tokens_in_content": "encoded as plain text",
                "sample": {"messages": sample, "ids": encoded.ids, "trained": encoded.trained},
            },
            indent=2,
        )
        + "\n"
    )


def encode(contract: Contract, messages: Sequence[Message], *, loss_on: LossOn = "assistant") -> Encoded:
    """Tokens and loss mask of a whole conversation.

    The mask goes by position: the tokens that an assistant turn adds to the conversation before it.
    This needs every shorter conversation to be a prefix of the longer one, token by token, and is
    refused where a template rewrites earlier turns.

    Raises:
        BadRequest: `template_not_stable`, `double_bos` or `template_error`.
    """
    ids = _apply(contract, messages, answer_next=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if loss_on == "all":
        prompt = len(_apply(contract, messages[: turns[0]], answer_next=True)) if turns else len(ids)
        return Encoded(ids, [True] * len(ids), prompt)
    trained = [False] * len(ids)
    for turn in turns if loss_on == "assistant" else turns[-1:]:
        before = _apply(contract, messages[:turn], answer_next=True)
        after = (
            ids if turn + 1 == len(messages) else _apply(contract, messages[: turn + 1], answer_next=False)
        )
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise BadRequest(
                "template_not_stable",
                f"The chat template writes messages[{turn}] differently when it is the last turn, "
                "so the trained part cannot be marked with certainty.",
                param=f"messages[{turn}]",
                hint="Use conversations that end with this turn, or another base model.",
            )
        trained[len(before) : len(after)] = [True] * (len(after) - len(before))
    return Encoded(ids, trained, next((i for i, on in enumerate(trained) if on), len(ids)))


def encode_prompt(contract: Contract, messages: Sequence[Message]) -> list[int]:
    """The tokens after which the model answers: the same prefix that training saw."""
    return _apply(contract, messages, answer_next=True)


def encode_plain(contract: Contract, text: str) -> list[int]:
    """Raw text, with the special tokens its tokenizer adds by itself and no template."""
    return list(contract.tokenizer(text)["input_ids"])


def ends_trained(contract: Contract, encoded: Encoded) -> bool:
    """Whether the end of the answer is among what is learned."""
    tail = [token for token, trained in zip(encoded.ids, encoded.trained, strict=True) if trained][-_TAIL:]
    return any(token in contract.stop_token_ids for token in tail)


def text_of(contract: Contract, ids: list[int]) -> str:
    return str(contract.tokenizer.decode(ids))


def pieces(contract: Contract, ids: list[int]) -> list[str]:
    """Each token's own text; a token that holds a part of a character shows as `\\ufffd`."""
    return [str(contract.tokenizer.decode([token])) for token in ids]


def _apply(contract: Contract, messages: Sequence[Message], *, answer_next: bool) -> list[int]:
    try:
        ids: list[int] = contract.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=answer_next,
            tokenize=True,
            return_dict=True,
            # Control tokens inside what people wrote stay text: nobody can forge a turn.
            sanitize_control_tokens=True,
        )["input_ids"]
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise BadRequest("template_error", f"The chat template refuses this conversation: {error}") from error
    bos = contract.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise BadRequest("double_bos", "The chat template and the tokenizer both add a start token.")
    return ids


def _sample() -> list[Message]:
    return [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "hello"}]


def _stop_token_ids(tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """The token that the template writes after an answer, and those the model's makers stop at."""
    stops = []
    sample = _sample()
    bare = Contract(tokenizer, ())
    encoded = encode(bare, sample)
    answer = [token for token, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    special = set(tokenizer.added_tokens_decoder)
    stops += [token for token in answer[-_TAIL:] if token in special][:1]
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = json.loads(generation.read_text()).get("eos_token_id")
        stops += eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not any(token in stops for token in answer[-_TAIL:]):
        raise BadRequest(
            "eos_not_trained",
            "The chat template ends an answer without an end token, so the model would never learn to stop.",
            hint="Use a base model whose chat template ends each turn with a token of its own.",
        )
    return tuple(dict.fromkeys(stops))
