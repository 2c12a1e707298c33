"""What the inference server answers: OpenAI completions, as vLLM writes them."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ulid import ULID

from core.errors import GraftError
from core.ml.inference.answering import Finish, Piece
from core.ml.inference.sampling import Choice
from worker.inference.schemas import Completion

# From this status on an error is not the request's.
_SERVER = 500


@dataclass
class Output:
    """One output as far as it is told."""

    text: str = ""
    chosen: list[Choice] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, item: Piece | Finish) -> None:
        if isinstance(item, Finish):
            self.finish = item
        else:
            self.text += item.text
            self.chosen += item.choices

    def choice(self, index: int, body: Completion) -> dict[str, Any]:
        return choice(index, self.text, self.chosen, self.finish.reason if self.finish else None, body)


def head(body: Completion) -> dict[str, Any]:
    return {
        "id": f"cmpl-{ULID()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }


def choice(
    index: int, text: str, chosen: Sequence[Choice], reason: str | None, body: Completion
) -> dict[str, Any]:
    logprobs = None if body.logprobs is None else _logprobs(chosen)
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


def _logprobs(chosen: Sequence[Choice]) -> dict[str, Any]:
    """As vLLM writes them with return_tokens_as_token_ids."""
    return {
        "tokens": [_name(choice.token) for choice in chosen],
        "token_logprobs": [choice.logprob for choice in chosen],
        "top_logprobs": [{_name(token): value for token, value in choice.top.items()} for choice in chosen],
        "text_offset": [],
    }


def _name(token: int) -> str:
    return f"token_id:{token}"


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def error(told: GraftError) -> dict[str, Any]:
    kind = "server_error" if told.status >= _SERVER else "invalid_request_error"
    said = {"message": told.message, "type": kind, "param": told.param, "code": told.code, "hint": told.hint}
    return {"error": said}


def usage(body: Completion, ends: Sequence[Finish]) -> dict[str, Any]:
    written = sum(end.tokens for end in ends)
    return {
        "prompt_tokens": len(body.prompt),
        "completion_tokens": written,
        "total_tokens": len(body.prompt) + written,
        "prompt_tokens_details": {"cached_tokens": min((end.cached for end in ends), default=0)},
    }
