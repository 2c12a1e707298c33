"""The inference server: OpenAI completions and runtime LoRA loading around the engine.

It is spoken to by the API alone: on loopback or a private network, with a key of its own. The wire
is vLLM's, so that vLLM can stand in its place.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from core import log
from core.errors import BadRequest, GraftError, NotFound
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine, Finish, Sampling
from core.settings import Settings, load
from core.storage import Storage

# Requests that may wait for the one at work.
_MAX_WAITING = 32
# How often it is asked whether the client still listens.
_LOOK_SECONDS = 0.25
_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Completion(BaseModel):
    model: str
    prompt: list[int] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    repetition_penalty: float = Field(1.0, gt=0)
    stop: list[str] = []
    stop_token_ids: list[int] = []
    seed: int | None = None
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: dict[str, bool] | None = None

    def sampling(self, index: int) -> Sampling:
        """The sampling of the output number `index`: each of n has a seed of its own."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            seed=None if self.seed is None else self.seed + index,
        )


class LoadAdapter(BaseModel):
    lora_name: str
    lora_path: str
    base_model_name: str


class Server:
    """The engine, and how many requests are at it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = Engine(
            Catalogue(settings.models_folder, settings.models, settings.allow_hub),
            4 if settings.engine_bits == 4 else 16,
        )
        self.storage = Storage(settings.storage, s3_endpoint_url=settings.s3_endpoint_url)
        self.waiting = 0

    def folder(self, path: str, name: str) -> Path:
        """The adapter's files on this machine; only what lies in the storage is loaded."""
        root = self.storage.url.rstrip("/") + "/"
        key = path.removeprefix(root)
        if key == path or ".." in key.split("/"):
            raise BadRequest("invalid_lora_path", "lora_path does not lie in the storage.", status=400)
        if (local := self.storage.local(key)) is not None:
            return local
        folder = self.settings.home / "cache" / "adapters" / hashlib.sha256(name.encode()).hexdigest()[:32]
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.{ULID()}.part")
            for file in _FILES:
                self.storage.get(f"{key}/{file}", part / file)
            with contextlib.suppress(OSError):  # another request was faster
                part.rename(folder)
        return folder


def create_app() -> FastAPI:
    settings = load()
    log.setup(settings.log_level)
    app = FastAPI(title="Graft inference", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = Server(settings)
    app.add_exception_handler(GraftError, _error)
    app.include_router(router)
    app.add_api_route("/health", _health)
    return app


async def _health() -> dict[str, str]:
    return {"status": "ok"}


def _server(request: Request) -> Server:
    """The server, for callers that know its key."""
    server = request.app.state.server
    assert isinstance(server, Server)
    key = server.settings.engine_key
    given = request.headers.get("authorization", "").encode()
    if key is not None and not hmac.compare_digest(given, f"Bearer {key.get_secret_value()}".encode()):
        raise GraftError("invalid_key", "This is the inside of Graft; use its API.", status=401)
    return server


ServerDep = Annotated[Server, Depends(_server)]
router = APIRouter(prefix="/v1")


@router.post("/load_lora_adapter")
def load_adapter(body: LoadAdapter, server: ServerDep) -> dict[str, str]:
    try:
        folder = server.folder(body.lora_path, body.lora_name)
        server.engine.register(body.lora_name, body.base_model_name, folder)
    except FileNotFoundError as error:
        raise NotFound(
            "adapter_missing", f"The files of adapter {body.lora_name} are not in the storage."
        ) from error
    return {"status": "ok"}


@router.post("/completions", response_model=None)
async def completions(
    body: Completion, request: Request, server: ServerDep
) -> dict[str, Any] | StreamingResponse:
    if not await run_in_threadpool(server.engine.knows, body.model):
        raise NotFound("model_not_found", f"The model {body.model} is not loaded.")
    if server.waiting >= _MAX_WAITING:
        raise GraftError("engine_full", f"{server.waiting} requests are waiting already.", status=429)
    if body.stream:
        pieces = _Pieces(server, body, 0, request)
        first = await anext(pieces)  # what is wrong with the request shows before the answer begins
        return StreamingResponse(_chunks(body, first, pieces), media_type="text/event-stream")
    choices: list[dict[str, Any]] = []
    tokens = 0
    for index in range(body.n):
        text = ""
        if choices and choices[-1]["finish_reason"] == "cancelled":
            break
        async for piece in _Pieces(server, body, index, request):
            if isinstance(piece, Finish):
                choices.append(_choice(index, text, piece.reason))
                tokens += piece.tokens
            else:
                text += piece
    return {**_head(body), "choices": choices, "usage": _usage(body, tokens)}


class _Pieces:
    """The text of one output piece by piece and its Finish, made in a thread; leaving it cancels."""

    def __init__(self, server: Server, body: Completion, index: int, request: Request | None = None) -> None:
        self.server, self.body, self.index, self.request = server, body, index, request
        self.queue: asyncio.Queue[str | Finish | BaseException] = asyncio.Queue()
        self.cancelled = threading.Event()
        self.looked = 0.0
        self.over = False
        self.started = False

    def __aiter__(self) -> "_Pieces":
        return self

    async def __anext__(self) -> str | Finish:
        if self.over:
            raise StopAsyncIteration
        if not self.started:
            self._start()
        while True:
            if time.monotonic() - self.looked > _LOOK_SECONDS:
                self.looked = time.monotonic()
                if self.request is not None and await self.request.is_disconnected():
                    self.cancelled.set()
            try:
                item = await asyncio.wait_for(self.queue.get(), _LOOK_SECONDS)
                break
            except TimeoutError:
                continue
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if isinstance(item, BaseException):
            self.over = True
            raise item
        self.over = isinstance(item, Finish)
        return item

    def _start(self) -> None:
        self.started = True
        loop = asyncio.get_running_loop()

        def tell(item: str | Finish | BaseException) -> None:
            loop.call_soon_threadsafe(self.queue.put_nowait, item)

        def work() -> None:
            try:
                tell(
                    self.server.engine.generate(
                        self.body.model,
                        self.body.prompt,
                        self.body.sampling(self.index),
                        tell,
                        self.cancelled.is_set,
                    )
                )
            except Exception as error:  # noqa: BLE001 - raised again where the request waits
                tell(error)
            finally:
                loop.call_soon_threadsafe(self._done)

        self.server.waiting += 1
        threading.Thread(target=work, name="generate", daemon=True).start()

    def _done(self) -> None:
        self.server.waiting -= 1


async def _chunks(body: Completion, first: str | Finish, rest: _Pieces) -> AsyncIterator[str]:
    head = _head(body)
    tokens = 0
    item: str | Finish = first
    try:
        while isinstance(item, str):
            yield _event({**head, "choices": [_choice(0, item, None)], "usage": None})
            item = await anext(rest)
        tokens = item.tokens
        yield _event({**head, "choices": [_choice(0, "", item.reason)], "usage": None})
        if (body.stream_options or {}).get("include_usage"):
            yield _event({**head, "choices": [], "usage": _usage(body, tokens)})
    except GraftError as error:
        yield _event({"error": {"message": error.message, "code": error.code}})
    finally:
        rest.cancelled.set()
    yield "data: [DONE]\n\n"


def _head(body: Completion) -> dict[str, Any]:
    return {
        "id": f"cmpl-{ULID()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _usage(body: Completion, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": len(body.prompt),
        "completion_tokens": tokens,
        "total_tokens": len(body.prompt) + tokens,
    }


def _error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GraftError)
    headers = {"retry-after": "5"} if error.status in (429, 503) else {}
    return JSONResponse(
        {"error": {"message": error.message, "type": "invalid_request_error", "code": error.code}},
        error.status,
        headers,
    )
