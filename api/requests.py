"""How request bodies are read: bounded, and JSON that every later step can hold.

Python's parser takes NaN, half surrogate pairs and endless nesting; the database, the response or
the stack would fail on them later. Here they are a plain 400.
"""

import json
import math
from typing import Any
from urllib.parse import unquote

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import authenticate
from api.errors import render
from core.errors import BadRequest, NotFound

MAX_DEPTH = 32
JSON_MAX_BYTES = 8 * 1024**2


class StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route that knows its caller before it reads the body, and whose JSON goes through `parse`."""

    def get_route_handler(self) -> Any:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Any:
            # Before a byte of the body is read: strangers get no work done and no disk filled.
            request.state.caller = await run_in_threadpool(authenticate, request)
            if any("\0" in str(value) for value in request.path_params.values()):
                raise NotFound("not_found", "There is nothing with a NUL character in its name.")
            if "\0" in unquote(request.url.query):
                raise BadRequest("invalid_request", "The query holds a NUL character.")
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def parse(body: bytes) -> Any:
    """JSON from a request body.

    Raises:
        BadRequest: `invalid_json`, status 400.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_constant, parse_float=_float, object_pairs_hook=_object
        )
        if "\\u" in repr(body) or b"\x00" in body:
            json.dumps(value, ensure_ascii=False).encode()
        _check(value, MAX_DEPTH)
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno} column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise _invalid("it holds half of a surrogate pair") from error
    except UnicodeDecodeError as error:
        raise _invalid("it is not UTF-8") from error
    except RecursionError as error:
        raise _invalid("it is nested too deeply") from error
    except ValueError as error:
        raise _invalid(str(error)) from error
    return value


def _check(value: Any, left: int) -> None:
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("it holds a NUL character")
    if not isinstance(value, dict | list):
        return
    if left == 0:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for name in value:
            _check(name, left)
    for item in value.values() if isinstance(value, dict) else value:
        _check(item, left - 1)


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the field "{twice[:60]}" stands in it twice')
    return result


def _invalid(what: str) -> BadRequest:
    return BadRequest("invalid_json", f"The request body is not valid JSON: {what}.", status=400)


class LimitBody:
    """Ends requests whose body is larger than allowed, by header or by count, with 413."""

    def __init__(self, app: ASGIApp, upload_max_bytes: int) -> None:
        self.app, self.upload_max_bytes = app, upload_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_upload = scope["method"] == "POST" and scope["path"].rstrip("/") == "/datasets"
        limit = self.upload_max_bytes if is_upload else JSON_MAX_BYTES
        error = BadRequest(
            "body_too_large",
            f"The request body is larger than {limit} bytes.",
            status=413,
            hint="GRAFT_UPLOAD_MAX_BYTES sets the limit of data set files." if is_upload else None,
        )
        if (
            headers.get(b"content-length", b"0").isdigit()
            and int(headers.get(b"content-length", b"0")) > limit
        ):
            await render(error)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise error
            return message

        await self.app(scope, counted, send)
