"""Answers that somebody waits for."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from core.errors import GraftError

Answer = TypeVar("Answer")


async def while_listening(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer; when the client hangs up before it is there, the engine's request is closed."""
    # Told, not asked for: looking several times a second for each of many clients takes time from the engine.
    task, hung_up = asyncio.create_task(answer), asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({task, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GraftError("client_gone", "The client hung up.", status=499)
        return task.result()
    finally:
        task.cancel()
        hung_up.cancel()


async def _hung_up(request: Request) -> None:
    """Returns when the client is gone. The request's body has been read, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events that nothing between here and the client keeps back."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
