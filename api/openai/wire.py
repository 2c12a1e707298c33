"""What OpenAI's clients are answered."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from api import errors
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
    counted = [answer.get("usage") or {} for answer in answers]
    prompt, completion = (
        sum(one.get(name, 0) for one in counted) for name in ("prompt_tokens", "completion_tokens")
    )
    known = sum((one.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for one in counted)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": known},
    }


async def events(chunks: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error in the middle is an event, and the last."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except GraftError as error:
        yield f"data: {json.dumps({'error': errors.body(error)})}\n\n"
        return
    yield "data: [DONE]\n\n"
