"""Client of an inference engine: ours, vLLM, or any server with OpenAI completions and runtime LoRA loading."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any
from weakref import WeakValueDictionary

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector

from api.engine import refusals
from api.engine.effect import verdict
from core.errors import GraftError

# Beside the time that an answer may take: a first request waits until a base model is converted and loaded.
_LOADING_SECONDS = 120
# What an adapter is tried on: long enough to show what it does, short enough not to be noticed.
_PROBE_PROMPT = 256
_PROBE_TOKENS = 8
_PROBES = 3


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
        self._timeout = ClientTimeout(total=None, connect=3, sock_read=answer_seconds + _LOADING_SECONDS)
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

    async def stream(self, target: Target, prompt: list[int], sampling: dict[str, Any]) -> "Stream":
        """The chunks of a completion. The connection is open when this returns, so errors come first."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await self._send(target, {"model": target.name, "prompt": prompt, **sampling, **options})
        return Stream(response)

    async def state(self) -> tuple[bool, dict[str, Any]]:
        """Whether it works, and what it says of itself: vLLM says nothing."""
        try:
            async with self._http.get(
                f"{self._url}/health", timeout=ClientTimeout(2), allow_redirects=False
            ) as response:
                text = await response.read()
        except (ClientError, TimeoutError, ValueError):
            return False, {}
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        return response.status == HTTPStatus.OK, said if isinstance(said, dict) else {}

    async def _send(self, target: Target, body: dict[str, Any]) -> ClientResponse:
        if target.path is not None and target.name not in self._loaded:
            await self._load(target, body)
        response = await self._post("/v1/completions", body)
        if response.status == HTTPStatus.NOT_FOUND and target.path is not None:
            # It forgot: it was started anew.
            response.close()
            self._loaded.discard(target.name)
            await self._load(target, body)
            response = await self._post("/v1/completions", body)
        if response.status == HTTPStatus.NOT_FOUND and target.path is None:
            response.close()
            raise refusals.not_served(target.base_model)
        await _raise_for(response)
        return response

    async def _load(self, target: Target, body: dict[str, Any]) -> None:
        """Have the engine know an adapter, and see that it is at work."""
        async with self._loading.setdefault(target.name, asyncio.Lock()):
            if target.name not in self._loaded:
                await self._load_once(target, body)
                self._loaded.add(target.name)

    async def _load_once(self, target: Target, body: dict[str, Any]) -> None:
        asked = {"lora_name": target.name, "lora_path": target.path, "base_model_name": target.base_model}
        response = await self._post("/v1/load_lora_adapter", asked)
        text = (await _body(response)).decode(errors="replace")
        if not response.ok and "already been loaded" not in text:
            raise refusals.not_loaded(target.name, response.status, text)
        if not _vouched_for(text):
            await self._probe(target, body)

    async def _probe(self, target: Target, body: dict[str, Any]) -> None:
        """Engines were seen to say yes to adapters that they then passed over: see that the numbers change.

        Raises:
            GraftError: `adapter_inert`, 502; `model_not_served`, 503.
        """
        asked = {
            "prompt": body["prompt"][:_PROBE_PROMPT],
            "max_tokens": _PROBE_TOKENS,
            "temperature": 0,
            "logprobs": 5,
            "return_tokens_as_token_ids": True,
        }
        for _ in range(_PROBES):
            told = []
            for name in (target.base_model, target.name, target.base_model):
                # What was kept of a prompt is read by other kernels: nothing is, under a salt of nobody else.
                salted = {"model": name, "cache_salt": secrets.token_hex(8), **asked}
                response = await self._post("/v1/completions", salted)
                if response.status == HTTPStatus.NOT_FOUND and name == target.base_model:
                    response.close()
                    raise refusals.not_served(name)
                await _raise_for(response)
                told.append((await _read(response))["choices"][0]["logprobs"])
            found = verdict(told[1], (told[0], told[2]))
            if found == "at work":
                return
            if found == "inert":
                unloaded = await self._post("/v1/unload_lora_adapter", {"lora_name": target.name})
                unloaded.close()
                break
        raise refusals.inert(target.name)

    async def _post(self, path: str, body: dict[str, Any]) -> ClientResponse:
        try:
            return await self._http.post(self._url + path, json=body, allow_redirects=False)
        except (ClientError, ValueError) as error:  # the latter of an address or a key that cannot be sent
            raise refusals.unavailable() from error


class Stream(AsyncIterator[dict[str, Any]]):
    """The chunks of a completion, as they come. Closing it has the engine stop."""

    def __init__(self, response: ClientResponse) -> None:
        self._response, self._chunks = response, _chunks(response)

    async def __anext__(self) -> dict[str, Any]:
        return await anext(self._chunks)

    def close(self) -> None:
        self._response.close()


async def _body(response: ClientResponse) -> bytes:
    try:
        return await response.read()
    except ClientError as error:
        raise refusals.unavailable() from error
    finally:
        response.close()


async def _read(response: ClientResponse) -> dict[str, Any]:
    try:
        found = json.loads(await _body(response))
    except ValueError as error:
        raise refusals.no_json() from error
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
                raise refusals.no_json() from error
            if "error" in chunk:
                raise refusals.said(chunk, HTTPStatus.BAD_GATEWAY, "The inference engine failed.")
            yield chunk
        raise refusals.unavailable("The inference engine broke off in the middle of the answer.")
    except ClientError as error:
        raise refusals.unavailable("The inference engine broke off in the middle of the answer.") from error
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
    raise refusals.said(body, response.status, f"The inference engine answered {response.status}.")


def _vouched_for(text: str) -> bool:
    """Whether the engine says, as ours does, that every tensor of the adapter has its place."""
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("checked") is True
