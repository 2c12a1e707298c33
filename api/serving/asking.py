"""What an engine is asked, several questions of one request at once, and what it counted."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from api.engine.answers import Usage
from api.serving.models import Served

Question = TypeVar("Question")
Answer = TypeVar("Answer")

# Of a request's questions: all of them at once would fill the engine's queue for everybody.
_AT_ONCE = 4


def options(
    served: Served,
    project_id: str,
    sampling: dict[str, Any],
    *,
    ends: bool = True,
    logprobs: int | None = None,
) -> dict[str, Any]:
    """Everything beside the prompt. `ends`: an answer ends as the contract says; `logprobs`: with so many of the likeliest
    tokens."""
    stops = list(served.contract.stop_token_ids) if ends else []
    # Prompts are only found again within a project.
    asked = {**sampling, "stop_token_ids": stops, "cache_salt": project_id}
    if logprobs is not None:
        asked |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
    return asked


async def side_by_side(
    ask: Callable[[Question], Awaitable[Answer]], questions: Iterable[Question]
) -> list[Answer]:
    """The answers in the order of the questions. Where one raises, the others are cancelled: nobody reads them."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(question: Question) -> Answer:
        async with places:
            return await ask(question)

    tasks = [asyncio.create_task(one(question)) for question in questions]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def counts(*counted: Usage | None) -> dict[str, int]:
    """How many tokens were read and written for all of them, as engines counted."""
    known = [usage for usage in counted if usage]
    return {
        "prompt_tokens": sum(usage.get("prompt_tokens", 0) for usage in known),
        "completion_tokens": sum(usage.get("completion_tokens", 0) for usage in known),
    }
