"""How answers end that nobody reads, or that an engine cannot finish."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.engine.client import Engine, Target
from api.serving.listening import event_stream
from core.errors import GraftError
from tests import tiny
from tests.ml.inference import strong
from tests.serving.ours import Ours

PROMPT = strong.prompt(20, seed=1)
BASE = Target(tiny.NAME, tiny.NAME)
LONG = {"max_tokens": 900, "temperature": 0, "logit_bias": {"2": -100}}


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Ours]:
    base = strong.model(tmp_path / "base", strong.CONFIGURATIONS["llama"])
    made = Ours(tmp_path / "home", base, tmp_path / "storage")
    yield made
    made.stop()


def test_a_client_that_is_gone_before_the_first_event_stops_the_engine(ours: Ours) -> None:
    async def events(told: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        async for _ in told:
            yield "data: {}\n\n"

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        await asyncio.sleep(0)

    async def talk() -> None:
        engine = Engine(ours.url, None)
        try:
            for _ in range(8):
                told = await engine.stream(BASE, PROMPT, LONG)
                # As uvicorn calls it: starlette listens for the client beside the events.
                await event_stream(told, events(told))({"type": "http"}, gone, send)
            for _ in range(500):
                _, said = await engine.state()
                if not said["running"]:
                    return
                await asyncio.sleep(0.02)
            raise AssertionError(f"still being written: {said}")
        finally:
            await engine.close()

    asyncio.run(talk())


def test_whoever_still_waits_when_it_is_asked_to_end_is_told(ours: Ours) -> None:
    async def streamed(engine: Engine) -> None:
        async for _ in await engine.stream(BASE, PROMPT, LONG):
            pass

    async def talk() -> list[Any]:
        engine = Engine(ours.url, None)
        try:
            await engine.complete(BASE, PROMPT, {"max_tokens": 1})  # the model is there
            asking = [
                asyncio.create_task(
                    streamed(engine) if n % 2 else engine.complete(BASE, PROMPT, {**LONG, "n": 8})
                )
                for n in range(16)
            ]
            await asyncio.sleep(1)  # it is writing by now
            ours.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asking, return_exceptions=True)
        finally:
            await engine.close()

    ends = asyncio.run(talk())
    for number, end in enumerate(ends):
        if isinstance(end, BaseException):
            assert isinstance(end, GraftError)
            assert (end.code, bool(end.hint)) == ("engine_unavailable", True)
            assert "it is closed" in end.message
            assert number % 2 or end.status == 503
    assert any(isinstance(end, GraftError) for end in ends[::2])
    assert any(isinstance(end, GraftError) for end in ends[1::2])
    assert ours.process.wait(10) is not None
