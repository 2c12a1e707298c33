"""The prompt contract of a base model or an adapter: made from a tokenizer, kept with the adapter, checked when read."""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

from transformers import PreTrainedTokenizerFast

from core.errors import BadRequest, GraftError
from core.ml import prompts, rendering, tokens
from core.ml.formats.chat.example import Conversation, Turn
from core.ml.prompts import Contract
from core.ml.rendering import Styles

CONTRACT_FILE = "prompt_contract.json"
_VERSION = 2
_SAMPLE = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "hello"}]


def load(folder: Path) -> Contract:
    """The contract that lies in a folder.

    Raises:
        BadRequest: `eos_not_trained`, the tokenizer has no end of an answer.
        GraftError: `contract_broken`, the adapter's tokenizer writes other tokens than when it was trained.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    saved = folder / CONTRACT_FILE
    if saved.is_file():
        return _saved(tokenizer, saved)
    if isinstance(tokenizer.chat_template, str):
        template: Literal["model", "plain"] = "model"
    else:
        template = "plain"
        if tokenizer.eos_token is None:
            raise BadRequest(
                "eos_not_trained",
                "The base model has neither a chat template nor an end token, so no answer could end.",
                hint="Choose the instruction-tuned (chat) version of this model.",
            )
        start = "{{ bos_token }}" if tokens.starts_with_bos(tokenizer) else ""
        tokenizer.chat_template = start + rendering.PLAIN
    bare = Contract(tokenizer, (), template, rendering.styles_of(tokenizer))
    return Contract(tokenizer, _stop_token_ids(bare, folder), template, bare.styles)


# By their content: the adapters of one base model have the same, of some tens of megabytes, and reading it takes 0.1 s.
_tokenizers: WeakValueDictionary[str, Any] = WeakValueDictionary()


@lru_cache(maxsize=256)
def load_cached(folder: Path) -> Contract:
    """`load_shared`, once. The folder's content must never change under the same path."""
    return load_shared(folder)


def load_shared(folder: Path) -> Contract:
    """`load` for a server: contracts with the same tokenizer have one in memory."""
    contract = load(folder)
    content = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        file = folder / name
        content.update(hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b"none")
    return replace(contract, tokenizer=_tokenizers.setdefault(content.hexdigest(), contract.tokenizer))


def _saved(tokenizer: Any, file: Path) -> Contract:
    try:
        facts = json.loads(file.read_text())
        styles = Styles(facts.get("system", "template"), facts.get("tools", "template"))
        stops, template = tuple(facts["stop_token_ids"]), facts.get("template", "model")
        contract = Contract(tokenizer, stops, template, styles, facts.get("rows", "turns"))
        template_sha256, sample = facts["template_sha256"], facts["sample"]
        written = prompts.encode(contract, _conversation(sample["messages"]))
        same = contract.template_sha256 == template_sha256 and written.ids == sample["ids"]
    except (ValueError, LookupError, TypeError, AttributeError, BadRequest) as error:
        raise _broken(f"{CONTRACT_FILE} cannot be read or used: {error}") from error
    if not same:
        raise _broken(
            "The adapter's tokenizer or chat template writes other tokens than when it was trained."
        )
    return contract


def _broken(message: str) -> GraftError:
    return GraftError(
        "contract_broken",
        message,
        hint="Put the files back as they were downloaded; do not exchange its tokenizer.",
    )


def save(contract: Contract, folder: Path) -> None:
    """Write the tokenizer, the chat template and the contract beside an adapter."""
    contract.tokenizer.save_pretrained(str(folder))
    facts = {
        "version": _VERSION,
        "rows": contract.rows,
        "template": contract.template,
        "template_sha256": contract.template_sha256,
        "stop_token_ids": list(contract.stop_token_ids),
        "bos_token_id": contract.tokenizer.bos_token_id,
        "special_tokens": "written by the template; none are added",
        "control_tokens_in_content": "encoded as plain text",
        "system": contract.styles.system,
        "system_default": rendering.system_default(contract.tokenizer),
        "tools": contract.styles.tools,
        "sample": _sample(contract),
    }
    (folder / CONTRACT_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _sample(contract: Contract) -> dict[str, Any]:
    encoded = prompts.encode(contract, _conversation())
    text = prompts.text_of(contract, encoded.ids)
    return {"messages": _SAMPLE, "text": text, "ids": encoded.ids, "trained": encoded.trained}


def _conversation(messages: list[dict[str, str]] = _SAMPLE) -> Conversation:
    return Conversation([Turn(role=turn["role"], content=turn["content"]) for turn in messages])


def _stop_token_ids(contract: Contract, folder: Path) -> tuple[int, ...]:
    """The token that the template writes after an answer, and those the model's makers stop at."""
    tokenizer = contract.tokenizer
    encoded = prompts.encode(contract, _conversation())
    answer = [token for token, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    special = set(tokenizer.added_tokens_decoder)
    stops = [token for token in answer[-prompts.TAIL :] if token in special][:1]
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = json.loads(generation.read_text()).get("eos_token_id")
        stops += eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not any(token in stops for token in answer[-prompts.TAIL :]):
        raise BadRequest(
            "eos_not_trained",
            "The chat template ends an answer without an end token, so the model would never learn to stop.",
            hint="Use a base model whose chat template ends each turn with a token of its own.",
        )
    return tuple(dict.fromkeys(stops))
