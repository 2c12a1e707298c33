"""What the routes that answer say of requests that they refuse: which field it is, and what to do."""

from typing import Any

import pytest

from tests import tiny
from tests.api.conftest import Api, only_sqlite, refused

TURN = {"role": "user", "content": "a"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": tiny.NAME, "messages": [TURN]},
    "/v1/completions": {"model": tiny.NAME, "prompt": "a"},
    "/generate": {"prompt": "a"},
    "/compare": {"prompt": "a", "targets": ["base"]},
}
CHAT, COMPLETIONS, GENERATE, COMPARE = BODIES


def refusal(api: Api, path: str, status: int | None = None, **changes: Any) -> dict[str, Any]:
    answer = api.client.post(path, json={**BODIES[path], **changes})
    return refused(answer, status or (400 if path.startswith("/v1") else 422))


# ---- The prompts of completions

PLAINLY = "A prompt is a text, a list of texts, a list of token ids, or a list of such lists."


@pytest.mark.parametrize("prompt", [["a"] * 33, [[1]] * 33])
def test_more_prompts_than_there_may_be_are_counted(shared_api: Api, prompt: Any) -> None:
    error = refusal(shared_api, COMPLETIONS, prompt=prompt)
    assert error["message"] == 'The field "prompt": there are 33 prompts; one request has at most 32.'
    assert error["param"] == "prompt"


@pytest.mark.parametrize(
    ("prompt", "param", "what"),
    [
        ([[1], "a"], "prompt.1", "prompts are all texts, or all lists of token ids"),
        (["a", [1]], "prompt.1", "prompts are all texts, or all lists of token ids"),
        (["a", "b", 1], "prompt.2", "prompts are all texts, or all lists of token ids"),
        ([[1], []], "prompt.1", "at least 1 item"),
        ([[1], [2, "a"]], "prompt.1.1", "integer"),
        ([1, "a"], "prompt.1", "integer"),
        ([], "prompt", "at least 1 item"),
    ],
)
def test_a_wrong_prompt_is_named_by_its_place(shared_api: Api, prompt: Any, param: str, what: str) -> None:
    error = refusal(shared_api, COMPLETIONS, prompt=prompt)
    assert error["param"] == param
    assert what in error["message"]
    assert len(error["errors"]) == 1


@pytest.mark.parametrize("prompt", [{}, None, True, 1, [{}], [None]])
def test_what_is_no_prompt_is_told_what_one_is(shared_api: Api, prompt: Any) -> None:
    error = refusal(shared_api, COMPLETIONS, prompt=prompt)
    assert (error["param"], error["hint"], len(error["errors"])) == ("prompt", PLAINLY, 1)


# ---- Prompts that are too long

LONG = [{"role": "user", "content": "x" * 2000}]


@pytest.mark.parametrize(
    ("path", "changes", "param", "hint"),
    [
        (CHAT, {"max_tokens": 512}, "max_tokens", "Send max_tokens "),
        (CHAT, {"max_completion_tokens": 512}, "max_completion_tokens", "Send max_completion_tokens "),
        (CHAT, {"messages": LONG}, "messages", "Shorten the messages"),
        (CHAT, {"messages": LONG, "max_tokens": 5}, "messages", "Shorten the messages"),
        (COMPLETIONS, {"prompt": [5] * 510, "max_tokens": 5}, "max_tokens", "Send max_tokens 2 or less"),
        (COMPLETIONS, {"prompt": [5] * 510}, "prompt", "Send max_tokens 2 or less"),
        (COMPLETIONS, {"prompt": [5] * 512, "max_tokens": 1}, "prompt", "Shorten the prompt"),
        (
            GENERATE,
            {"prompt": None, "messages": LONG, "max_new_tokens": 1},
            "messages",
            "Shorten the messages",
        ),
        (COMPARE, {"max_new_tokens": 512}, "max_new_tokens", "Send max_new_tokens "),
    ],
)
def test_too_long_a_prompt_names_a_field_that_was_sent(
    shared_api: Api, path: str, changes: dict[str, Any], param: str, hint: str
) -> None:
    error = refusal(shared_api, path, 400, **changes)
    assert (error["code"], error["param"]) == ("prompt_too_long", param)
    assert error["hint"].startswith(hint)
    assert "GET /models" in error["hint"]
    assert "512" in error["message"]


# ---- Remedies


@pytest.mark.parametrize(
    ("path", "field", "value", "hint"),
    [
        (CHAT, "tool_choice", "required", 'Send "auto" or "none", or leave it out.'),
        (CHAT, "response_format", {"type": "json_object"}, 'Send {"type": "text"}, or leave it out.'),
        (CHAT, "functions", [{"name": "a"}], "Send tools instead."),
        (CHAT, "function_call", "auto", 'Send tool_choice "auto" or "none" instead.'),
        (CHAT, "audio", {}, "Leave it out."),
        (COMPLETIONS, "best_of", 2, "Send 1, or leave it out."),
        (COMPLETIONS, "suffix", "a", 'Send "", or leave it out.'),
    ],
)
def test_what_is_not_served_says_what_is(
    shared_api: Api, path: str, field: str, value: Any, hint: str
) -> None:
    error = refusal(shared_api, path, **{field: value})
    assert (error["code"], error["param"], error["hint"]) == ("unsupported_parameter", field, hint)


def test_no_functions_are_nothing_that_is_not_served(shared_api: Api) -> None:
    body = {**BODIES[CHAT], "functions": []}
    refused(shared_api.client.post(CHAT, json=body), 503, "engine_unavailable")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}])
def test_only_a_stream_has_options(shared_api: Api, path: str, stream: dict[str, Any]) -> None:
    error = refusal(shared_api, path, stream_options={"include_usage": True}, **stream)
    assert (error["param"], '"stream": true' in error["hint"]) == ("stream_options", True)


def test_wrong_options_of_a_wrong_stream_are_its_alone(shared_api: Api) -> None:
    assert refusal(shared_api, CHAT, stream_options={}, stream="yes")["param"] == "stream"


@pytest.mark.parametrize("name", ["ad_01J", "job_01J@latest"])
def test_an_adapter_as_model_is_sent_to_its_field(shared_api: Api, name: str) -> None:
    error = refusal(shared_api, GENERATE, 404, model=name)
    assert error["param"] == "model"
    assert "as adapter_id" in error["hint"]


@pytest.mark.parametrize("name", ["base", tiny.NAME])
def test_a_base_model_as_adapter_is_sent_to_its_field(shared_api: Api, name: str) -> None:
    error = refusal(shared_api, GENERATE, 404, adapter_id=name)
    assert (error["code"], error["param"]) == ("adapter_not_found", "adapter_id")
    assert "leave adapter_id out" in error["hint"]
    assert "as model" in error["hint"]


@pytest.mark.parametrize("field", ["adapter_id", "model"])
def test_what_is_compared_is_targets(shared_api: Api, field: str) -> None:
    error = refusal(shared_api, COMPARE, **{field: "a"})
    assert (error["param"], error["hint"]) == (field, 'Did you mean "targets"?')


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("05", 1, "no token id"),
        ("+5", 1, "no token id"),
        ("5", 101, "less than or equal to 100"),
        ("5", -101, "greater than or equal to -100"),
        ("5", "a", "number"),
    ],
)
def test_a_wrong_bias_is_named_by_its_token(
    shared_api: Api, path: str, key: str, value: Any, what: str
) -> None:
    error = refusal(shared_api, path, logit_bias={"7": 1, key: value})
    assert error["param"] == f"logit_bias.{key}"
    assert what in error["message"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"prompt": None}, "neither messages nor prompt"), ({"messages": [TURN]}, "messages are given too")],
)
@pytest.mark.parametrize("path", [GENERATE, COMPARE])
def test_no_prompt_is_not_two(shared_api: Api, path: str, changes: dict[str, Any], what: str) -> None:
    error = refusal(shared_api, path, **changes)
    assert error["param"] == "prompt"
    assert what in error["message"]


def test_a_wrong_field_does_not_make_others_wrong(shared_api: Api) -> None:
    error = refusal(shared_api, GENERATE, prompt=None, messages=[], tools=[{"name": "a"}])
    assert [problem["field"] for problem in error["errors"]] == ["messages"]
    error = refusal(shared_api, GENERATE, prompt=5, raw=True)
    assert [problem["field"] for problem in error["errors"]] == ["prompt"]


@pytest.mark.parametrize("path", [*BODIES, "/jobs"])
@pytest.mark.parametrize("body", ["[]", '["a"]', '"a"', "null", "5", "true"])
def test_a_body_that_is_no_object_is_told_so(shared_api: Api, path: str, body: str) -> None:
    headers = {"content-type": "application/json"}
    answer = shared_api.client.post(path, content=body, headers=headers)
    error = refused(answer, 400 if path.startswith("/v1") else 422, "invalid_request")
    assert error["message"] == "The request body must be a JSON object."


# ---- Names


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_places_are_written_as_in_all_errors(shared_api: Api, path: str) -> None:
    def told(*messages: Any, **changes: Any) -> dict[str, Any]:
        prompt = {"prompt": None} if path == GENERATE else {}
        return refusal(shared_api, path, messages=[*messages, TURN], **prompt, **changes)

    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    for error, param in (
        (told(tools=[{}]), "tools.0"),
        (told({"role": "user"}), "messages.0.content"),
        (told({"role": "assistant", "tool_calls": [call]}), "messages.0.tool_calls.0.function.arguments"),
    ):
        assert error["param"] == param
        assert error["message"].startswith(f"{param} ")


HIDDEN = "a\u202eb\u2028c\u200bd\x85é日"
SHOWN = "a\\u202eb\\u2028c\\u200bd\\u0085é日"


def test_characters_that_nobody_sees_are_written_out(shared_api: Api) -> None:
    error = refusal(shared_api, GENERATE, **{HIDDEN: 1, "temprature": 1})
    assert error["param"] == error["errors"][0]["field"] == SHOWN
    assert error["message"] == error["errors"][0]["message"] == f'There is no field "{SHOWN}".'
    assert SHOWN in refusal(shared_api, GENERATE, 404, model=HIDDEN)["message"]
    nested = refusal(shared_api, GENERATE, logit_bias={HIDDEN + "\n": 1})
    assert nested["param"] == f"logit_bias.{SHOWN}\\u000a"


@only_sqlite
def test_characters_that_nobody_sees_are_written_out_of_data_sets(api: Api) -> None:
    error = refused(api.upload([{"messages": [{"role": HIDDEN, "content": "a"}]}]), 422, "invalid_dataset")
    for told in (error, *error["errors"]):
        assert SHOWN in told["message"]
