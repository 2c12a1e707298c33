"""The tokens of a prompt, by the contract of who answers."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from api.serving.models import Served
from core.errors import BadRequest
from core.ml import prompts
from core.ml.formats.chat import messages
from core.ml.formats.chat.calls import tools_of
from core.ml.formats.chat.example import RowError

_PLACE = re.compile(r"\b(?:messages|tools)\[[\w.\[\]]*")


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
        place, message = _dotted(error.field), _dotted(error.message)
        raise BadRequest(error.code, message, param=place, hint=error.hint) from error
    return prompts.encode_prompt(served.contract, read, described)


def of_text(served: Served, text: str, *, raw: bool) -> list[int]:
    """Tokens of one user turn; with `raw`, or for an adapter that was trained on plain texts, of the text as it is."""
    if raw:
        return _some(prompts.encode_plain(served.contract, text))
    if served.contract.rows == "text":
        return _some(prompts.encode_beginning(served.contract, text))
    return prompts.encode_prompt(served.contract, [{"role": "user", "content": text}])


def check_length(served: Served, ids: Sequence[int], new: int, limit: str, sent: Collection[str]) -> None:
    """`limit` names the field that says how many `new` tokens there may be; `sent` are the fields of the request, of which
    an error names one.

    Raises:
        BadRequest: `prompt_too_long`, where prompt and answer are more than the model reads.
    """
    if served.context is None or (room := served.context - len(ids)) >= new:
        return
    given = "messages" if "messages" in sent else "prompt"
    if room < 1:
        told = f"of the {served.context} that the model reads, that leaves none for an answer"
        remedy = f"Shorten the {given}"
    else:
        told = f"with {limit} {new} that is more than the {served.context} the model reads"
        remedy = f"Send {limit} {room} or less, or shorten the {given}"
    raise BadRequest(
        "prompt_too_long",
        f"The prompt has {len(ids)} tokens; {told}.",
        param=limit if room > 0 and limit in sent else given,
        hint=f"{remedy}; GET /models tells how many tokens a model reads.",
        status=400,
    )


def _dotted(text: str) -> str:
    """With places as everywhere in the API: a data set's `messages[0].content` is `messages.0.content` here."""
    return _PLACE.sub(lambda place: re.sub(r"\[(\d+)\]", r".\1", place[0]), text)


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise BadRequest("empty_prompt", "The prompt has no tokens.", param="prompt")
    return ids
