"""How request bodies are read: bounded, and JSON that every later step can hold.

Python's parser takes NaN, half surrogate pairs and endless nesting; the database, the response or
the stack would fail on them later. Here they are a plain 400.
"""

import re
from typing import Any
from urllib.parse import unquote

from fastapi import Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Form
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import ImmutableMultiDict
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import authenticate
from api.errors import render
from core import strict_json
from core.errors import BadRequest, NotFound, nearest
from core.strict_json import JsonError

JSON_MAX_BYTES = 8 * 1024**2
_UPLOADS = ("/datasets", "/datasets/validate")
# The list that is selected from by metadata[key]=value.
_SELECTED = "/jobs"
_LABEL = re.compile(r"metadata\[[^\]]+\]")


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
            self._refuse_unknown(request)
            self._refuse_other_types(request)
            return await handler(StrictRequest(request.scope, request.receive))

        return strict

    def _refuse_other_types(self, request: Request) -> None:
        """FastAPI would take a body of another type for a text, and say that it is no object."""
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if self.body_field is None or isinstance(self.body_field.field_info, Form) or not has_body:
            return
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != "application/json" and not (given.startswith("application/") and given.endswith("+json")):
            raise BadRequest(
                "unsupported_media_type",
                f"The request body is {given[:60] or 'of no stated type'}; expected application/json.",
                status=415,
                hint="Send the header content-type: application/json, with curl by --json.",
            )

    def _refuse_unknown(self, request: Request) -> None:
        """A misspelt parameter of the query must not be passed over: FastAPI would."""
        known = [field.alias for field in get_flat_params(self.dependant)]
        selects = request.method == "GET" and self.path == _SELECTED
        for name in request.query_params:
            if name not in known and not (selects and _LABEL.fullmatch(name)):
                near = nearest(name, known)
                hint = f'Did you mean "{near}"?' if near else None
                message = f'There is no parameter "{name[:60]}".'
                raise BadRequest("invalid_request", message, param=name[:60], hint=hint)
        refuse_repeated(request.query_params)


def refuse_repeated(given: ImmutableMultiDict[str, Any]) -> None:
    """Of two values for one name the last would be taken in silence."""
    for name in given:
        if len(given.getlist(name)) > 1:
            message = f'"{name[:60]}" is given more than once.'
            raise BadRequest("invalid_request", message, param=name[:60], hint="Give it once.")


def parse(body: bytes) -> Any:
    """JSON from a request body.

    Raises:
        BadRequest: `invalid_json`, status 400.
    """
    try:
        return strict_json.loads(body.decode("utf-8"), depth=strict_json.DEPTH)
    except UnicodeDecodeError as error:
        raise _invalid("It is not UTF-8.") from error
    except JsonError as error:
        raise _invalid(error.message) from error


def _invalid(what: str) -> BadRequest:
    return BadRequest("invalid_json", f"The request body cannot be read. {what}", status=400)


class LimitBody:
    """Ends requests whose body is larger than allowed, by header or by count, with 413."""

    def __init__(self, app: ASGIApp, upload_max_bytes: int) -> None:
        self.app, self.upload_max_bytes = app, upload_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_upload = scope["method"] == "POST" and scope["path"].rstrip("/") in _UPLOADS
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
