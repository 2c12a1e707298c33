"""POST /v1/completions: texts as they are, without a chat template."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from api.deps import CallerDep, Services, ServicesDep
from api.engine.answers import Answer, Choice
from api.openai import wire
from api.openai.logprobs import OfCompletion
from api.openai.schemas import CompletionRequest
from api.requests import StrictRoute
from api.serving import asking, models, prompt
from api.serving.listening import event_stream, while_listening
from api.serving.models import Served

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute)

# OpenAI's own.
_NEW_TOKENS = 16


@router.post("/completions", response_model=None)
async def completions(
    body: CompletionRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> JSONResponse | StreamingResponse:
    """Go on with a text, or with token ids, as OpenAI does; `model` as in /v1/chat/completions."""
    served, prompts = await run_in_threadpool(_prepare, body, services, caller.project_id)
    sampling = body.sampling() | {"max_tokens": body.max_tokens or _NEW_TOKENS}
    # Trained on plain texts, it ends them as its contract says.
    ends = served.contract.rows == "text"
    asked = asking.options(served, caller.project_id, sampling, ends=ends, logprobs=body.logprobs)
    head = wire.head("text_completion", f"cmpl-{ULID()}", served.name)
    if body.stream:
        told = await while_listening(request, services.engine.stream(served.target, prompts[0], asked))
        return event_stream(told, wire.events(_chunks(body, served, head, told)))

    async def one(ids: list[int]) -> Answer:
        return await services.engine.complete(served.target, ids, asked)

    answers = await while_listening(request, asking.side_by_side(one, prompts))
    said = [choice for answer in answers for choice in answer["choices"]]

    def read() -> list[dict[str, Any]]:
        return [_Written(body, served).choice(choice, index) for index, choice in enumerate(said)]

    # The log probabilities of a long answer take time that the streams of others must not wait for.
    choices = await run_in_threadpool(read) if body.logprobs is not None else read()
    usage = wire.usage(*(answer.get("usage") for answer in answers))
    served_by = answers[0].get("served_by")
    return JSONResponse({**head, "choices": choices, "usage": usage, "served_by": served_by})


def _prepare(body: CompletionRequest, services: Services, project_id: str) -> tuple[Served, list[list[int]]]:
    served = models.named(services, project_id, body.model)
    found = [
        prompt.of_text(served, given, raw=served.contract.rows != "text") if isinstance(given, str) else given
        for given in body.prompts
    ]
    for ids in found:
        prompt.check_length(served, ids, body.max_tokens or _NEW_TOKENS, "max_tokens", body.model_fields_set)
    return served, found


async def _chunks(
    body: CompletionRequest, served: Served, head: dict[str, Any], told: AsyncIterator[Answer]
) -> AsyncIterator[dict[str, Any]]:
    usage = {"usage": None} if body.wants_usage else {}
    last: Answer = {"choices": []}
    written = [_Written(body, served) for _ in range(body.n or 1)]
    async for part in told:
        last = part if part.get("usage") else last
        for choice in part["choices"]:
            index = choice["index"]
            ending = wire.served_by(part) if choice.get("finish_reason") else {}
            yield {**head, "choices": [written[index].choice(choice, index)], **usage, **ending}
    if body.wants_usage:
        yield {
            **head,
            "choices": [],
            "usage": wire.usage(last.get("usage")),
            "served_by": last.get("served_by"),
        }


class _Written:
    """One output, whole or on its way."""

    def __init__(self, body: CompletionRequest, served: Served) -> None:
        self._logprobs = OfCompletion(served.contract.tokenizer) if body.logprobs is not None else None
        self._length = 0

    def choice(self, told: Choice, index: int) -> dict[str, Any]:
        self._length += len(told["text"])
        return {
            "index": index,
            "text": told["text"],
            "finish_reason": told.get("finish_reason"),
            "logprobs": self._logprobs and self._logprobs.told(told.get("logprobs"), self._length),
        }
