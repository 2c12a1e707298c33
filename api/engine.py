"""Client of an inference engine: ours, vLLM, or any server with OpenAI completions and runtime LoRA loading."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any
from weakref import WeakValueDictionary

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector

from core.errors import Conflict, GraftError

# Beside the time that an answer may take: a first request waits until a base model is converted and loaded.
_LOADING_SECONDS = 120
# What an adapter is tried on: long enough to show what it does, short enough not to be noticed.
_PROBE_PROMPT = 256
_PROBE_TOKENS = 8
# What the engine says of the request is the client's business; the rest is ours.
_PASSED_ON = (400, 404, 409, 422, 429, 503, 504, 507)


@dataclass(frozen=True)
class Target:
    """The model name at the engine; for an adapter also the base it needs and where its files lie.

    An adapter's name holds the hash of its content and never means another one.
    """

    name: str
    base_model: str
    path: str | None = None


class Engine:
    def __init__(self, url: str, key: str | None, answer_seconds: float = 600) -> None:
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = ClientTimeout(total=None, sock_connect=3, sock_read=answer_seconds + _LOADING_SECONDS)
        # Adapters that this process saw loaded, and at work.
        self._loaded: set[str] = set()
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @cached_property
    def _http(self) -> ClientSession:
        """Of the event loop that runs."""
        return ClientSession(
            # How many may wait is the engine's to say. Connections are left before uvicorn closes them.
            connector=TCPConnector(limit=0, keepalive_timeout=3),
            headers=self._headers,
            timeout=self._timeout,
            cookie_jar=DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._http.close()

    async def complete(self, target: Target, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """One whole completion in the OpenAI form.

        Raises:
            GraftError: `engine_unavailable`, `engine_error`, `adapter_inert`, or what the engine found wrong.
        """
        return await _read(await self._send(target, {"model": target.name, "prompt": prompt, **sampling}))

    async def stream(
        self, target: Target, prompt: list[int], sampling: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a completion. The connection is open when this returns, so errors come first."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await self._send(target, {"model": target.name, "prompt": prompt, **sampling, **options})
        return _chunks(response)

    async def state(self) -> tuple[bool, dict[str, Any]]:
        """Whether it works, and what it says of itself: vLLM says nothing."""
        try:
            async with self._http.get(f"{self._url}/health", timeout=ClientTimeout(2)) as response:
                text = await response.read()
        except (ClientError, TimeoutError):
            return False, {}
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        return response.status == HTTPStatus.OK, said if isinstance(said, dict) else {}

    async def _send(self, target: Target, body: dict[str, Any]) -> ClientResponse:
        if target.path is not None and target.name not in self._loaded:
            await self._load(target, body["prompt"])
        response = await self._post("/v1/completions", body)
        if response.status == HTTPStatus.NOT_FOUND and target.path is not None:
            # It forgot: it was started anew.
            response.close()
            self._loaded.discard(target.name)
            await self._load(target, body["prompt"])
            response = await self._post("/v1/completions", body)
        if response.status == HTTPStatus.NOT_FOUND and target.path is None:
            response.close()
            raise GraftError(
                "model_not_served",
                f"The inference engine does not serve {target.base_model}.",
                status=503,
                hint="The engine behind GRAFT_ENGINE_URL has to serve the base model under this name.",
            )
        await _raise_for(response)
        return response

    async def _load(self, target: Target, prompt: list[int]) -> None:
        """Have the engine know an adapter, and see that it is at work."""
        async with self._loading.setdefault(target.name, asyncio.Lock()):
            if target.name not in self._loaded:
                await self._load_once(target, prompt)
                self._loaded.add(target.name)

    async def _load_once(self, target: Target, prompt: list[int]) -> None:
        asked = {"lora_name": target.name, "lora_path": target.path, "base_model_name": target.base_model}
        response = await self._post("/v1/load_lora_adapter", asked)
        text = (await _body(response)).decode(errors="replace")
        if not response.ok and "already been loaded" not in text:
            raise _not_loaded(target, response.status, text)
        if not _vouched_for(text):
            await self._probe(target, prompt[:_PROBE_PROMPT])

    async def _probe(self, target: Target, prompt: list[int]) -> None:
        """Engines were seen to say yes to adapters that they then passed over: see that the numbers change.

        Raises:
            GraftError: `adapter_inert`, 502.
        """
        asked = {
            "prompt": prompt,
            "max_tokens": _PROBE_TOKENS,
            "temperature": 0,
            "logprobs": 5,
            "return_tokens_as_token_ids": True,
        }
        told = []
        for name in (target.name, target.base_model):
            response = await self._post("/v1/completions", {"model": name, **asked})
            await _raise_for(response)
            told.append((await _read(response))["choices"][0]["logprobs"])
        if told[0] == told[1]:
            unloaded = await self._post("/v1/unload_lora_adapter", {"lora_name": target.name})
            unloaded.close()
            raise GraftError(
                "adapter_inert",
                f"The inference engine took {target.name}, and answers as the base model does.",
                status=502,
                hint="It does not know some layers of this base model for LoRA. Export the adapter merged and serve that.",
            )

    async def _post(self, path: str, body: dict[str, Any]) -> ClientResponse:
        try:
            return await self._http.post(self._url + path, json=body, allow_redirects=False)
        except ClientError as error:
            raise _unavailable() from error


async def _body(response: ClientResponse) -> bytes:
    try:
        return await response.read()
    except ClientError as error:
        raise _unavailable() from error
    finally:
        response.close()


async def _read(response: ClientResponse) -> dict[str, Any]:
    try:
        found = json.loads(await _body(response))
    except ValueError as error:
        raise _no_json() from error
    assert isinstance(found, dict)
    return found


async def _chunks(response: ClientResponse) -> AsyncIterator[dict[str, Any]]:
    try:
        async for line in _lines(response):
            if line == b"data: [DONE]":
                return
            if not line.startswith(b"data: "):
                continue
            try:
                chunk: dict[str, Any] = json.loads(line[6:])
            except ValueError as error:
                raise _no_json() from error
            if "error" in chunk:
                raise _said(chunk, HTTPStatus.BAD_GATEWAY, "The inference engine failed.")
            yield chunk
        raise _unavailable("The inference engine broke off in the middle of the answer.")
    except ClientError as error:
        raise _unavailable("The inference engine broke off in the middle of the answer.") from error
    finally:
        # Leaving early closes the connection, and with it the engine stops generating.
        response.close()


async def _lines(response: ClientResponse) -> AsyncIterator[bytes]:
    """Of any length, which those of aiohttp are not."""
    rest = b""
    async for part in response.content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
    yield rest


async def _raise_for(response: ClientResponse) -> None:
    if response.ok:
        return
    try:
        body = json.loads(await _body(response))
    except (ValueError, GraftError):
        body = None
    raise _said(body, response.status, f"The inference engine answered {response.status}.")


def _said(body: Any, status: int, otherwise: str) -> GraftError:
    """An engine's error; vLLM's codes are the numbers of statuses."""
    error = body.get("error") if isinstance(body, dict) else None
    told = error if isinstance(error, dict) else {}
    texts = {name: value for name, value in told.items() if isinstance(value, str)}
    code = texts.get("code", "")
    return GraftError(
        "engine_error" if not code or code.isdecimal() else code,
        texts.get("message") or otherwise,
        status=status if status in _PASSED_ON else HTTPStatus.BAD_GATEWAY,
        param=texts.get("param"),
        hint=texts.get("hint"),
    )


def _vouched_for(text: str) -> bool:
    """Whether the engine says, as ours does, that every tensor of the adapter has its place."""
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("checked") is True


def _not_loaded(target: Target, status: int, text: str) -> GraftError:
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    error = _said(body, status, f"The inference engine answered {status} when asked to load {target.name}.")
    known = error.code != "engine_error"
    if "rank" in error.message and not known:
        hint = "Start vLLM with a --max-lora-rank that is large enough, or export the adapter merged."
        return Conflict(
            "rank_not_served", f"The inference engine refuses {target.name}: {error.message}", hint=hint
        )
    if known and status in _PASSED_ON:
        return error
    return GraftError(
        "adapter_not_loaded",
        f"The inference engine did not load {target.name}: {error.message}",
        status=502,
        hint="vLLM needs --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and to see the files under the same path.",
    )


def _no_json() -> GraftError:
    return GraftError("engine_error", "The inference engine answered no JSON.", status=502)


def _unavailable(message: str = "The inference engine does not answer.") -> GraftError:
    return GraftError(
        "engine_unavailable",
        message,
        status=503,
        hint="It may still be starting; GET /health/ready shows its state.",
    )
