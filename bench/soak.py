"""Does the engine ever answer as another adapter, or keep what it should let go?

    python -m bench.soak [--minutes 20] [--adapters 50] [--room 4] [--clients 16] [--compute-dtype float32]

The engine's server runs as a process of its own, with memory for a few adapters of many. Clients ask at random for whole and
streamed answers, hang up in the middle, put other weights under a name, and ask for what is not there. Every adapter answers
the same prompts differently; what transformers and peft alone answer in float32 was written down before. Answers with log
probabilities, half of them, are compared with it token by token; the others by their text, where an answer of those
tokens was seen before. In another precision than float32, where rounding decides between tokens, nothing is compared and the
memory is what is looked at.

Ends with an error where an answer differs, where at the end requests, adapters or open files are left, or where the server's
memory after the first tenth of the time grew by more than a tenth. In a minute or two it may still be filling.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers.utils import logging

from bench.canaries import PROMPTS, TOKENS, VERSIONS, Canaries, make, written
from tests import tiny
from tests.serving.ours import Ours

_OF_THE_BASE = 0.1
_MOST_GROWTH = 1.1


@dataclass
class Report:
    """What was done, by its kind; the server's resident megabytes by the second, its open files before and after, what it
    holds at the end."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    files: tuple[int, int] = (0, 0)
    left: dict[str, Any] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Of the last tenth of the time over the second: by then every code path was taken."""
        tenth = max(1, len(self.megabytes) // 10)
        early, late = self.megabytes[tenth : 2 * tenth], self.megabytes[-tenth:]
        return statistics.median(late) / statistics.median(early)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--room", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        report = run(
            Path(folder),
            options.minutes * 60,
            options.adapters,
            options.room,
            options.clients,
            options.compute_dtype,
        )
    print(", ".join(f"{kind} {count}" for kind, count in sorted(report.done.items())))
    step = max(1, len(report.megabytes) // 20)
    print("resident MB:", *(round(size) for size in report.megabytes[::step]))
    print(f"memory grew to {report.growth:.3f} of itself; open files {report.files[0]} and {report.files[1]}")
    print(f"left at the end: {report.left}")
    if found := problems(report, options.room):
        sys.exit("\n".join(found))


def problems(report: Report, room: int) -> list[str]:
    """What must not be, in words; none when all is well."""
    found = [f"{len(report.wrong)} wrong answers:", *report.wrong[:20]] if report.wrong else []
    if report.left["running"] or report.left["waiting"] or report.left["adapters"] > room:
        found.append("something is left")
    if report.files[1] > report.files[0]:
        found.append("files are left open")
    if report.growth > _MOST_GROWTH:
        found.append(f"memory grew to more than {_MOST_GROWTH} of itself")
    return found


def run(
    folder: Path, seconds: float, adapters: int, room: int, clients: int, compute_dtype: str = "float32"
) -> Report:
    names = [f"ad_{number}" for number in range(adapters)]
    base, canaries = make(folder, names)
    size = (folder / "storage" / f"{names[0]}-0" / "adapter_model.safetensors").stat().st_size
    server = Ours(
        folder / "home",
        base,
        folder / "storage",
        GRAFT_ENGINE_COMPUTE_DTYPE=compute_dtype,
        GRAFT_ENGINE_ADAPTER_BYTES=str(size * room),
        GRAFT_ENGINE_PREFIX_BYTES=str(2**18),
        GRAFT_ENGINE_RUNNING="8",
        GRAFT_ENGINE_WAITING="8",
    )
    try:
        soak = Soak(server, folder / "storage", names, canaries, exact=compute_dtype == "float32")
        return asyncio.run(soak.run(seconds, clients))
    finally:
        server.stop()


class Soak:
    def __init__(
        self, server: Ours, storage: Path, names: list[str], canaries: Canaries, *, exact: bool
    ) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits)
        self.process = psutil.Process(server.process.pid)
        self.storage, self.names, self.canaries = storage, names, canaries
        self.report, self.exact = Report(), exact
        self.version = dict.fromkeys(names, 0)
        # How often each name was given other weights; odd while it happens.
        self.changes = Counter[str]()

    async def run(self, seconds: float, clients: int) -> Report:
        async with self.http:
            for name in self.names:
                await self._load(name, 0)
            before = self.process.num_fds() - 1  # without the client's own connection
            until = time.monotonic() + seconds
            await asyncio.gather(
                self._measure(until), *(self._client(seed, until) for seed in range(clients))
            )
            await self._idle()
        await asyncio.sleep(1)
        self.report.files = (before, self.process.num_fds())
        return self.report

    async def _client(self, seed: int, until: float) -> None:
        draw = random.Random(seed)
        doings = {
            self._ask: 11,
            self._hang_up_streaming: 2,
            self._hang_up: 2,
            self._exchange: 1,
            self._ask_wrongly: 1,
        }
        while time.monotonic() < until:
            (doing,) = draw.choices(list(doings), list(doings.values()))
            # Some are asked for often, as in life; all of them now and then.
            await doing(draw, self.names[int(len(self.names) * draw.random() ** 2)])

    async def _ask(self, draw: random.Random, name: str | None) -> None:
        """A whole or streamed answer, now and then of the base."""
        if draw.random() < _OF_THE_BASE:
            name = None
        number, stream, told = draw.randrange(len(PROMPTS)), draw.random() < 0.5, draw.random() < 0.5
        tokens_too = {"logprobs": 0, "return_tokens_as_token_ids": True} if told else {}
        before = self.changes[name or ""]
        response = await self.http.post(
            "/v1/completions", json=self._body(name, number, stream=stream, **tokens_too)
        )
        if response.status_code == 429:
            self.report.done["turned away"] += 1
            await asyncio.sleep(draw.random() * 0.1)
            return
        chunks = _chunks(response, stream=stream)
        self.report.done["streamed" if stream else "whole"] += 1
        changed = before % 2 or self.changes[name or ""] != before
        versions = range(VERSIONS) if changed else [self.version[name] if name else 0]
        right = [self.canaries.tokens[name, version, number] for version in versions]
        if self.exact and not self._same(chunks, right, by_tokens=told):
            self.report.wrong.append(
                f"{name} in {list(versions)}, prompt {number}: {response.text}; and not {right}"
            )

    def _same(self, chunks: list[dict[str, Any]], right: list[list[int]], *, by_tokens: bool) -> bool:
        """Whether an answer is one of those: by its tokens, or by its text where that is known from an earlier one."""
        choices = [chunk["choices"][0] for chunk in chunks]
        text = "".join(choice["text"] for choice in choices)
        if not by_tokens:
            texts = [self.canaries.texts.get(tuple(tokens)) for tokens in right]
            return None in texts or text in texts
        words = [word for one in choices if one["logprobs"] for word in one["logprobs"]["tokens"]]
        tokens = written(int(word.removeprefix("token_id:")) for word in words)
        self.canaries.texts.setdefault(tuple(tokens), text)
        return tokens in right and self.canaries.texts[tuple(tokens)] == text

    async def _hang_up_streaming(self, draw: random.Random, name: str) -> None:
        body = self._body(name, draw.randrange(len(PROMPTS)), stream=True, max_tokens=400, n=2)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            chunks = response.aiter_lines()
            for _ in range(draw.randrange(6)):
                await anext(chunks, None)
        self.report.done["hung up in the stream"] += 1

    async def _hang_up(self, draw: random.Random, name: str) -> None:
        body = self._body(name, draw.randrange(len(PROMPTS)), max_tokens=400)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.http.post("/v1/completions", json=body), draw.random() * 0.1)
        self.report.done["hung up"] += 1

    async def _exchange(self, _draw: random.Random, name: str) -> None:
        if self.changes[name] % 2:
            return
        self.changes[name] += 1
        version = (self.version[name] + 1) % VERSIONS
        await self._load(name, version)
        self.version[name] = version
        self.changes[name] += 1
        self.report.done["weights exchanged"] += 1

    async def _ask_wrongly(self, draw: random.Random, name: str) -> None:
        """Each is refused, and harms nobody."""
        cases: list[tuple[dict[str, Any], int]] = [
            ({"model": "ad_none"}, 404),
            ({"prompt": [10**6]}, 400),
            ({"max_tokens": 10**6}, 400),
            ({"top_p": 7}, 422),
        ]
        wrong, status = draw.choice(cases)
        response = await self.http.post("/v1/completions", json=self._body(name, 0, **wrong))
        self.report.done["refused"] += 1
        if response.status_code != status:
            self.report.wrong.append(f"{wrong}: {response.status_code} {response.text}")

    def _body(self, name: str | None, number: int, **more: Any) -> dict[str, Any]:
        return {
            "model": name or tiny.NAME,
            "prompt": PROMPTS[number],
            "max_tokens": TOKENS,
            "temperature": 0,
            **more,
        }

    async def _load(self, name: str, version: int) -> None:
        path = str(self.storage / f"{name}-{version}")
        body = {"lora_name": name, "lora_path": path, "base_model_name": tiny.NAME}
        (await self.http.post("/v1/load_lora_adapter", json=body)).raise_for_status()

    async def _measure(self, until: float) -> None:
        while time.monotonic() < until:
            self.report.megabytes.append(self.process.memory_info().rss / 1e6)
            await asyncio.sleep(1)

    async def _idle(self) -> None:
        """Those who hung up are noticed within a second."""
        for _ in range(100):
            self.report.left = (await self.http.get("/health")).json()
            if not self.report.left["running"] and not self.report.left["waiting"]:
                return
            await asyncio.sleep(0.1)


def _chunks(response: httpx.Response, *, stream: bool) -> list[dict[str, Any]]:
    response.raise_for_status()
    if not stream:
        return [response.json()]
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", response.text
    chunks = [json.loads(line) for line in lines[:-1]]
    assert not any("error" in chunk for chunk in chunks), response.text
    return chunks


if __name__ == "__main__":
    main()
