"""What engines answer. Anything that is no completion is an error, never an answer."""

import json
import math
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from api.engine import refusals
from core.errors import GraftError

# As vLLM says that a token is impossible, for which JSON has no number.
_IMPOSSIBLE = -9999.0


def _number(value: float) -> float:
    if math.isnan(value) or value == math.inf:
        raise ValueError("it is no number")
    return max(value, _IMPOSSIBLE)


_Logprob = Annotated[float, AfterValidator(_number)]
_Count = Annotated[int, Field(ge=0)]


class Logprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[_Logprob]
    top_logprobs: NotRequired[list[dict[str, _Logprob] | None] | None]


def _as_long(told: Logprobs | None) -> Logprobs | None:
    if told and {len(told["token_logprobs"]), len(told.get("top_logprobs") or told["tokens"])} != {
        len(told["tokens"])
    }:
        raise ValueError("its lists are not as long as each other")
    return told


class Choice(TypedDict):
    index: _Count
    text: str
    # Some say "" where it goes on.
    finish_reason: NotRequired[
        Annotated[Literal["stop", "length"] | None, BeforeValidator(lambda said: said or None)]
    ]
    logprobs: NotRequired[Annotated[Logprobs | None, AfterValidator(_as_long)]]


class Details(TypedDict):
    cached_tokens: NotRequired[_Count | None]


class Usage(TypedDict):
    prompt_tokens: NotRequired[_Count]
    completion_tokens: NotRequired[_Count]
    prompt_tokens_details: NotRequired[Details | None]


class Answer(TypedDict):
    """A completion, or a chunk of one, as OpenAI's API has them; `served_by`: how our own engine answered."""

    choices: list[Choice]
    model: NotRequired[str | None]
    usage: NotRequired[Usage | None]
    served_by: NotRequired[str | None]
    error: NotRequired[Any]


_ANSWER = TypeAdapter(Answer)


def read(data: bytes) -> Answer:
    """A whole answer or a chunk.

    Raises:
        GraftError: what the engine says that went wrong; `engine_error`, 502, where it is none of the two.
    """
    try:
        answer = _ANSWER.validate_json(data)
    except ValidationError as error:
        raise _no_answer(data, error) from error
    if answer.get("error"):
        raise refusals.said(answer, 502, "The inference engine failed.")
    return answer


def _no_answer(data: bytes, error: ValidationError) -> GraftError:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return refusals.no_json()
    if isinstance(body, dict) and (body.get("error") or body.get("object") == "error"):
        return refusals.said(body, 502, "The inference engine failed.")
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "it"
    return refusals.no_completion(f"{place}: {first['msg']}")


def whole(data: bytes, outputs: int) -> Answer:
    """An answer with so many outputs, in their order, each at its end.

    Raises:
        GraftError: as `read`.
    """
    answer = read(data)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(outputs)):
        raise refusals.no_completion(f"{outputs} outputs were asked for, it has {len(choices)}")
    if any(choice.get("finish_reason") is None for choice in choices):
        raise refusals.no_completion("an output has no end")
    return {**answer, "choices": choices}


def repeated(answer: Answer, copies: int) -> Answer:
    """With its one output so many times."""
    if copies == 1:
        return answer
    choices: list[Choice] = [
        {**choice, "index": index} for index in range(copies) for choice in answer["choices"]
    ]
    usage = answer.get("usage")
    if usage:
        usage = {**usage, "completion_tokens": copies * usage.get("completion_tokens", 0)}
    return {**answer, "choices": choices, "usage": usage}
