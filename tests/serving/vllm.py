"""A stand-in for vLLM's HTTP server: its routes, its statuses and bodies, and what was seen to go wrong with it.

Its model is a hash: the next token depends on the adapter and on all tokens before.
"""

import asyncio
import hashlib
import json
import random
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MAX_RANK = 16
# Some end with what ends a line elsewhere, but not in a stream of events.
_WORDS = ["a ", "be\u2028", "see ", "dee\u2029", "ee ", "eff\x85", "gee ", "ouch "]


class Vllm:
    """`updating`: VLLM_ALLOW_RUNTIME_LORA_UPDATING; `passes_over`: the next adapters are taken and not applied; `slow`:
    seconds that a load takes; `dies`: a stream breaks off after so many tokens; `noise`: by how much the same log
    probabilities differ from one answer to the next, as where others are in the batch."""

    def __init__(self, served_name: str) -> None:
        self.served_name = served_name
        self.updating, self.passes_over, self.slow = True, False, 0.0
        self.dies: int | None = None
        self.noise, self._draw = 0.0, random.Random(0)
        self.bodies: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self._adapters: dict[str, str] = {}
        routes = [
            Route("/health", lambda _: Response()),
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(Starlette(routes=routes), port=port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def restart(self) -> None:
        """Its registry of adapters is in memory only."""
        self._adapters.clear()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def _models(self, _request: Request) -> Response:
        names = [self.served_name, *self._adapters]
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def _load(self, request: Request) -> Response:
        if not self.updating:
            return JSONResponse({"detail": "Not Found"}, 404)
        body = await request.json()
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self._adapters:
            message = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
            return _error(message, "InvalidUserInput", 400)
        await asyncio.sleep(self.slow)
        if not (folder / "adapter_config.json").is_file():
            message = f"Loading lora {name} failed: No adapter found for {folder}"
            return _error(message, "NotFoundError", 404)
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > MAX_RANK:
            message = f"LoRA rank {rank} is greater than max_lora_rank {MAX_RANK}."
            return _error(message, "BadRequestError", 400)
        self.loads.append(name)
        weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        self._adapters[name] = "" if self.passes_over else weights
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self._adapters.pop(name, None) is None:
            return _error(f"The lora adapter '{name}' cannot be found.", "NotFoundError", 404)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        name = body["model"]
        if name != self.served_name and name not in self._adapters:
            return _error(f"The model `{name}` does not exist.", "NotFoundError", 404)
        if body.get("n", 1) > 1 and body.get("temperature") == 0:
            return _error("n must be 1 when using greedy sampling", "BadRequestError", 400)
        effect = self._adapters.get(name, "")
        tokens = self._tokens(effect, body["prompt"], body["max_tokens"])
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": name}
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(tokens),
            "total_tokens": len(body["prompt"]) + len(tokens),
        }
        if body.get("stream"):
            return StreamingResponse(self._stream(head, tokens, usage), media_type="text/event-stream")
        text = "".join(_WORDS[token] for token, _ in tokens)
        logprobs = None
        if body.get("logprobs") is not None:
            logprobs = {
                "tokens": [f"token_id:{token}" for token, _ in tokens],
                "token_logprobs": [value for _, value in tokens],
                "top_logprobs": [{f"token_id:{token}": value} for token, value in tokens],
                "text_offset": [0] * len(tokens),
            }
        choice = {
            "index": 0,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length",
            "stop_reason": None,
        }
        return JSONResponse({**head, "choices": [choice], "usage": usage})

    async def _stream(
        self, head: dict[str, Any], tokens: list[tuple[int, float]], usage: dict[str, int]
    ) -> AsyncIterator[str]:
        for i, (token, _) in enumerate(tokens):
            if i == self.dies:
                raise ConnectionAbortedError("it dies")
            reason = "length" if i == len(tokens) - 1 else None
            choice = {"index": 0, "text": _WORDS[token], "logprobs": None, "finish_reason": reason}
            yield _event({**head, "choices": [choice], "usage": None})
            await asyncio.sleep(0)
        yield _event({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _tokens(self, effect: str, prompt: list[int], count: int) -> list[tuple[int, float]]:
        state, made = f"{effect}{prompt}".encode(), []
        for _ in range(count):
            state = hashlib.sha256(state).digest()
            made.append((state[0] % len(_WORDS), -state[1] / 64 + self.noise * self._draw.gauss(0, 1)))
        return made


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error(message: str, kind: str, status: int) -> Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status)
