"""The inference server: OpenAI completions and runtime LoRA loading around the engine.

It is spoken to by the API alone: on loopback or a private network, with a key of its own. The wire
is vLLM's, so that vLLM can stand in its place.
"""

import asyncio
import contextlib
import hashlib
import hmac
import os
import shutil
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from core import log
from core.errors import BadRequest, GraftError, NotFound
from core.ml import base_model
from core.ml.catalogue import Catalogue
from core.ml.inference.answering import Finish, Piece
from core.ml.inference.engine import Engine
from core.ml.inference.scheduler import Limits
from core.ml.quantization import Quantization
from core.settings import Settings, load
from core.storage import Storage
from worker import device
from worker.inference import copies, wire
from worker.inference.schemas import Completion, LoadAdapter

_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Of the seconds for which uvicorn lets go on what is being answered (--timeout-graceful-shutdown 5).
_LAST_SECONDS = 3
# On disk, from a bucket; one that is asked for after it was removed is fetched again.
_MOST_COPIES = 64


class Server:
    """The engine, and where adapters come from."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = Engine(
            Catalogue(settings.models_folder, settings.models, settings.allow_hub),
            base_model.settle(
                Quantization(
                    bits=4 if settings.engine_bits == 4 else 16, compute_dtype=settings.engine_compute_dtype
                )
            ),
            Limits(
                adapter_bytes=settings.engine_adapter_bytes,
                prefix_bytes=settings.engine_prefix_bytes,
                cache_bytes=settings.engine_cache_bytes,
                running=settings.engine_running,
                waiting=settings.engine_waiting,
                answer_seconds=settings.engine_answer_seconds,
                idle_seconds=settings.engine_idle_seconds,
            ),
            # Whoever started this process starts it anew.
            broke=lambda: os.kill(os.getpid(), signal.SIGTERM),
            # A CPU's memory is enough for both.
            shared=device.Shared(settings.home) if base_model.device().type == "cuda" else None,
        )
        # Copies from a bucket: those that are still asked for are fetched again.
        shutil.rmtree(settings.home / "cache" / "adapters", ignore_errors=True)
        self.storage = Storage(settings.storage, s3_endpoint_url=settings.s3_endpoint_url)
        self._copies: dict[str, Path] = {}

    def knows(self, name: str) -> bool:
        """Whether a completion can name this. The copy of an adapter then stays for as long as the answer may take;
        one that is gone has to be loaded again."""
        copy = self._copies.get(name)
        return self.engine.knows(name) and (copy is None or copies.use(copy))

    def folder(self, path: str, name: str) -> Path:
        """The adapter's files on this machine; only what lies in the storage is loaded."""
        root = self.storage.url.rstrip("/") + "/"
        key = path.removeprefix(root)
        if key == path or ".." in key.split("/"):
            raise BadRequest("invalid_lora_path", "lora_path does not lie in the storage.", status=400)
        if (local := self.storage.local(key)) is not None:
            return local
        folder = self.settings.home / "cache" / "adapters" / hashlib.sha256(name.encode()).hexdigest()[:32]
        self._copies[name] = folder
        return copies.get(
            self.storage, key, _FILES, folder, _MOST_COPIES, self.settings.engine_answer_seconds
        )


def create_app() -> FastAPI:
    settings = load()
    log.setup(settings.log_level)
    app = FastAPI(
        title="Graft inference", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.server = Server(settings)
    app.state.started_at = datetime.now(UTC)
    app.add_exception_handler(GraftError, _error)
    app.include_router(router)
    app.add_api_route("/health", _health)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Asked to end, the engine goes on for a while and then tells those who still wait; uvicorn would cut them off."""
    uvicorns = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        closing = threading.Timer(_LAST_SECONDS, app.state.server.engine.close, kwargs={"wait": False})
        closing.daemon = True
        closing.start()
        if callable(uvicorns):
            uvicorns(number, frame)

    if threading.current_thread() is threading.main_thread():  # others hear of no signals
        signal.signal(signal.SIGTERM, end)
    yield


async def _health(request: Request, response: Response) -> dict[str, Any]:
    engine = request.app.state.server.engine
    if engine.broken is not None:
        response.status_code = 503
        return {"status": "broken", "error": engine.broken}
    started_at = request.app.state.started_at.isoformat(timespec="seconds")
    return {"status": "ok", "started_at": started_at, **engine.state()}


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
def load_adapter(body: LoadAdapter, server: ServerDep) -> dict[str, Any]:
    """`checked`: each of its tensors has a place, so nobody has to try whether it is at work."""
    try:
        folder = server.folder(body.lora_path, body.lora_name)
        server.engine.register(body.lora_name, body.base_model_name, folder)
    except FileNotFoundError as error:
        raise NotFound(
            "adapter_missing",
            f"The files of adapter {body.lora_name} are not in the storage.",
            hint="Bring them back from a backup of the storage, or train the adapter again.",
        ) from error
    return {"status": "ok", "checked": True}


@router.post("/completions", response_model=None)
async def completions(
    body: Completion, request: Request, server: ServerDep
) -> JSONResponse | StreamingResponse:
    told = _told(server, body, request)
    if body.stream:
        first = await anext(told)  # what is wrong with the request shows before the answer begins
        return StreamingResponse(_chunks(body, first, told), media_type="text/event-stream")
    outputs = [wire.Output() for _ in range(body.n)]
    async for index, item in told:
        outputs[index].add(item)
    choices = [output.choice(index, body) for index, output in enumerate(outputs)]
    ends = [output.finish for output in outputs if output.finish is not None]
    usage, served_by = wire.usage(body, ends), ends[0].path
    # As it is: FastAPI would walk through every log probability first.
    return JSONResponse({**wire.head(body), "choices": choices, "usage": usage, "served_by": served_by})


async def _told(
    server: Server, body: Completion, request: Request
) -> AsyncGenerator[tuple[int, Piece | Finish], None]:
    """What the engine tells of the outputs, by their number; leaving it, or hanging up, cancels them all.

    Raises:
        GraftError: what was wrong with the request, or went wrong with one of its outputs.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Piece | Finish | GraftError]] = asyncio.Queue()
    gone = threading.Event()
    held: list[tuple[int, Piece | Finish | GraftError]] = []

    def tell(index: int, item: Piece | Finish | GraftError) -> None:
        held.append((index, item))
        # Waking the server for every token of an answer that nobody reads before its end takes time from the engine.
        if body.stream or not isinstance(item, Piece):
            news = list(held)
            held.clear()
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(pass_on, news)

    def pass_on(news: list[tuple[int, Piece | Finish | GraftError]]) -> None:
        for one in news:
            queue.put_nowait(one)

    def submit() -> None:
        if not server.knows(body.model):
            raise NotFound("model_not_found", f"The model {body.model} is not loaded.")
        server.engine.submit(body.model, body.prompt, body.sampling(), tell, gone.is_set, body.cache_salt)

    unfinished, listening = body.n, asyncio.create_task(_listen(request, gone))
    try:
        await run_in_threadpool(submit)
        while unfinished:
            index, item = await queue.get()
            if isinstance(item, GraftError):
                raise item
            unfinished -= isinstance(item, Finish)
            yield index, item
    finally:
        gone.set()
        listening.cancel()


async def _listen(request: Request, gone: threading.Event) -> None:
    """Until the client hangs up. The request's body has been read, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _chunks(
    body: Completion,
    first: tuple[int, Piece | Finish],
    rest: AsyncGenerator[tuple[int, Piece | Finish], None],
) -> AsyncIterator[str]:
    head = wire.head(body)
    ends: list[Finish] = []
    try:
        async with contextlib.aclosing(rest):
            index, item = first
            while True:
                if isinstance(item, Finish):
                    ends.append(item)
                    choice = wire.choice(index, "", [], item.reason, body)
                    served_by = {"served_by": item.path}
                else:
                    choice, served_by = wire.choice(index, item.text, item.choices, None, body), {}
                yield wire.event({**head, "choices": [choice], "usage": None, **served_by})
                if len(ends) == body.n:
                    break
                index, item = await anext(rest)
        if (body.stream_options or {}).get("include_usage"):
            usage = {"usage": wire.usage(body, ends), "served_by": ends[0].path}
            yield wire.event({**head, "choices": [], **usage})
    except GraftError as error:
        yield wire.event(wire.error(error))
    yield "data: [DONE]\n\n"


def _error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GraftError)
    headers = {"retry-after": "5"} if error.status in (429, 503) else {}
    return JSONResponse(wire.error(error), error.status, headers)
