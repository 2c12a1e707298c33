"""The tokens of a prompt, by the contract of who answers."""

from collections.abc import Sequence
from typing import Any

from api.serving.models import Served
from core.errors import BadRequest
from core.ml import prompts
from core.ml.formats.chat import messages
from core.ml.formats.chat.calls import tools_of
from core.ml.formats.chat.example import RowError


def of_turns(
    served: Served, turns: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Tokens of a conversation that the model is to go on with.

    Raises:
        BadRequest: `no_turns`, or what is wrong with the messages or the tools.
    """
    if served.contract.rows == "text":
        raise BadRequest(
            "no_turns",
            "The adapter was trained on plain texts without turns, so it answers no messages.",
            param="messages",
            hint="Send prompt: the beginning of a text as in the data set.",
        )
    try:
        read, _, _ = messages.parse(list(turns), messages.OPENAI)
        described = tools_of({"tools": tools})
    except RowError as error:
        raise BadRequest(error.code, error.message, param=error.field, hint=error.hint) from error
    return prompts.encode_prompt(served.contract, read, described)


def of_text(served: Served, text: str, *, raw: bool) -> list[int]:
    """Tokens of one user turn; with `raw`, or for an adapter that was trained on plain texts, of the text as it is."""
    if raw:
        return _some(prompts.encode_plain(served.contract, text))
    if served.contract.rows == "text":
        return _some(prompts.encode_beginning(served.contract, text))
    return prompts.encode_prompt(served.contract, [{"role": "user", "content": text}])


def check_length(served: Served, ids: Sequence[int], new: int, param: str) -> None:
    """Raises BadRequest `prompt_too_long`, where prompt and answer are more than the model reads."""
    if served.context is not None and len(ids) + new > served.context:
        raise BadRequest(
            "prompt_too_long",
            f"The prompt has {len(ids)} tokens; with {param} {new} "
            f"that is more than the {served.context} the model reads.",
            param=param,
            status=400,
        )


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise BadRequest("empty_prompt", "The prompt has no tokens.", param="prompt")
    return ids
