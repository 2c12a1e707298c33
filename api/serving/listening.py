"""Answers that somebody waits for."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.engine.client import Stream
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


def event_stream(told: Stream, events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events, made of what the engine tells, that nothing between here and the client keeps back."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return _Closing(told, events, media_type="text/event-stream", headers=headers)


class _Closing(StreamingResponse):
    """Of a client that is gone before the first event nobody begins to read the events: no `finally` in them runs."""

    def __init__(self, told: Stream, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._told.close()
