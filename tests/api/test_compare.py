"""Several questions of one request at an engine: of /compare, and of the prompts of /v1/completions."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.engine import answers
from tests import tiny
from tests.api.conftest import Api, only_sqlite, refused
from tests.serving.vllm import Vllm

pytestmark = only_sqlite

OTHER = "tests/other"


class Watched(Vllm):
    """`refuses` some models with a status; `most` questions were there at once; when it `breaks`, the first answer comes
    and the others never do, and `left` counts those that hung up."""

    def __init__(self) -> None:
        super().__init__(tiny.NAME)
        self.refuses: dict[str, int] = {}
        self.breaks = False
        self.asked = self.held = self.most = self.left = 0

    async def _completions(self, request: Request) -> Response:
        name = (await request.json())["model"]
        if status := self.refuses.get(name):
            return JSONResponse({"error": {"message": f"Not {name}.", "code": status}}, status)
        self.asked, self.held = self.asked + 1, self.held + 1
        self.most = max(self.most, self.held)
        if self.breaks:
            return await self._break(request, first=self.asked == 1)
        await asyncio.sleep(0.3)
        self.held -= 1
        return await super()._completions(request)

    async def _break(self, request: Request, *, first: bool) -> Response:
        if first:
            await asyncio.sleep(0.5)  # until the others are there
        for _ in range(0 if first else 500):
            if await request.is_disconnected():
                self.left += 1
                break
            await asyncio.sleep(0.01)
        return JSONResponse({})


@pytest.fixture
def engine() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.stop()


@pytest.fixture
def watched(make_api: Callable[..., Api], engine: Watched, tiny_model: Path) -> Api:
    return make_api(engine_url=engine.url, models={tiny.NAME: str(tiny_model), OTHER: str(tiny_model)})


def compare(api: Api, *targets: str) -> Any:
    return api.client.post("/compare", json={"prompt": "a", "max_new_tokens": 2, "targets": targets})


def test_where_one_target_answers_the_others_have_their_errors(watched: Api, engine: Watched) -> None:
    engine.refuses = {OTHER: 429}
    answer = compare(watched, OTHER, tiny.NAME)
    assert answer.status_code == 200
    wrong, right = answer.json()["outputs"]
    assert (wrong["text"], wrong["error"]["message"]) == (None, "Not tests/other.")
    assert (right["error"], right["usage"]["completion_tokens"], bool(right["text"])) == (None, 2, True)


def test_where_no_target_answers_the_call_fails_as_the_first_did(watched: Api, engine: Watched) -> None:
    engine.refuses = {tiny.NAME: 409, OTHER: 422}
    assert refused(compare(watched, OTHER, tiny.NAME), 422)["message"] == "Not tests/other."
    assert refused(compare(watched, tiny.NAME, OTHER), 409)["message"] == "Not tests/tiny."


@pytest.mark.parametrize("status", [429, 503])
def test_where_no_target_answers_now_the_call_says_when_to_come_back(
    watched: Api, engine: Watched, status: int
) -> None:
    engine.refuses = {tiny.NAME: 409, OTHER: status}
    answer = compare(watched, tiny.NAME, OTHER)
    assert refused(answer, status)["message"] == "Not tests/other."
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/compare", {"prompt": "a", "targets": ["base"] * 9}),
        ("/v1/completions", {"model": tiny.NAME, "prompt": list("abcdefghi")}),
    ],
)
def test_one_request_asks_the_engine_four_questions_at_once(
    watched: Api, engine: Watched, path: str, body: dict[str, Any]
) -> None:
    answer = watched.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json().get("outputs") or answer.json()["choices"]) == 9
    assert (engine.asked, engine.most) == (9, 4)


def test_what_nobody_foresaw_ends_the_questions_to_the_others(
    watched: Api, engine: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(*_: Any) -> Any:
        raise RuntimeError("nobody foresaw it")

    monkeypatch.setattr(answers, "whole", unforeseen)
    engine.breaks = True
    refused(compare(watched, *["base"] * 6), 500, "internal_error")
    deadline = time.monotonic() + 3
    while engine.left < engine.asked - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.left == engine.asked - 1 >= 3
