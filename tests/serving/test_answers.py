"""What an engine answers that is no completion is an error for the client: never a text that looks whole."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from api.engine import events
from api.engine.client import Engine, Target
from core.errors import GraftError
from tests import tiny
from tests.serving.vllm import Vllm

PROMPT = [5, 6, 7]
BASE = Target(tiny.NAME, tiny.NAME)
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class Odd(Vllm):
    """Answers completions with what `say` makes of the request; `headers` of every refusal."""

    def __init__(self) -> None:
        super().__init__(tiny.NAME)
        self.say: Callable[[dict[str, Any]], Response] | None = None
        self.say_of_loads: Callable[[], Response] | None = None

    async def _completions(self, request: Request) -> Response:
        if self.say is None:
            return await super()._completions(request)
        return self.say(await request.json())

    async def _load(self, request: Request) -> Response:
        if self.say_of_loads is None:
            return await super()._load(request)
        self.loads.append("")
        await asyncio.sleep(self.slow)
        return self.say_of_loads()


@pytest.fixture(scope="module")
def running() -> Iterator[Odd]:
    made = Odd()
    yield made
    made.stop()


@pytest.fixture
def odd(running: Odd) -> Odd:
    running.say = running.say_of_loads = None
    running.loads.clear()
    running.slow = 0
    running.restart()
    return running


@pytest.fixture
def target(tmp_path: Path) -> Target:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return Target("ad_a@0123", tiny.NAME, str(tmp_path))


def run(odd: Odd, talk: Callable[[Engine], Any], seconds: float = 600) -> Any:
    async def talked() -> Any:
        engine = Engine(odd.url, None, seconds)
        try:
            return await talk(engine)
        finally:
            await engine.close()

    return asyncio.run(talked())


def whole(odd: Odd, target: Target = BASE, **sampling: Any) -> dict[str, Any]:
    found: dict[str, Any] = run(odd, lambda engine: engine.complete(target, PROMPT, sampling))
    return found


def streamed(odd: Odd, target: Target = BASE, **sampling: Any) -> list[dict[str, Any]]:
    async def talk(engine: Engine) -> Any:
        return [chunk async for chunk in await engine.stream(target, PROMPT, sampling)]

    found: list[dict[str, Any]] = run(odd, talk)
    return found


def fails(ask: Callable[..., Any], *asked: Any, **options: Any) -> GraftError:
    with pytest.raises(GraftError) as caught:
        ask(*asked, **options)
    return caught.value


def choice(index: Any = 0, text: Any = "Take 50 g", reason: Any = "stop", **more: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": None, **more}


def completion(*choices: Any, **more: Any) -> dict[str, Any]:
    return {"id": "a", "model": tiny.NAME, "choices": list(choices), "usage": USAGE, **more}


def logprobs(**changes: Any) -> dict[str, Any]:
    told = {"tokens": ["token_id:5"], "token_logprobs": [-1.0], "top_logprobs": [{"token_id:5": -1.0}]}
    return choice(logprobs=told | changes)


DEEP = "[" * 100_000 + "]" * 100_000
NO_COMPLETIONS: dict[str, Any] = {
    "list": [],
    "null": None,
    "number": 5,
    "empty": {},
    "no choices": completion() | {"choices": None},
    "choice null": completion(None),
    "text missing": completion({"index": 0, "finish_reason": "stop"}),
    "text null": completion(choice(text=None)),
    "text number": completion(choice(text=5)),
    "half a surrogate": completion(choice(text="\ud83d")),
    "index text": completion(choice(index="x")),
    "index negative": completion(choice(index=-1)),
    "aborted": completion(choice(reason="abort")),
    "error as an end": completion(choice(reason="error")),
    "counts": completion(choice(), usage={"prompt_tokens": "many"}),
    "counts infinite": completion(choice(), usage={"prompt_tokens": float("inf")}),
    "log probabilities null": completion(logprobs(token_logprobs=[None])),
    "log probabilities that are none": completion(logprobs(token_logprobs=[float("nan")])),
    "uneven": completion(logprobs(tokens=["token_id:5", "token_id:6"])),
}


@pytest.mark.parametrize("body", NO_COMPLETIONS.values(), ids=NO_COMPLETIONS.keys())
@pytest.mark.parametrize("ask", [whole, streamed])
def test_what_is_no_completion_is_an_error(odd: Odd, body: Any, ask: Callable[..., Any]) -> None:
    said = json.dumps(body)

    def say(asked: dict[str, Any]) -> Response:
        if asked.get("stream"):
            return StreamingResponse(
                iter([f"data: {said}\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream"
            )
        return Response(said, media_type="application/json")

    odd.say = say
    error = fails(ask, odd)
    assert (error.code, error.status) == ("engine_error", 502)
    assert "no completion" in error.message or "no JSON" in error.message


@pytest.mark.parametrize("body", [DEEP, "<html>", "", '{"choices": [', b"\xff"])
def test_what_is_no_json_is_an_error(odd: Odd, body: Any) -> None:
    odd.say = lambda _: Response(body)
    assert (fails(whole, odd).code, fails(streamed, odd).code) == ("engine_error", "engine_error")


@pytest.mark.parametrize(
    ("choices", "n"),
    [([], 1), ([choice()], 3), ([choice(), choice(1)], 1), ([choice(), choice()], 2), ([choice(7)], 1)],
)
def test_as_many_outputs_as_were_asked_for(odd: Odd, choices: list[Any], n: int) -> None:
    odd.say = lambda _: JSONResponse(completion(*choices))
    error = fails(whole, odd, n=n, temperature=1.0)
    assert (error.code, error.status) == ("engine_error", 502)


def test_outputs_are_in_their_order(odd: Odd) -> None:
    odd.say = lambda _: JSONResponse(completion(choice(1, "b"), choice(0, "a")))
    assert [one["text"] for one in whole(odd, n=2, temperature=1.0)["choices"]] == ["a", "b"]


def test_an_error_in_an_answer_of_success_is_told(odd: Odd) -> None:
    for body in ({"error": {"message": "boom"}}, {"error": "boom"}, {"object": "error", "message": "boom"}):
        odd.say = lambda _, body=body: JSONResponse(body)  # type: ignore[misc]
        for ask in (whole, streamed):
            error = fails(ask, odd)
            assert (error.code, error.status, error.message) == ("engine_error", 502, "boom")


def chunks(*told: Any, end: str = "data: [DONE]\n\n") -> Callable[[dict[str, Any]], Response]:
    lines = [f"data: {json.dumps(one)}\n\n" for one in told]
    return lambda _: StreamingResponse(iter([*lines, end]), media_type="text/event-stream")


@pytest.mark.parametrize(
    "told",
    [
        [],
        [completion(choice(reason=None))],
        [completion(choice(0)), completion(choice(1, reason=None))],
        [completion()],
    ],
)
def test_a_stream_without_the_end_of_each_output_broke_off(odd: Odd, told: list[Any]) -> None:
    odd.say = chunks(*told)
    error = fails(streamed, odd, n=2, temperature=1.0)
    assert (error.code, error.status) == ("engine_unavailable", 503)
    odd.say = chunks(*told, end="")
    assert fails(streamed, odd, n=2, temperature=1.0).code == "engine_unavailable"


def test_a_stream_without_its_own_end_broke_off(odd: Odd) -> None:
    odd.say = chunks(completion(choice()), end="")
    assert fails(streamed, odd).code == "engine_unavailable"


def test_an_output_that_nobody_asked_for_is_an_error(odd: Odd) -> None:
    odd.say = chunks(completion(choice(1)))
    assert fails(streamed, odd).code == "engine_error"


@pytest.mark.parametrize(
    "response", [HTMLResponse("<html>"), Response(status_code=204), JSONResponse({}, 302)]
)
def test_what_is_no_stream_is_an_error_before_it_begins(odd: Odd, response: Response) -> None:
    odd.say = lambda _: response

    async def begin(engine: Engine) -> None:
        await engine.stream(BASE, PROMPT, {})

    with pytest.raises(GraftError) as caught:
        run(odd, begin)
    assert (caught.value.code, caught.value.status) == ("engine_error", 502)


def test_an_output_that_goes_on_may_say_so_with_an_empty_word(odd: Odd) -> None:
    odd.say = chunks(completion(choice(reason="")), completion(choice(text="")))
    assert [one["choices"][0]["text"] for one in streamed(odd)] == ["Take 50 g", ""]
    odd.say = chunks(completion(choice(reason="")))
    assert fails(streamed, odd).code == "engine_unavailable"


def test_what_is_impossible_has_a_number(odd: Odd) -> None:
    told = logprobs(top_logprobs=[{"token_id:5": -1.0, "token_id:6": float("-inf")}])
    odd.say = lambda _: Response(json.dumps(completion(told)))
    found = whole(odd)["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"token_id:5": -1.0, "token_id:6": -9999.0}]


def test_outputs_that_are_the_same_are_written_once(odd: Odd) -> None:
    """vLLM refuses more than one of the likeliest tokens."""
    answer = whole(odd, n=3, temperature=0, max_tokens=4)
    assert [one["index"] for one in answer["choices"]] == [0, 1, 2]
    assert len({one["text"] for one in answer["choices"]}) == 1
    assert answer["usage"]["completion_tokens"] == 12
    texts = {0: "", 1: "", 2: ""}
    for chunk in streamed(odd, n=3, temperature=0, max_tokens=4):
        for one in chunk["choices"]:
            texts[one["index"]] += one["text"]
    assert set(texts.values()) == {answer["choices"][0]["text"]}


def test_a_name_that_another_model_answers_to_is_loaded_anew(odd: Odd, target: Target) -> None:
    """A router may send those it does not know to the base model."""

    async def talk(engine: Engine) -> tuple[list[str], GraftError]:
        first = await engine.complete(target, PROMPT, {"max_tokens": 4})
        odd.restart()
        odd.say = lambda _: JSONResponse(completion(choice(text="the base's")))
        with pytest.raises(GraftError) as caught:
            await engine.complete(target, PROMPT, {"max_tokens": 4})
        odd.say = None
        again = await engine.complete(target, PROMPT, {"max_tokens": 4})
        return [one["choices"][0]["text"] for one in (first, again)], caught.value

    (first, again), error = run(odd, talk)
    assert (error.code, error.status) == ("adapter_not_loaded", 503)
    assert first == again
    assert len(odd.loads) == 2


def test_an_adapter_that_is_never_known_is_no_mistake_of_the_client(odd: Odd, target: Target) -> None:
    odd.say_of_loads = lambda: JSONResponse({"checked": True})
    for ask in (whole, streamed):
        error = fails(ask, odd, target)
        assert (error.code, error.status) == ("adapter_not_loaded", 503)


@pytest.mark.parametrize(
    ("status", "message", "code", "told"),
    [
        (400, "LoRA rank 64 is greater than max_lora_rank 16.", "rank_not_served", 409),
        (404, "No adapter found for /home/frank/none", "adapter_not_loaded", 502),
        (500, "CUDA out of memory on rank 0", "adapter_not_loaded", 502),
        (429, "later", "engine_error", 429),
        (503, "later", "engine_error", 503),
    ],
)
def test_what_a_refusal_to_load_means(
    odd: Odd, target: Target, status: int, message: str, code: str, told: int
) -> None:
    odd.say_of_loads = lambda: JSONResponse(
        {"error": {"message": message, "code": status}}, status, {"retry-after": "77"}
    )
    error = fails(whole, odd, target)
    assert (error.code, error.status) == (code, told)
    if told in (429, 503):
        assert error.retry_after == 77


def test_the_key_is_named_where_the_engine_wants_another(odd: Odd, target: Target) -> None:
    odd.say = lambda _: JSONResponse({"error": "Unauthorized"}, 401)
    odd.say_of_loads = lambda: JSONResponse({"error": "Unauthorized"}, 401)
    for one in (BASE, target):
        error = fails(whole, odd, one)
        assert error.status == 502
        assert "GRAFT_ENGINE_KEY" in str(error.hint)


def test_a_failure_to_load_is_shared_by_all_who_wait_for_it(odd: Odd, target: Target) -> None:
    odd.say_of_loads, odd.slow = (lambda: JSONResponse({}, 500)), 0.3

    async def talk(engine: Engine) -> list[Any]:
        asking = [engine.complete(target, PROMPT, {}) for _ in range(5)]
        return await asyncio.gather(*asking, return_exceptions=True)

    found = run(odd, talk)
    assert {getattr(one, "code", None) for one in found} == {"adapter_not_loaded"}
    assert len(odd.loads) == 1


def test_who_leaves_while_an_adapter_is_loaded_takes_nobody_along(odd: Odd, target: Target) -> None:
    odd.slow = 0.3

    async def talk(engine: Engine) -> dict[str, Any]:
        first = asyncio.create_task(engine.complete(target, PROMPT, {"max_tokens": 2}))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(engine.complete(target, PROMPT, {"max_tokens": 2}))
        await asyncio.sleep(0.05)
        first.cancel()
        return dict(await second)

    assert run(odd, talk)["choices"]
    assert len(odd.loads) == 1


def test_an_answer_that_trickles_has_a_deadline(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.client._LOADING_SECONDS", 0)

    async def trickle() -> Any:
        for _ in range(100):
            yield ": \n"
            await asyncio.sleep(0.1)

    odd.say = lambda _: StreamingResponse(trickle(), media_type="text/event-stream")

    async def stream(engine: Engine) -> None:
        async for _ in await engine.stream(BASE, PROMPT, {}):
            pass

    for talk in (stream, lambda engine: engine.complete(BASE, PROMPT, {})):
        began = time.monotonic()
        with pytest.raises(GraftError) as caught:
            run(odd, talk, seconds=0.5)
        assert (caught.value.code, caught.value.status) == ("deadline_exceeded", 504)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events_are_read_by_their_standard(size: int) -> None:
    stream = (
        "\ufeffdata: é🎉\r\n: comment\r\n\r\ndata:b\nid: 1\n\nevent: x\ndata: c\ndata: d\n\n\n\ndata: e"
    ).encode()

    async def parts() -> Any:
        for at in range(0, len(stream), size):
            yield stream[at : at + size]

    async def read() -> list[bytes]:
        return [data async for data in events.data(parts())]

    assert [data.decode() for data in asyncio.run(read())] == ["é🎉", "b", "c\nd", "e"]


def test_a_long_line_takes_no_time_of_its_square() -> None:
    async def parts() -> Any:
        for _ in range(20_000):
            yield b"x" * 1000

    async def read() -> list[bytes]:
        return [data async for data in events.data(parts())]

    began = time.process_time()
    asyncio.run(read())
    assert time.process_time() - began < 2
