"""One suite for every engine that can stand behind the API: our own, as a process that is killed, and vLLM's wire."""

import asyncio
import json
import threading
import time
from collections.abc import Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Protocol

import pytest
from safetensors.torch import load_file, save_file

from api.engine.client import Engine, Target
from core.errors import GraftError
from tests import tiny
from tests.ml.inference import strong
from tests.serving.ours import Ours
from tests.serving.vllm import MAX_RANK, Vllm

PROMPT = strong.prompt(20, seed=1)
GREEDY = {"max_tokens": 12, "temperature": 0, "logit_bias": {"2": -100}}


class Served(Protocol):
    url: str

    def restart(self) -> None: ...
    def stop(self) -> None: ...


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` are adapters, `inert` changes nothing, `misfit` fits no layer."""
    folder = tmp_path_factory.mktemp("engines")
    base = strong.model(folder / "base", strong.CONFIGURATIONS["llama"])
    for seed, name in enumerate(("a", "b", "inert", "misfit")):
        strong.adapter(folder / "storage" / name, base, seed)
    _rewrite(folder / "storage" / "inert", lambda key, weights: (key, weights * ("lora_B" not in key)))
    _rewrite(folder / "storage" / "misfit", lambda key, weights: (key.replace("q_proj", "query"), weights))
    return folder / "storage"


def _rewrite(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(dict(change(*item) for item in load_file(file).items()), file)


@pytest.fixture(scope="module", params=["ours", "vllm"])
def served(request: pytest.FixtureRequest, storage: Path) -> Iterator[Served]:
    made: Served
    if request.param == "ours":
        made = Ours(storage.parent / "home", storage.parent / "base", storage)
    else:
        made = Vllm(tiny.NAME)
    yield made
    made.stop()


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    made = Vllm(tiny.NAME)
    yield made
    made.stop()


BASE = Target(tiny.NAME, tiny.NAME)


def target(storage: Path, name: str, called: str | None = None) -> Target:
    return Target(called or f"ad_{name}@0123", tiny.NAME, str(storage / name))


def talking(url: str, talk: Any) -> Any:
    """The result of `await talk(engine)` with a client of its own, as a new API process has."""

    async def run() -> Any:
        engine = Engine(url, None)
        try:
            return await talk(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


async def text(engine: Engine, who: Target, **options: Any) -> str:
    answer = await engine.complete(who, PROMPT, {**GREEDY, **options})
    return str(answer["choices"][0]["text"])


async def streamed(engine: Engine, who: Target, **options: Any) -> str:
    chunks = await engine.stream(who, PROMPT, {**GREEDY, **options})
    return "".join([choice["text"] async for chunk in chunks for choice in chunk["choices"]])


async def refused(answer: Coroutine[Any, Any, Any]) -> GraftError:
    with pytest.raises(GraftError) as caught:
        await answer
    return caught.value


def test_base_and_adapters_answer_each_in_their_own_way(served: Served, storage: Path) -> None:
    async def talk(engine: Engine) -> list[str]:
        asked = [BASE, target(storage, "a"), target(storage, "b")]
        whole = [await text(engine, who) for who in asked]
        assert [await streamed(engine, who) for who in asked] == whole
        assert list(await asyncio.gather(*(text(engine, who) for who in asked * 4))) == whole * 4
        return whole

    whole = talking(served.url, talk)
    assert len(set(whole)) == 3
    assert talking(served.url, talk) == whole  # an API process that knows of nothing


def test_an_adapter_is_loaded_anew_after_the_engine_began_anew(served: Served, storage: Path) -> None:
    async def talk(engine: Engine) -> None:
        who = target(storage, "a")
        before = await text(engine, who)
        await asyncio.to_thread(served.restart)
        assert await text(engine, who) == before
        assert await streamed(engine, who) == before

    talking(served.url, talk)


def test_it_says_how_it_is_and_since_when(served: Served) -> None:
    async def talk(engine: Engine) -> None:
        works, said = await engine.state()
        assert works
        if isinstance(served, Vllm):
            assert said == {}
            return
        assert {"started_at", "base_model", "running", "waiting", "adapters"} < set(said)
        await asyncio.sleep(1)
        await asyncio.to_thread(served.restart)
        works, after = await engine.state()
        assert works
        assert after["started_at"] > said["started_at"]

    talking(served.url, talk)


def test_one_that_is_not_there_does_not_work() -> None:
    assert talking("http://127.0.0.1:9", lambda engine: engine.state()) == (False, {})


def test_one_that_sends_elsewhere_does_not_work() -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/login" else 302)
            self.send_header("location", "/login")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_said: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        works, _ = talking(f"http://127.0.0.1:{server.server_port}", lambda engine: engine.state())
        server.shutdown()
    assert not works


def test_an_adapter_that_changes_nothing_is_refused_every_time(served: Served, storage: Path) -> None:
    if isinstance(served, Vllm):
        served.passes_over = True

    async def talk(engine: Engine) -> None:
        for _ in range(2):
            who = target(storage, "inert")
            error = await refused(text(engine, who))
            assert error.code == "adapter_inert"
            assert (await refused(streamed(engine, who))).code == "adapter_inert"
        assert await text(engine, BASE)

    talking(served.url, talk)
    if isinstance(served, Vllm):
        served.passes_over = False


def test_an_adapter_whose_files_are_gone_is_refused(served: Served, storage: Path) -> None:
    async def talk(engine: Engine) -> str:
        return (await refused(text(engine, target(storage, "none")))).code

    assert talking(served.url, talk) in ("adapter_missing", "adapter_not_loaded")


def test_a_base_model_that_is_not_served_is_said(served: Served) -> None:
    async def talk(engine: Engine) -> GraftError:
        return await refused(text(engine, Target("tests/other", "tests/other")))

    error = talking(served.url, talk)
    assert (error.code, error.status) == ("model_not_served", 503)


def test_what_is_wrong_with_a_request_keeps_its_name_and_its_remedy(storage: Path) -> None:
    little = {"GRAFT_ENGINE_CACHE_BYTES": str(100 * 2 * 2 * 2 * 16 * 4)}
    served = Ours(storage.parent / "home-little", storage.parent / "base", storage, **little)

    async def talk(engine: Engine) -> None:
        error = await refused(text(engine, BASE, logit_bias={"999999": 1}))
        assert (error.code, error.status, error.param) == ("invalid_logit_bias", 400, "logit_bias")
        for ask in (text, streamed):
            error = await refused(ask(engine, BASE, max_tokens=200))
            assert (error.code, error.status) == ("prompt_too_long", 400)
            assert "GRAFT_ENGINE_CACHE_BYTES" in str(error.hint)

    try:
        talking(served.url, talk)
    finally:
        served.stop()


def test_an_engine_that_is_not_there_is_said() -> None:
    async def talk(engine: Engine) -> GraftError:
        return await refused(text(engine, BASE))

    error = talking("http://127.0.0.1:9", talk)
    assert (error.code, error.status) == ("engine_unavailable", 503)


def test_a_stream_that_breaks_off_is_no_end_of_an_answer(served: Served, storage: Path) -> None:
    async def talk(engine: Engine) -> GraftError:
        who = target(storage, "a")
        chunks = await engine.stream(who, PROMPT, {**GREEDY, "max_tokens": 800})
        first = await anext(chunks)
        assert first["choices"][0]["text"] is not None
        if isinstance(served, Ours):
            served.kill()

        async def rest() -> None:
            async for _ in chunks:
                pass

        return await refused(rest())

    if isinstance(served, Vllm):
        served.dies = 5
    error = talking(served.url, talk)
    assert error.code == "engine_unavailable"
    assert "broke off" in error.message
    if isinstance(served, Ours):
        served.start()
    else:
        served.dies = None


def test_an_adapter_that_fits_no_layer_is_refused(served: Served, storage: Path) -> None:
    """vLLM takes it, and passes over what it does not know."""
    if isinstance(served, Vllm):
        served.passes_over = True

    async def talk(engine: Engine) -> str:
        return (await refused(text(engine, target(storage, "misfit")))).code

    assert talking(served.url, talk) == ("adapter_inert" if isinstance(served, Vllm) else "adapter_mismatch")
    if isinstance(served, Vllm):
        served.passes_over = False


def test_a_slow_load_holds_up_those_alone_who_wait_for_it(vllm: Vllm, storage: Path) -> None:
    vllm.slow = 1.0

    async def talk(engine: Engine) -> None:
        loading = [asyncio.create_task(text(engine, target(storage, "a"))) for _ in range(5)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        assert await text(engine, BASE)
        assert time.monotonic() - began < 0.5
        assert not any(task.done() for task in loading)
        assert len(set(await asyncio.gather(*loading))) == 1

    talking(vllm.url, talk)
    assert vllm.loads == [target(storage, "a").name]


def test_two_api_processes_can_load_the_same_adapter(vllm: Vllm, storage: Path) -> None:
    who = target(storage, "a")
    first = talking(vllm.url, lambda engine: text(engine, who))
    assert talking(vllm.url, lambda engine: text(engine, who)) == first
    assert vllm.loads == [who.name]


def test_what_vllm_was_not_started_for_is_said(vllm: Vllm, storage: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    (big / "adapter_config.json").write_text(json.dumps({"r": MAX_RANK + 1}))

    async def talk(engine: Engine, who: Target) -> GraftError:
        return await refused(text(engine, who))

    error = talking(vllm.url, lambda engine: talk(engine, Target("ad_big@1", tiny.NAME, str(big))))
    assert (error.code, error.status) == ("rank_not_served", 409)
    assert "--max-lora-rank" in str(error.hint)
    vllm.updating = False
    error = talking(vllm.url, lambda engine: talk(engine, target(storage, "a")))
    assert (error.code, error.status) == ("adapter_not_loaded", 502)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(error.hint)
