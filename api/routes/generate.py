"""Generation with a base model or an adapter, whole or streamed."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from api.deps import CallerDep, Services, ServicesDep, ready_model
from api.engine import Target
from api.requests import StrictRoute
from api.schemas.generate import GenerateRequest, Generation, Output
from core.control import adapters, db
from core.control.tables import Adapter
from core.errors import BadRequest, GraftError
from core.ml import catalogue, prompts
from core.ml import contract as contracts
from core.ml.formats.chat import messages
from core.ml.formats.chat.calls import tools_of
from core.ml.formats.chat.example import RowError
from core.ml.prompts import Contract

router = APIRouter(tags=["generation"], route_class=StrictRoute)

# How often it is asked whether the client still listens.
_LOOK_SECONDS = 0.5
_PROMPT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    contracts.CONTRACT_FILE,
)


@router.post("/generate", response_model=Generation)
async def generate(body: GenerateRequest, request: Request, services: ServicesDep, caller: CallerDep) -> Any:
    """Answer with the base model, or with an adapter by the prompt contract it was trained with."""
    target, ids, stop_ids, context = await run_in_threadpool(_prepare, body, services, caller.project_id)
    if context is not None and len(ids) + body.max_new_tokens > context:
        raise BadRequest(
            "prompt_too_long",
            f"The prompt has {len(ids)} tokens; with max_new_tokens {body.max_new_tokens} "
            f"that is more than the {context} the model reads.",
            param="max_new_tokens",
            status=400,
        )
    sampling = {
        "max_tokens": body.max_new_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": body.logit_bias,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        "stop_token_ids": [] if body.raw else stop_ids,
        "seed": body.seed,
        "n": body.n,
        # Prompts are only found again within a project.
        "cache_salt": caller.project_id,
    }
    if body.stream:
        chunks = await services.engine.stream(target, ids, sampling)
        return StreamingResponse(
            _events(chunks, target, body.adapter_id),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
    answer = await _while_listening(request, services.engine.complete(target, ids, sampling))
    outputs = [
        Output(text=choice["text"], finish_reason=choice["finish_reason"]) for choice in answer["choices"]
    ]
    return Generation(
        id=f"gen_{ULID()}",
        model=target.base_model,
        adapter_id=body.adapter_id,
        served_by=answer.get("served_by"),
        outputs=outputs,
        usage=_usage(answer),
    )


async def _while_listening(request: Request, answer: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """The answer; when the client hangs up before it is there, the engine's request is closed."""
    task = asyncio.create_task(answer)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise GraftError("client_gone", "The client hung up.", status=499)
        return task.result()
    finally:
        task.cancel()


def _prepare(
    body: GenerateRequest, services: Services, project_id: str
) -> tuple[Target, list[int], list[int], int | None]:
    """Where to send the prompt, its tokens, the tokens that end an answer, and the context length."""
    if body.adapter_id is not None:
        with db.reading(services.sessions) as session:
            row = adapters.get(session, project_id, body.adapter_id, param="adapter_id")
        folder = services.storage.local(f"{row.key}/files")
        path = str(folder) if folder else f"{services.storage.url.rstrip('/')}/{row.key}/files"
        target = Target(row.engine_name, row.base_model, path)
        services.storage.size(f"{row.key}/files/{contracts.CONTRACT_FILE}")  # or it says what is missing
        contract = contracts.load_cached(folder or _prompt_files(services, row))
        base = catalogue.find(services.catalogue, row.base_model)
    else:
        base = ready_model(services, body.model)
        target = Target(base.name, base.name)
        contract = contracts.load_cached(base.path)
    ids = _tokens(body, contract)
    if not ids:
        raise BadRequest("empty_prompt", "The prompt has no tokens.", param="prompt")
    return target, ids, list(contract.stop_token_ids), catalogue.describe(base)["context"]


def _tokens(body: GenerateRequest, contract: Contract) -> list[int]:
    if body.raw:
        return prompts.encode_plain(contract, body.prompt or "")
    if contract.rows == "text":
        if body.prompt is None:
            raise BadRequest(
                "no_turns",
                "The adapter was trained on plain texts without turns, so it answers no messages.",
                param="messages",
                hint="Send prompt: the beginning of a text as in the data set.",
            )
        return prompts.encode_beginning(contract, body.prompt)
    if body.messages is not None:
        given = [message.model_dump(exclude_none=True) for message in body.messages]
        try:
            turns, _, _ = messages.parse(given, messages.OPENAI)
            tools = tools_of({"tools": body.tools})
        except RowError as error:
            raise BadRequest(error.code, error.message, param=error.field, hint=error.hint) from error
        return prompts.encode_prompt(contract, turns, tools)
    return prompts.encode_prompt(contract, [{"role": "user", "content": body.prompt}])


def _prompt_files(services: Services, row: Adapter) -> Path:
    """A local copy of an adapter's tokenizer, fetched once from the bucket."""
    folder = services.settings.home / "cache" / "prompts" / f"{row.id}-{row.sha256[:12]}"
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{ULID()}.part")
        try:
            for name in _PROMPT_FILES:
                services.storage.get(f"{row.key}/files/{name}", part / name)
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another request was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


async def _events(
    chunks: AsyncIterator[dict[str, Any]], target: Target, adapter_id: str | None
) -> AsyncIterator[str]:
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
        yield _event("error", {"error": {**error.as_dict(), "type": "server_error"}})
        return
    yield _event(
        "done",
        {
            "id": f"gen_{ULID()}",
            "model": target.base_model,
            "adapter_id": adapter_id,
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
