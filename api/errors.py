"""Any error becomes the one JSON body."""

import logging
import unicodedata
from typing import Any, get_args, get_origin

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from core import log
from core.control.db import DatabaseUnavailable
from core.errors import GraftError, nearest

logger = logging.getLogger(__name__)

_UNPROCESSABLE = 422
# What pydantic finds wrong with a body that is a list, a text or null, which is as none to FastAPI.
_NO_OBJECT = ("model_attributes_type", "model_type", "missing")
_BMP = 0xFFFF
# As many problems as one answer names.
_LISTED = 50
# What peft and transformers call our fields, and /generate those of /compare.
_ELSEWHERE = {
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_seq_length": "max_length",
    "lr_scheduler_type": "scheduler",
    "optim": "optimizer",
    "eval_steps": "every_steps",
    "save_steps": "every_steps",
    "save_total_limit": "keep",
    "load_in_4bit": "bits",
    "adapter_id": "targets",
    "model": "targets",
}
# Statuses of what may work when it is tried again later.
LATER = (429, 503)
# Categories of characters that are not seen, or change how others are: a name that is repeated must not hide anything.
_UNSEEN = ("Cc", "Cf", "Zl", "Zp")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def body(error: GraftError) -> dict[str, Any]:
    """What a client is told of an error, in a response, in a stream or beside other answers."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    told: dict[str, Any] = {
        "message": _seen(error.message),
        "type": kind,
        "code": error.code,
        "param": _seen(error.param),
        "hint": _seen(error.hint),
        "request_id": log.request_id.get(),
    }
    if error.errors is not None:
        errors = [{name: _seen(value) for name, value in one.items()} for one in error.errors]
        told |= {"errors": errors, "error_count": error.error_count or len(errors)}
    return told


def _seen(value: Any) -> Any:
    """A text with what is unseen in it written as in Python; anything else as it is."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join(_written(sign) if unicodedata.category(sign) in _UNSEEN else sign for sign in value)


def _written(sign: str) -> str:
    return f"\\u{ord(sign):04x}" if ord(sign) <= _BMP else f"\\U{ord(sign):08x}"


def render(error: GraftError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response for an error; a conflict of states is not worth a retry."""
    headers = dict(headers or {})
    if error.status == 409:
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in LATER:
        headers.setdefault("retry-after", str(error.retry_after or 5))
    return JSONResponse({"error": body(error)}, error.status, headers)


def install(app: FastAPI) -> None:
    app.add_exception_handler(GraftError, _graft_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    for unavailable in DatabaseUnavailable:
        app.add_exception_handler(unavailable, _database_error)


def _graft_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GraftError)
    if error.status == _UNPROCESSABLE and request.url.path.startswith("/v1/"):
        error.status = 400  # OpenAI's clients know a wrong request by it
    return render(error)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, GraftError):  # raised while FastAPI read the body
        return _graft_error(request, error.__cause__)
    if error.status_code == 404:
        return render(
            GraftError(
                "not_found",
                f"There is no {request.method} {request.url.path[:200]}.",
                status=404,
                hint="GET /docs, with a key, lists every call.",
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


def unexpected(error: Exception) -> GraftError:
    """What a client is told of an error; the log is told more of one that nobody foresaw."""
    if isinstance(error, GraftError):
        return error
    logger.error("unexpected error", exc_info=error)
    return GraftError(
        "internal_error", "Something went wrong inside Graft; the log has the details under this request id."
    )


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """422 with every problem's place. What was sent is never sent back: it may be secret or not JSON."""
    assert isinstance(error, RequestValidationError)
    field = getattr(request.scope.get("route"), "body_field", None)
    model = field.field_info.annotation if field is not None else None
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        problem = _problem(item, model)
        if earlier := found.get(problem["field"]):
            # The branches of a union: one of them would have been enough.
            earlier["message"] = earlier["message"].rstrip(".") + ", or " + problem["text"] + "."
        else:
            found[problem["field"]] = problem
    problems = [
        {k: v for k, v in problem.items() if k != "text"}
        for place, problem in found.items()
        # The branch of a union that understood more of the value tells more than the others.
        if not any(other.startswith(f"{place}.") for other in found)
    ]
    first = problems[0]
    return _graft_error(
        request,
        GraftError(
            "invalid_request",
            first["message"],
            status=_UNPROCESSABLE,
            param=first["field"] or None,
            hint=first["hint"],
            errors=problems[:_LISTED],
            error_count=len(problems),
        ),
    )


def _problem(item: dict[str, Any], model: Any) -> dict[str, Any]:
    place = _place(list(item["loc"]), model, unknown=item["type"] == "extra_forbidden")
    field = ".".join(part[:60] for part in place)
    text, hint = str(item["msg"]).removeprefix("Value error, "), _reason(place, model)
    text = text[0].lower() + text[1:]
    message = f'The field "{field}": {text}.' if field else f"{text[0].upper()}{text[1:]}."
    if item["type"] == "extra_forbidden":
        message, hint = f'There is no field "{field}".', None
        fields = _fields_at(model, place[:-1])
        known_as = _ELSEWHERE.get(place[-1])
        if near := known_as if known_as in fields else nearest(place[-1], fields):
            hint = f'Did you mean "{".".join([*place[:-1], near])}"?'
    elif item["type"] == "string_pattern_mismatch":
        text = "has characters, or a form, that it cannot have"
        message = f'The field "{field}" {text}.'
    elif not field and item["type"] in _NO_OBJECT:
        message = "The request body must be a JSON object."
    elif item["type"] == "missing":
        message = f'The field "{field}" is missing.'
    elif item["type"] == "json_invalid":
        message = "The request body is not valid JSON."
    return {"field": field, "code": item["type"], "message": message, "hint": hint, "text": text}


def _place(location: list[Any], model: Any, *, unknown: bool) -> list[str]:
    """Where in the request, by the names that a client knows: pydantic adds those of union branches. Of an `unknown` field
    the last name is none that the model has."""
    where, *rest = location
    if where != "body":
        return [str(part) for part in rest]
    place: list[str] = []
    for number, part in enumerate(rest, 1):
        annotation = _annotation_at(model, place)
        named = part in _fields_at(model, place) or (unknown and number == len(rest))
        if isinstance(part, int) or named or (_is_dict(annotation) and part != "[key]"):
            place.append(str(part))
    return place


def _reason(place: list[str], model: Any) -> str | None:
    """What the field at this place is, in words: why its bounds are where they are."""
    parent = _model_in(_annotation_at(model, place[:-1]))
    field = getattr(parent, "model_fields", {}).get(place[-1]) if place else None
    return field.description if field is not None else None


def _fields_at(model: Any, place: list[str]) -> list[str]:
    """Names of the fields that the request model has at this place."""
    return list(getattr(_model_in(_annotation_at(model, place)), "model_fields", ()))


def _annotation_at(model: Any, place: list[str]) -> Any:
    annotation = model
    for name in place:
        if not name.isdecimal():
            field = getattr(_model_in(annotation), "model_fields", {}).get(name)
            annotation = field.annotation if field is not None else None
    return annotation


def _is_dict(annotation: Any) -> bool:
    """Of `dict[str, str]` and `dict[str, str] | None`, whose names are the client's."""
    return get_origin(annotation) is dict or any(_is_dict(part) for part in get_args(annotation))


def _model_in(annotation: Any) -> Any:
    """The model in an annotation such as `Lora`, `Validation | None` or `list[Message] | None`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)
