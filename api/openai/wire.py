"""What OpenAI's clients are answered."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from api import errors
from api.engine.answers import Answer, Usage
from api.serving import asking

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


def usage(*counted: Usage | None) -> Json:
    """The sum of what engines counted."""
    counts = asking.counts(*counted)
    details = [(one and one.get("prompt_tokens_details")) or {} for one in counted]
    return {
        **counts,
        "total_tokens": sum(counts.values()),
        "prompt_tokens_details": {"cached_tokens": sum(one.get("cached_tokens") or 0 for one in details)},
    }


def served_by(part: Answer) -> Json:
    """For the last chunk of an output: how it was answered, where the engine says it."""
    return {"served_by": part["served_by"]} if part.get("served_by") else {}


async def events(chunks: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error in the middle is an event, and the last."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except Exception as error:  # noqa: BLE001 - a stream that only ends looks like a whole answer
        yield f"data: {json.dumps({'error': errors.body(errors.unexpected(error))})}\n\n"
        return
    yield "data: [DONE]\n\n"
