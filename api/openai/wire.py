"""What OpenAI's clients are answered."""

import json
import time
from collections.abc import AsyncIterator, Callable
from functools import cache
from itertools import accumulate
from typing import Any

from core.errors import GraftError
from core.log import request_id
from core.ml import tokens

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


def chat_logprobs(tokenizer: Any, told: Json | None) -> Json | None:
    """From an engine's log probabilities, whose tokens are named `token_id:…`."""
    if told is None:
        return None
    read = _reader(tokenizer)

    def entry(name: str, logprob: float) -> Json:
        text, raw = read(name)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    content = [
        {
            **entry(name, logprob),
            "top_logprobs": [entry(*pair) for pair in sorted((top or {}).items(), key=lambda pair: -pair[1])],
        }
        for name, logprob, top in zip(
            told["tokens"], told["token_logprobs"], told["top_logprobs"] or [], strict=True
        )
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Any, told: Json | None, offset: int) -> Json | None:
    """The same in the older form; `offset`: where the first token's text begins."""
    if told is None:
        return None
    read = _reader(tokenizer)
    texts = [read(name)[0] for name in told["tokens"]]
    starts = list(accumulate(map(len, texts), initial=offset))[:-1]
    tops = [
        {read(name)[0]: value for name, value in (top or {}).items()} for top in told["top_logprobs"] or []
    ]
    return {
        "tokens": texts,
        "token_logprobs": told["token_logprobs"],
        "top_logprobs": tops,
        "text_offset": starts,
    }


async def events(chunks: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error in the middle is an event, and the last."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except GraftError as error:
        told = {
            "message": error.message,
            "type": "server_error",
            "param": error.param,
            "code": error.code,
            "hint": error.hint,
            "request_id": request_id.get(),
        }
        yield f"data: {json.dumps({'error': told})}\n\n"
        return
    yield "data: [DONE]\n\n"


def _reader(tokenizer: Any) -> Callable[[str], tuple[str, bytes]]:
    """Text and bytes of a named token; the same few are likely all through an answer."""
    return cache(lambda name: tokens.text_and_bytes(tokenizer, int(name.removeprefix("token_id:"))))
