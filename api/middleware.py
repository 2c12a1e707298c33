"""A request id on every response and every log line. Plain ASGI: other kinds hide disconnects."""

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from api.errors import render, unexpected
from core import log

logger = logging.getLogger("api.access")
_GIVEN = re.compile(r"[\w.-]{1,64}")


class RequestId:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GIVEN.fullmatch(given) else f"req_{ULID()}"
        token = log.request_id.set(request_id)
        started = time.monotonic()
        started_response = False

        async def with_id(message: Message) -> None:
            nonlocal started_response
            if message["type"] == "http.response.start":
                started_response = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                if not scope["path"].startswith("/health/"):
                    logger.info(
                        "request",
                        extra={
                            "method": scope["method"],
                            "path": scope["path"],
                            "status": message["status"],
                            "ms": round((time.monotonic() - started) * 1000, 1),
                        },
                    )
            await send(message)

        try:
            await self.app(scope, receive, with_id)
        except Exception as error:
            if started_response:
                raise
            await render(unexpected(error))(scope, receive, with_id)
        finally:
            log.request_id.reset(token)
