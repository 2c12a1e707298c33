"""Generation with a base model, an adapter or a checkpoint, whole, streamed, or side by side."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from api import errors
from api.deps import CallerDep, Services, ServicesDep
from api.engine.answers import Answer
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
from api.serving import asking, models, prompt
from api.serving.listening import event_stream, while_listening
from api.serving.models import Served
from core.errors import GraftError

router = APIRouter(tags=["generation"], route_class=StrictRoute)


@router.post("/generate", response_model=Generation)
async def generate(body: GenerateRequest, request: Request, services: ServicesDep, caller: CallerDep) -> Any:
    """Answer with the base model, or with an adapter by the prompt contract it was trained with."""
    served, ids = await run_in_threadpool(_prepare, body, services, caller.project_id)
    sampling = body.sampling() | {"n": body.n}
    asked = asking.options(served, caller.project_id, sampling, ends=not body.raw)
    if body.stream:
        chunks = await while_listening(request, services.engine.stream(served.target, ids, asked))
        return event_stream(chunks, _events(chunks, served))
    answer = await while_listening(request, services.engine.complete(served.target, ids, asked))
    outputs = [
        Output(text=choice["text"], finish_reason=choice["finish_reason"]) for choice in answer["choices"]
    ]
    return Generation(
        id=f"gen_{ULID()}",
        model=served.target.base_model,
        adapter_id=served.adapter_id,
        served_by=answer.get("served_by"),
        outputs=outputs,
        usage=asking.counts(answer.get("usage")),
    )


@router.post("/compare")
async def compare(
    body: CompareRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Comparison:
    """Answer one prompt with several of base model, adapters and checkpoints, at the same time. A target that cannot answer
    has an error in its place; where none can, the call fails with one of theirs."""
    found = await run_in_threadpool(_targets, body, services, caller.project_id)

    async def one(served: Served) -> dict[str, Any] | GraftError:
        try:
            ids = await run_in_threadpool(_tokens, body, served)
            asked = asking.options(served, caller.project_id, body.sampling(), ends=not body.raw)
            answer = await services.engine.complete(served.target, ids, asked)
        except GraftError as error:
            return error
        choice = answer["choices"][0]
        told = {"text": choice["text"], "finish_reason": choice["finish_reason"]}
        return {**told, "usage": asking.counts(answer.get("usage")), "served_by": answer.get("served_by")}

    said = await while_listening(request, asking.side_by_side(one, found))
    failed = [told for told in said if isinstance(told, GraftError)]
    if len(failed) == len(said):
        # One that may be gone later says when to come back.
        raise next((error for error in failed if error.status in errors.LATER), failed[0])
    outputs = [
        Compared(
            target=name,
            model=served.target.base_model,
            adapter_id=served.adapter_id,
            **({"error": errors.body(told)} if isinstance(told, GraftError) else told),
        )
        for name, served, told in zip(body.targets, found, said, strict=True)
    ]
    return Comparison(id=f"cmp_{ULID()}", outputs=outputs)


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
    prompt.check_length(served, ids, body.max_new_tokens, "max_new_tokens", body.model_fields_set)
    return ids


async def _events(chunks: AsyncIterator[Answer], served: Served) -> AsyncIterator[str]:
    """`token` events and one `done`; an error in the middle is an `error` event."""
    finish_reason, usage, served_by = None, None, None
    try:
        async for chunk in chunks:
            for choice in chunk["choices"]:
                finish_reason = choice.get("finish_reason") or finish_reason
                if choice["text"]:
                    yield _event("token", {"text": choice["text"]})
            usage = chunk.get("usage") or usage
            served_by = chunk.get("served_by") or served_by
    except Exception as error:  # noqa: BLE001 - a stream that only ends looks like a whole answer
        yield _event("error", {"error": errors.body(errors.unexpected(error))})
        return
    yield _event(
        "done",
        {
            "id": f"gen_{ULID()}",
            "model": served.target.base_model,
            "adapter_id": served.adapter_id,
            "served_by": served_by,
            "finish_reason": finish_reason,
            "usage": asking.counts(usage),
        },
    )


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
