"""What OpenAI's clients are answered."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from api import errors
from api.serving import asking
from core.errors import GraftError

Json = dict[str, Any]


def head(kind: str, identity: str, model: str) -> Json:
    """What a whole answer, or each chunk of one, begins with."""
    return {
        "id": identity,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


def usage(*answers: Json) -> Json:
    """The sum of what engines counted."""
    counted = asking.counts(*answers)
    details = [(answer.get("usage") or {}).get("prompt_tokens_details") or {} for answer in answers]
    known = sum(one.get("cached_tokens") or 0 for one in details)
    return {
        **counted,
        "total_tokens": sum(counted.values()),
        "prompt_tokens_details": {"cached_tokens": known},
    }


def served_by(part: Json) -> Json:
    """For the last chunk of an output: how it was answered, where the engine says it."""
    return {"served_by": part["served_by"]} if part.get("served_by") else {}


async def events(chunks: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error in the middle is an event, and the last."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except GraftError as error:
        yield f"data: {json.dumps({'error': errors.body(error)})}\n\n"
        return
    yield "data: [DONE]\n\n"
