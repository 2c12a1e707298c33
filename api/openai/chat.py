"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from api.deps import CallerDep, Services, ServicesDep
from api.engine.answers import Answer, Choice
from api.openai import wire
from api.openai.logprobs import of_chat
from api.openai.schemas import ChatRequest
from api.requests import StrictRoute
from api.serving import asking, models, prompt
from api.serving.listening import event_stream, while_listening
from api.serving.models import Served
from core import strict_json
from core.ml.formats.chat.written import WrittenCalls

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute)

# Where the request does not say: as many tokens as the model reads, but no more than this.
_NEW_TOKENS = 2048


@router.post("/chat/completions", response_model=None)
async def chat(
    body: ChatRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> JSONResponse | StreamingResponse:
    """Answer a conversation as OpenAI does; `model` is a base model, an adapter, or `job_…@latest`."""
    served, ids, new = await run_in_threadpool(_prepare, body, services, caller.project_id)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = body.sampling() | {"max_tokens": new}
    asked = asking.options(served, caller.project_id, sampling, logprobs=logprobs)
    identity = f"chatcmpl-{ULID()}"
    if body.stream:
        told = await while_listening(request, services.engine.stream(served.target, ids, asked))
        head = wire.head("chat.completion.chunk", identity, served.name)
        return event_stream(told, wire.events(_chunks(body, served, head, told)))
    answer = await while_listening(request, services.engine.complete(served.target, ids, asked))

    def read() -> list[dict[str, Any]]:
        return [_choice(body, served, choice) for choice in answer["choices"]]

    # The log probabilities of a long answer take time that the streams of others must not wait for.
    choices = await run_in_threadpool(read) if body.logprobs else read()
    return JSONResponse(
        {
            **wire.head("chat.completion", identity, served.name),
            "choices": choices,
            "usage": wire.usage(answer.get("usage")),
            "served_by": answer.get("served_by"),
        }
    )


def _prepare(body: ChatRequest, services: Services, project_id: str) -> tuple[Served, list[int], int]:
    served = models.named(services, project_id, body.model)
    ids = prompt.of_turns(served, body.turns(), body.shown_tools)
    new = body.max_completion_tokens or body.max_tokens
    if new is None:
        room = _NEW_TOKENS if served.context is None else served.context - len(ids)
        new = max(min(room, _NEW_TOKENS), 1)
    limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    prompt.check_length(served, ids, new, limit, body.model_fields_set)
    return served, ids, new


def _choice(body: ChatRequest, served: Served, choice: Choice) -> dict[str, Any]:
    text, calls = choice["text"], []
    if body.shown_tools:
        found = WrittenCalls()
        text = found.push(text) + found.end()
        calls = [_call(call) for call in found.calls]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not calls else None,
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = calls
    return {
        "index": choice["index"],
        "message": message,
        "finish_reason": _reason(choice.get("finish_reason"), bool(calls)),
        "logprobs": of_chat(served.contract.tokenizer, choice.get("logprobs")),
    }


async def _chunks(
    body: ChatRequest, served: Served, head: dict[str, Any], told: AsyncIterator[Answer]
) -> AsyncIterator[dict[str, Any]]:
    usage = {"usage": None} if body.wants_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return {**head, "choices": [choice], **usage}

    written = [_Written(bool(body.shown_tools)) for _ in range(body.n or 1)]
    for index in range(len(written)):
        yield chunk(index, {"role": "assistant", "content": ""})
    last: Answer = {"choices": []}
    async for part in told:
        last = part if part.get("usage") else last
        for choice in part["choices"]:
            index, reason = choice["index"], choice.get("finish_reason")
            delta = written[index].delta(choice["text"], last=reason is not None)
            logprobs = of_chat(served.contract.tokenizer, choice.get("logprobs"))
            if delta or (logprobs and logprobs["content"]):
                yield chunk(index, delta, logprobs=logprobs)
            if reason is not None:
                ending = chunk(index, {}, _reason(reason, bool(written[index].told)))
                yield ending | wire.served_by(part)
    if body.wants_usage:
        yield {
            **head,
            "choices": [],
            "usage": wire.usage(last.get("usage")),
            "served_by": last.get("served_by"),
        }


class _Written:
    """One output on its way; `told`: how many of its calls the client knows."""

    def __init__(self, with_calls: bool) -> None:
        self._calls = WrittenCalls() if with_calls else None
        self.told = 0

    def delta(self, text: str, *, last: bool) -> dict[str, Any]:
        if self._calls is None:
            return {"content": text} if text else {}
        text = self._calls.push(text) + (self._calls.end() if last else "")
        delta: dict[str, Any] = {"content": text} if text else {}
        if fresh := self._calls.calls[self.told :]:
            delta["tool_calls"] = [
                {"index": i, **_call(call)} for i, call in enumerate(fresh, start=self.told)
            ]
            self.told += len(fresh)
        return delta


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": strict_json.dumps(call["arguments"])}
    return {"id": f"call_{ULID()}", "type": "function", "function": function}


def _reason(reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and reason == "stop" else reason
