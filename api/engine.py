"""Client of an inference engine: ours, or any server with OpenAI completions and runtime LoRA loading."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from core.errors import GraftError

# A first request can wait until a base model is converted and loaded.
_TIMEOUT = httpx.Timeout(600, connect=3)


@dataclass(frozen=True)
class Target:
    """The model name at the engine; for an adapter also the base it needs and where its files lie."""

    name: str
    base_model: str
    path: str | None = None


class Engine:
    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT)

    async def close(self) -> None:
        await self._http.aclose()

    async def complete(self, target: Target, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """One whole completion in the OpenAI form.

        Raises:
            GraftError: `engine_unavailable`, `engine_error`, or what the engine found wrong.
        """
        response = await self._send(target, {"model": target.name, "prompt": prompt, **sampling})
        try:
            body = await response.aread()
        except httpx.HTTPError as error:
            raise _unavailable() from error
        finally:
            await response.aclose()
        result: dict[str, Any] = json.loads(body)
        return result

    async def stream(
        self, target: Target, prompt: list[int], sampling: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a completion. The connection is open when this returns, so errors come first."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await self._send(target, {"model": target.name, "prompt": prompt, **sampling, **options})
        return self._chunks(response)

    async def ready(self) -> bool:
        try:
            return (await self._http.get("/health", timeout=2)).status_code == 200
        except httpx.HTTPError:
            return False

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        try:
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk: dict[str, Any] = json.loads(line[6:])
                if "error" in chunk:
                    raise GraftError("engine_error", str(chunk["error"].get("message")), status=502)
                yield chunk
        except httpx.HTTPError as error:
            raise _unavailable() from error
        finally:
            # Leaving early closes the connection, and with it the engine stops generating.
            await response.aclose()

    async def _send(self, target: Target, body: dict[str, Any]) -> httpx.Response:
        response = await self._post("/v1/completions", body)
        if response.status_code == 404 and target.path is not None:
            await response.aclose()
            loaded = await self._post(
                "/v1/load_lora_adapter",
                {
                    "lora_name": target.name,
                    "lora_path": target.path,
                    "base_model_name": target.base_model,
                },
            )
            await _raise_for(loaded)
            await loaded.aclose()
            response = await self._post("/v1/completions", body)
        await _raise_for(response)
        return response

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return await self._http.send(self._http.build_request("POST", path, json=body), stream=True)
        except httpx.HTTPError as error:
            raise _unavailable() from error


async def _raise_for(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    body = await response.aread()
    await response.aclose()
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), str(error.get("code") or "engine_error")
    except (ValueError, KeyError, TypeError):
        message, code = f"The engine answered {response.status_code}.", "engine_error"
    # What the engine says of the request is the client's business; the rest is ours.
    status = response.status_code if response.status_code in (400, 404, 409, 422, 429, 503) else 502
    raise GraftError(code, message, status=status)


def _unavailable() -> GraftError:
    return GraftError(
        "engine_unavailable",
        "The inference engine does not answer.",
        status=503,
        hint="It may still be starting; GET /health/ready shows its state.",
    )
