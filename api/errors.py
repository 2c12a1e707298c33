"""Any error becomes the one JSON body."""

import logging
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from core import log
from core.control.db import DatabaseUnavailable
from core.errors import GraftError, nearest

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def render(error: GraftError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response for an error; a conflict of states is not worth a retry."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    body: dict[str, Any] = {
        "message": error.message,
        "type": kind,
        "code": error.code,
        "param": error.param,
        "hint": error.hint,
        "request_id": log.request_id.get(),
    }
    if error.errors is not None:
        body |= {"errors": error.errors, "error_count": error.error_count or len(error.errors)}
    headers = dict(headers or {})
    if error.status == 409:
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers.setdefault("retry-after", "5")
    return JSONResponse({"error": body}, error.status, headers)


def install(app: FastAPI) -> None:
    app.add_exception_handler(GraftError, _graft_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DatabaseUnavailable, _database_error)
    app.add_exception_handler(Exception, _any_error)


def _graft_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GraftError)  # noqa: S101 - registered for it
    return render(error)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == 404:
        return render(
            GraftError(
                "not_found",
                f"There is no {request.method} {request.url.path[:200]}.",
                status=404,
                hint="GET /docs lists every call.",
            )
        )
    if error.status_code == 405:
        return render(
            GraftError(
                "method_not_allowed",
                f"{request.url.path[:200]} does not take {request.method}.",
                status=405,
            ),
            dict(error.headers or {}),
        )
    return render(
        GraftError("http_error", str(error.detail), status=error.status_code),
        dict(error.headers or {}),
    )


def _database_error(_request: Request, error: Exception) -> JSONResponse:
    logger.error("database does not answer", exc_info=error)
    return render(
        GraftError(
            "database_unavailable",
            "The database does not answer at the moment.",
            status=503,
            hint="Try again in a few seconds; running jobs go on.",
        )
    )


def _any_error(_request: Request, error: Exception) -> JSONResponse:
    logger.error("unexpected error", exc_info=error)
    return render(
        GraftError(
            "internal_error",
            "Something went wrong inside Graft; the log has the details under this request id.",
        )
    )


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """422 with every problem's place. What was sent is never sent back: it may be secret or not JSON."""
    assert isinstance(error, RequestValidationError)  # noqa: S101
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    problems = [_problem(item, model) for item in error.errors()]
    first = problems[0]
    return render(
        GraftError(
            "invalid_request",
            first["message"],
            status=422,
            param=first["field"],
            hint=first["hint"],
            errors=problems,
            error_count=len(problems),
        )
    )


def _problem(item: dict[str, Any], model: Any) -> dict[str, Any]:
    place = [part for part in item["loc"] if part not in ("body", "query", "path", "header")]
    field = ".".join(str(part) for part in place) or "body"
    hint = None
    if item["type"] == "extra_forbidden":
        message = f'There is no field "{field}".'
        if near := nearest(str(place[-1]), _fields_at(model, place[:-1])):
            hint = f'Did you mean "{".".join([*map(str, place[:-1]), near])}"?'
    elif item["type"] == "missing":
        message = f'The field "{field}" is missing.'
    elif item["type"] == "json_invalid":
        message = "The request body is not valid JSON."
    else:
        text = str(item["msg"]).removeprefix("Value error, ")
        message = f'The field "{field}": {text[0].lower() + text[1:]}.'
    return {"field": field, "code": item["type"], "message": message, "hint": hint}


def _fields_at(model: Any, place: list[Any]) -> list[str]:
    """Names of the fields that the request model has at this place."""
    for name in place:
        field = getattr(model, "model_fields", {}).get(name)
        if field is None:
            return []
        choices = [field.annotation, *get_args(field.annotation)]
        model = next((choice for choice in choices if hasattr(choice, "model_fields")), None)
    return list(getattr(model, "model_fields", ()))
