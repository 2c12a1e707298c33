"""What the routes that answer take and refuse, by what is wrong. No engine runs: whoever got so far is told that."""

import inspect
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.resources.chat.completions import Completions as Chat
from openai.resources.completions import Completions
from openai.types import Completion as Answer
from openai.types.chat import ChatCompletionChunk

from api.engine.answers import Logprobs
from api.openai.logprobs import OfCompletion, of_chat
from api.openai.schemas import _UNSERVED, ChatRequest, CompletionRequest
from api.schemas.generate import GenerateRequest
from core.errors import GraftError
from tests import tiny
from tests.api.conftest import Api, only_sqlite, refused
from tests.serving.vllm import Vllm

TURN = {"role": "user", "content": "a"}
CHAT: dict[str, Any] = {"model": tiny.NAME, "messages": [TURN]}
COMPLETION: dict[str, Any] = {"model": tiny.NAME, "prompt": "a"}
GENERATE: dict[str, Any] = {"prompt": "a"}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/generate": GENERATE,
    "/compare": {**GENERATE, "targets": ["base"]},
}


def ask(api: Api, path: str, **changes: Any) -> Any:
    return api.client.post(path, json={**BODIES[path], **changes})


def answered(api: Api, path: str, **changes: Any) -> None:
    refused(ask(api, path, **changes), 503, "engine_unavailable")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stop", ["", [], None])
def test_an_empty_stop_is_none(shared_api: Api, path: str, stop: Any) -> None:
    answered(shared_api, path, stop=stop)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_null_is_not_given(shared_api: Api, path: str) -> None:
    names = ["temperature", "top_p", "top_k", "seed", "logit_bias", "repetition_penalty"]
    own = ["n", "stream", "user"] if path.startswith("/v1") else ["max_new_tokens", "raw", "tools"]
    answered(shared_api, path, **dict.fromkeys([*names, *own]))
    error = refused(ask(shared_api, path, temprature=None), 400 if path.startswith("/v1") else 422)
    assert error["param"] == "temprature"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_k", "5"),
        ("seed", True),
        ("seed", "5"),
        ("seed", 1.5),
        ("seed", 2**63),
        ("seed", 1e300),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        *(("logit_bias", {key: 1}) for key in ("05", "+5", " 5", "5.0", "1_0", "-5", "٣", "")),
    ],
)
def test_numbers_are_numbers(shared_api: Api, path: str, field: str, value: Any) -> None:
    answer = ask(shared_api, path, **{field: value})
    error = refused(answer, 400 if path.startswith("/v1") else 422, "invalid_request")
    assert error["param"].startswith(field)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", [True, 2]), ("prompt", [["1"]]), ("logprobs", True), ("n", "2")]
)
def test_numbers_are_numbers_in_completions(shared_api: Api, field: str, value: Any) -> None:
    error = refused(ask(shared_api, "/v1/completions", **{field: value}), 400, "invalid_request")
    assert error["param"].startswith(field)


@pytest.mark.parametrize("path", BODIES)
def test_integers_are_numbers_too(shared_api: Api, path: str) -> None:
    answered(shared_api, path, temperature=1, top_p=1, logit_bias={"0": 1, "10": -1})


@pytest.mark.parametrize("path", BODIES)
def test_whole_numbers_with_a_point_are_integers(shared_api: Api, path: str) -> None:
    names = {
        "/v1/chat/completions": ["max_tokens", "n"],
        "/v1/completions": ["max_tokens", "logprobs", "n"],
        "/generate": ["max_new_tokens", "n"],
        "/compare": ["max_new_tokens"],
    }[path]
    answered(shared_api, path, **dict.fromkeys([*names, "top_k", "seed"], 1.0))
    status = 400 if path.startswith("/v1") else 422
    for name in names:
        for value in ("1", True, 1.5):
            assert refused(ask(shared_api, path, **{name: value}), status)["param"] == name


def test_token_ids_with_a_point_are_integers() -> None:
    asked = CompletionRequest(**{**COMPLETION, "prompt": [[1.0, 2], [3.0]]})
    assert str(asked.prompts) == "[[1, 2], [3]]"


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("/generate", {"temperature": 0.005}, "temperature"),
        ("/compare", {"temperature": 0.005}, "temperature"),
        ("/generate", {"n": 2, "stream": True}, "n"),
        ("/generate", {"prompt": None, "messages": [TURN, {**TURN, "role": "assistant"}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{**TURN, "role": "assistant"}]}, "messages"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}, "prompt"),
    ],
)
def test_what_two_fields_forbid_is_named(shared_api: Api, path: str, changes: Any, param: str) -> None:
    error = refused(ask(shared_api, path, **changes), 400 if path.startswith("/v1") else 422)
    assert error["param"] == param


def test_what_another_field_decides_is_no_error_while_that_one_is_wrong(shared_api: Api) -> None:
    answer = ask(shared_api, "/v1/chat/completions", logprobs="yes", top_logprobs=2)
    error = refused(answer, 400, "invalid_request")
    assert error["param"] == "logprobs"
    assert "top_logprobs" not in str(error)


@pytest.mark.parametrize("seed", [0, 40, 40 + 2**31, -1, -(2**63), 2**63 - 1])
def test_a_seed_reaches_the_engine_as_it_is(seed: int) -> None:
    for asked in (ChatRequest(**CHAT, seed=seed), GenerateRequest(**GENERATE, seed=seed)):
        assert asked.sampling()["seed"] == seed


@pytest.mark.parametrize(
    ("create", "request_"), [(Chat.create, ChatRequest), (Completions.create, CompletionRequest)]
)
def test_every_parameter_of_the_client_is_known(create: Any, request_: type[ChatRequest]) -> None:
    ours = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    named = set(inspect.signature(create).parameters) - ours
    assert named <= set(request_.model_fields) | set(_UNSERVED), openai.__version__


def test_newer_parameters_are_refused_or_passed_over(shared_api: Api) -> None:
    path = "/v1/chat/completions"
    answered(shared_api, path, prompt_cache_options={"mode": "explicit"}, moderation=None)
    error = refused(ask(shared_api, path, moderation={"model": "omni"}), 400, "unsupported_parameter")
    assert error["param"] == "moderation"


@only_sqlite
def test_an_error_looks_the_same_wherever_it_comes(make_api: Callable[..., Api], tiny_model: Path) -> None:
    vllm = Vllm(tiny.NAME)
    other = {tiny.NAME: str(tiny_model), "tests/other": str(tiny_model)}
    api = make_api(engine_url=vllm.url, models=other)
    vllm.dies = 1
    shape = ["message", "type", "code", "param", "hint", "request_id"]
    told = []
    try:
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            answer = ask(api, path, stream=True)
            *_, last = [line for line in answer.text.splitlines() if line.startswith("data: ")]
            told.append((answer, json.loads(last[6:])["error"]))
        answer = ask(api, "/compare", targets=["base", "tests/other"])
        told.append((answer, answer.json()["outputs"][1]["error"]))
    finally:
        vllm.stop()
    for answer, error in told:
        assert list(error) == shape
        assert (error["type"], error["request_id"]) == ("server_error", answer.headers["x-request-id"])
    assert [error["code"] for _, error in told] == ["engine_unavailable"] * 3 + ["model_not_served"]


class Saying(Vllm):
    """Says in the last chunk of an output how it was answered, as Graft's own engine does."""

    async def _stream(self, *said: Any) -> AsyncIterator[str]:
        async for event in super()._stream(*said):
            yield event.replace('"length"}],', '"length"}],"served_by":"batch",')


@only_sqlite
@pytest.mark.parametrize(("engine", "says"), [(Saying, "batch"), (Vllm, None)])
@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("/v1/chat/completions", ChatCompletionChunk.model_validate),
        ("/v1/completions", Answer.model_validate),
    ],
)
def test_a_stream_says_with_its_end_how_it_was_answered(
    make_api: Callable[..., Api], path: str, read: Callable[[Any], Any], engine: type[Vllm], says: str | None
) -> None:
    running = engine(tiny.NAME)
    try:
        answer = ask(make_api(engine_url=running.url), path, stream=True, max_tokens=3)
    finally:
        running.stop()
    *lines, end = [line[6:] for line in answer.text.splitlines() if line]
    assert end == "[DONE]"
    *before, last = map(json.loads, lines)
    assert [chunk.get("served_by") for chunk in before] == [None] * len(before)
    assert ("served_by" in last, last.get("served_by")) == (says is not None, says)
    read_last = read(last)
    assert (read_last.choices[0].finish_reason, getattr(read_last, "served_by", None)) == ("length", says)


@pytest.mark.parametrize("tops", [None, [None]])
def test_an_engine_may_tell_nothing_of_the_likeliest_tokens(tops: list[None] | None) -> None:
    told = {"tokens": ["token_id:70"], "token_logprobs": [-1.0], "top_logprobs": tops}
    chat = of_chat(tiny.tokenizer(), told)
    assert chat is not None
    assert [(one["logprob"], one["top_logprobs"]) for one in chat["content"]] == [(-1.0, [])]
    completion = OfCompletion(tiny.tokenizer()).told(told, 1)
    assert completion is not None
    assert [list(top.values()) for top in completion["top_logprobs"]] == [[-1.0]]


@pytest.mark.parametrize("name", ["a", "token_id:", "token_id:٣", "token_id:9999999999"])
def test_tokens_that_an_engine_does_not_name_by_their_ids_are_its_error(name: str) -> None:
    told: Logprobs = {"tokens": [name], "token_logprobs": [-1.0]}
    for read in (of_chat, lambda tokenizer, told: OfCompletion(tokenizer).told(told, 1)):
        with pytest.raises(GraftError, match="not named by their ids"):
            read(tiny.tokenizer(), told)
