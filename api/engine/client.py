"""Client of an inference engine: ours, vLLM, or any server with OpenAI completions and runtime LoRA loading."""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property, partial
from http import HTTPStatus
from typing import Any

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector

from api.engine import answers, events, refusals
from api.engine.answers import Answer
from api.engine.effect import Verdict, verdict
from core.errors import GraftError

# Beside the time that an answer may take: a first request waits until a base model is converted and loaded.
_LOADING_SECONDS = 120
# What an adapter is tried on: long enough to show what it does, short enough not to be noticed.
_PROBE_PROMPT = 256
_PROBE_TOKENS = 8
# So many times with it and without, where that is not clear once more. Noise that comes and goes, as other requests do,
# has to meet every time with it and none without to look like an effect.
_PROBES = 3
_TRIES = 2
# vLLM's words, and SGLang's.
_LOADED = re.compile("already (been )?loaded")
_BROKEN_OFF = "The inference engine broke off in the middle of the answer."


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
        self._longest = answer_seconds + _LOADING_SECONDS
        self._timeout = ClientTimeout(total=self._longest, connect=3)
        # Adapters that this process saw loaded, and at work; with the name that the engine gave to the model that answered.
        self._loaded: dict[str, str | None] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}

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
        for loading in self._loading.values():
            loading.cancel()
        await self._http.close()

    async def complete(self, target: Target, prompt: list[int], sampling: dict[str, Any]) -> Answer:
        """One whole completion in the OpenAI form.

        Raises:
            GraftError: `engine_unavailable`, `engine_error`, `adapter_inert`, `deadline_exceeded`, or what the engine found
                wrong.
        """
        outputs, copies = _outputs(sampling)
        body = {"model": target.name, "prompt": prompt, **sampling, "n": outputs}
        answer = answers.whole(await _body(await self._send(target, body)), outputs)
        self._see(target, answer)
        return answers.repeated(answer, copies)

    async def stream(self, target: Target, prompt: list[int], sampling: dict[str, Any]) -> "Stream":
        """The chunks of a completion. The connection is open when this returns, so errors come first."""
        outputs, copies = _outputs(sampling)
        options = {"n": outputs, "stream": True, "stream_options": {"include_usage": True}}
        response = await self._send(target, {"model": target.name, "prompt": prompt, **sampling, **options})
        if response.content_type != "text/event-stream":
            # Some refuse with a status of success.
            answers.read(await _body(response))
            raise refusals.no_completion("a stream was asked for")
        return Stream(response, self._chunks(response, target, outputs, copies))

    async def _chunks(
        self, response: ClientResponse, target: Target, outputs: int, copies: int
    ) -> AsyncIterator[Answer]:
        unfinished = set(range(outputs))
        try:
            async for data in events.data(response.content.iter_any()):
                if data.strip() == b"[DONE]":
                    if unfinished:
                        break
                    return
                chunk = answers.read(data)
                self._see(target, chunk)
                for choice in chunk["choices"]:
                    if choice["index"] >= outputs:
                        raise refusals.no_completion(f"there is no output {choice['index']}")
                    if choice.get("finish_reason"):
                        unfinished.discard(choice["index"])
                yield answers.repeated(chunk, copies)
            raise refusals.unavailable(_BROKEN_OFF)
        except ClientError as error:
            raise refusals.unavailable(_BROKEN_OFF) from error
        except TimeoutError as error:
            raise refusals.too_late() from error
        finally:
            # Leaving early closes the connection, and with it the engine stops generating.
            response.close()

    def _see(self, target: Target, answer: Answer) -> None:
        """That the one answers that was seen at work: some routers answer as the base model where a name is not known."""
        known = self._loaded.get(target.name)
        if known is not None and answer.get("model") not in (known, None):
            del self._loaded[target.name]
            raise refusals.forgotten(target.name)

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
            self._loaded.pop(target.name, None)
            await self._load(target, body)
            response = await self._post("/v1/completions", body)
        if response.status == HTTPStatus.NOT_FOUND:
            raise await self._unknown(target, response)
        await _raise_for(response)
        return response

    async def _unknown(self, target: Target, response: ClientResponse) -> GraftError:
        """That it is not there is no mistake of the client's."""
        if target.path is None:
            response.close()
            return refusals.not_served(target.base_model)
        self._loaded.pop(target.name, None)
        error = await _refusal(response)
        return refusals.forgotten(target.name) if error.code == "engine_error" else error

    async def _load(self, target: Target, body: dict[str, Any]) -> None:
        """Have the engine know an adapter, and see that it is at work; once for all who wait for it, whoever of them leaves."""
        loading = self._loading.get(target.name)
        if loading is None:
            loading = asyncio.create_task(self._load_once(target, body))
            self._loading[target.name] = loading
            loading.add_done_callback(partial(self._over, target.name))
        await asyncio.shield(loading)

    def _over(self, name: str, loading: asyncio.Task[None]) -> None:
        del self._loading[name]
        if not loading.cancelled():
            loading.exception()  # or asyncio complains where all who waited for it have left

    async def _load_once(self, target: Target, body: dict[str, Any]) -> None:
        asked = {"lora_name": target.name, "lora_path": target.path, "base_model_name": target.base_model}
        try:
            async with asyncio.timeout(self._longest):
                response = await self._post("/v1/load_lora_adapter", asked)
                text = (await _body(response)).decode(errors="replace")
                if not response.ok and not _LOADED.search(text):
                    raise refusals.not_loaded(target.name, response.status, text, _retry_after(response))
                answering = None if _vouched_for(text) else await self._probe(target, body)
        except TimeoutError as error:
            raise refusals.too_late() from error
        self._loaded[target.name] = answering

    async def _probe(self, target: Target, body: dict[str, Any]) -> str | None:
        """Engines were seen to say yes to adapters that they then passed over: see that the numbers change. Returns by what
        name it answers.

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
        base = Target(target.base_model, target.base_model)
        found: Verdict = "unclear"
        for _ in range(_TRIES):
            told: dict[Target, list[Any]] = {base: [], target: []}
            answering = None
            for one in [base, target] * _PROBES:
                # What was kept of a prompt is read by other kernels: nothing is, under a salt of nobody else.
                salted = {"model": one.name, "cache_salt": secrets.token_hex(8), **asked}
                response = await self._post("/v1/completions", salted)
                if response.status == HTTPStatus.NOT_FOUND:
                    raise await self._unknown(one, response)
                await _raise_for(response)
                answer = answers.whole(await _body(response), 1)
                answering = answer.get("model")
                told[one].append(answer["choices"][0].get("logprobs"))
            found = verdict(told[target], told[base])
            if found == "at work":
                return answering
            if found == "inert":
                unloaded = await self._post("/v1/unload_lora_adapter", {"lora_name": target.name})
                unloaded.close()
                break
        raise refusals.inert(target.name)

    async def _post(self, path: str, body: dict[str, Any]) -> ClientResponse:
        try:
            return await self._http.post(self._url + path, json=body, allow_redirects=False)
        except ClientError as error:  # also where nobody takes the connection in time
            raise refusals.unavailable() from error
        except TimeoutError as error:
            raise refusals.too_late() from error


class Stream(AsyncIterator[Answer]):
    """The chunks of a completion, as they come. Closing it has the engine stop."""

    def __init__(self, response: ClientResponse, chunks: AsyncIterator[Answer]) -> None:
        self._response, self._chunks = response, chunks

    async def __anext__(self) -> Answer:
        return await anext(self._chunks)

    def close(self) -> None:
        self._response.close()


def _outputs(sampling: dict[str, Any]) -> tuple[int, int]:
    """How many outputs to ask for, and how often each is told. The likeliest tokens are the same in all of them; vLLM
    refuses to write those more than once."""
    wanted = sampling.get("n") or 1
    return (1, wanted) if sampling.get("temperature") == 0 else (wanted, 1)


async def _body(response: ClientResponse) -> bytes:
    try:
        return await response.read()
    except ClientError as error:
        raise refusals.unavailable() from error
    except TimeoutError as error:
        raise refusals.too_late() from error
    finally:
        response.close()


async def _raise_for(response: ClientResponse) -> None:
    if response.status != HTTPStatus.OK:
        raise await _refusal(response)


async def _refusal(response: ClientResponse) -> GraftError:
    try:
        body = json.loads(await _body(response))
    except (ValueError, RecursionError, GraftError):
        body = None
    otherwise = f"The inference engine answered {response.status}."
    return refusals.said(body, response.status, otherwise, _retry_after(response))


def _retry_after(response: ClientResponse) -> int | None:
    """In seconds, where it says so."""
    said = response.headers.get("retry-after", "")
    return int(said) if said.isdecimal() and len(said) < 5 else None


def _vouched_for(text: str) -> bool:
    """Whether the engine says, as ours does, that every tensor of the adapter has its place."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and answer.get("checked") is True
