"""Generation with a base model, an adapter or a checkpoint, whole, streamed, or side by side."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from api import errors
from api.deps import CallerDep, Services, ServicesDep
from api.requests import StrictRoute
from api.schemas.generate import (
    Compared,
    CompareRequest,
    Comparison,
    GenerateRequest,
    Generation,
    Output,
    Prompted,
)
from api.serving import models, prompt
from api.serving.listening import event_stream, while_listening
from api.serving.models import Served
from core.errors import GraftError

router = APIRouter(tags=["generation"], route_class=StrictRoute)


@router.post("/generate", response_model=Generation)
async def generate(body: GenerateRequest, request: Request, services: ServicesDep, caller: CallerDep) -> Any:
    """Answer with the base model, or with an adapter by the prompt contract it was trained with."""
    served, ids = await run_in_threadpool(_prepare, body, services, caller.project_id)
    sampling = _sampling(body, served, caller.project_id) | {"n": body.n}
    if body.stream:
        chunks = await while_listening(request, services.engine.stream(served.target, ids, sampling))
        return event_stream(_events(chunks, served))
    answer = await while_listening(request, services.engine.complete(served.target, ids, sampling))
    outputs = [
        Output(text=choice["text"], finish_reason=choice["finish_reason"]) for choice in answer["choices"]
    ]
    return Generation(
        id=f"gen_{ULID()}",
        model=served.target.base_model,
        adapter_id=served.adapter_id,
        served_by=answer.get("served_by"),
        outputs=outputs,
        usage=_usage(answer),
    )


@router.post("/compare")
async def compare(
    body: CompareRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Comparison:
    """Answer one prompt with several of base model, adapters and checkpoints, at the same time."""
    found = await run_in_threadpool(_targets, body, services, caller.project_id)

    async def one(name: str, served: Served) -> Compared:
        said = Compared(target=name, model=served.target.base_model, adapter_id=served.adapter_id)
        try:
            ids = await run_in_threadpool(_tokens, body, served)
            sampling = _sampling(body, served, caller.project_id)
            answer = await services.engine.complete(served.target, ids, sampling)
        except GraftError as error:
            return said.model_copy(update={"error": errors.body(error)})
        choice = answer["choices"][0]
        told = {"text": choice["text"], "finish_reason": choice["finish_reason"], "usage": _usage(answer)}
        return said.model_copy(update=told | {"served_by": answer.get("served_by")})

    async def everyone() -> list[Compared]:
        return await asyncio.gather(*(one(*pair) for pair in zip(body.targets, found, strict=True)))

    return Comparison(id=f"cmp_{ULID()}", outputs=await while_listening(request, everyone()))


def _targets(body: CompareRequest, services: Services, project_id: str) -> list[Served]:
    found = {
        name: models.named(services, project_id, name, f"targets.{i}")
        for i, name in enumerate(body.targets)
        if name != "base"
    }
    trained_on = next((served.target.base_model for served in found.values() if served.adapter_id), None)
    return [
        found.get(name) or models.base(services, trained_on, f"targets.{i}")
        for i, name in enumerate(body.targets)
    ]


def _prepare(body: GenerateRequest, services: Services, project_id: str) -> tuple[Served, list[int]]:
    if body.adapter_id is not None:
        served = models.adapter(services, project_id, body.adapter_id)
    else:
        served = models.base(services, body.model)
    return served, _tokens(body, served)


def _tokens(body: Prompted, served: Served) -> list[int]:
    if body.messages is not None:
        turns = [message.model_dump(exclude_none=True) for message in body.messages]
        ids = prompt.of_turns(served, turns, body.tools)
    else:
        ids = prompt.of_text(served, body.prompt or "", raw=body.raw)
    prompt.check_length(served, ids, body.max_new_tokens, "max_new_tokens")
    return ids


def _sampling(body: Prompted, served: Served, project_id: str) -> dict[str, Any]:
    stops = [] if body.raw else list(served.contract.stop_token_ids)
    # Prompts are only found again within a project.
    return {**body.sampling(), "stop_token_ids": stops, "cache_salt": project_id}


async def _events(chunks: AsyncIterator[dict[str, Any]], served: Served) -> AsyncIterator[str]:
    """`token` events and one `done`; an error in the middle is an `error` event."""
    finish_reason, usage, served_by = None, None, None
    try:
        async for chunk in chunks:
            for choice in chunk["choices"]:
                finish_reason = choice.get("finish_reason") or finish_reason
                if choice.get("text"):
                    yield _event("token", {"text": choice["text"]})
            usage = chunk.get("usage") or usage
            served_by = chunk.get("served_by") or served_by
    except GraftError as error:
        yield _event("error", {"error": errors.body(error)})
        return
    yield _event(
        "done",
        {
            "id": f"gen_{ULID()}",
            "model": served.target.base_model,
            "adapter_id": served.adapter_id,
            "served_by": served_by,
            "finish_reason": finish_reason,
            "usage": _usage({"usage": usage or {}}),
        },
    )


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _usage(answer: dict[str, Any]) -> dict[str, int]:
    usage = answer.get("usage") or {}
    return {
        "prompt_tokens": usage.get("prompt_tokens", 0),
        "completion_tokens": usage.get("completion_tokens", 0),
    }
