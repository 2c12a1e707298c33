"""Answers that somebody waits for."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from core.errors import GraftError

Answer = TypeVar("Answer")
# How often it is asked whether the client still listens.
_LOOK_SECONDS = 0.5


async def while_listening(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer; when the client hangs up before it is there, the engine's request is closed."""
    task = asyncio.create_task(answer)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise GraftError("client_gone", "The client hung up.", status=499)
        return task.result()
    finally:
        task.cancel()


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events that nothing between here and the client keeps back."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
