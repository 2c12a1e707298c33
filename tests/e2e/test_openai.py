"""OpenAI's own client against a whole service, with nothing changed but its address."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import tiny
from tests.service import Service

# The wire does not depend on the database.
pytestmark = pytest.mark.parametrize("service", ["sqlite and a folder"], indirect=True)

ASK = [{"role": "user", "content": "name 3"}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=0)


@pytest.fixture(scope="module")
def job(service: Service, rows_file: Path) -> dict[str, Any]:
    with service.client() as native:
        dataset = native.upload(rows_file, name="rows")
        body = {
            "dataset_id": dataset["id"],
            "training": {"max_steps": 8, "learning_rate": 0.02, "effective_batch_size": 4},
        }
        *_, finished = native.watch(native.create_job(body)["id"])
    assert finished["status"] == "succeeded"
    return finished


def ask(client: openai.OpenAI, model: str = tiny.NAME, **options: Any) -> Any:
    given = {"messages": ASK, "max_completion_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model=model, **given)


def test_base_adapter_and_checkpoint_answer_as_they_do_natively(
    service: Service, client: openai.OpenAI, job: dict
) -> None:
    texts = []
    for model in (tiny.NAME, job["adapter_id"], f"{job['id']}@latest"):
        answer = ask(client, model)
        texts.append(answer.choices[0].message.content)
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    with service.client() as native:
        for text, who in zip(texts, ({}, {"adapter_id": job["adapter_id"]}), strict=False):
            assert native.generate(messages=ASK, max_new_tokens=12, **who)["outputs"][0]["text"] == text
    assert texts[1] == texts[2] != texts[0]


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, job: dict) -> None:
    whole = ask(client, job["adapter_id"])
    chunks = list(ask(client, job["adapter_id"], stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].served_by == chunks[-1].served_by == whole.served_by
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_outputs_are_repeatable_by_their_seed(client: openai.OpenAI) -> None:
    hot = {"temperature": 1.5, "seed": 4, "n": 3}
    texts = [choice.message.content for choice in ask(client, **hot).choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in ask(client, **hot, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_log_probabilities_are_of_the_tokens_said(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    told = choice.logprobs.content
    assert len(told) == 12
    assert b"".join(bytes(one.bytes) for one in told).decode("utf-8", "replace") == choice.message.content
    for one in told:
        assert one.logprob == max(top.logprob for top in one.top_logprobs) <= 0
        assert len(one.top_logprobs) == 3
    streamed = [
        one.bytes
        for chunk in ask(client, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == [one.bytes for one in told]


def test_it_stops_where_asked(client: openai.OpenAI, job: dict) -> None:
    text = ask(client, job["adapter_id"]).choices[0].message.content
    choice = ask(client, job["adapter_id"], stop=[text[3:5]]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(text[3:5])], "stop")
    assert ask(client, max_completion_tokens=2).choices[0].finish_reason == "length"


def test_tools_stand_in_the_prompt_unless_none_may_be_called(client: openai.OpenAI) -> None:
    plain = ask(client).usage.prompt_tokens
    assert ask(client, tools=TOOLS).usage.prompt_tokens > plain
    assert ask(client, tools=TOOLS, tool_choice="none").usage.prompt_tokens == plain


def test_functions_of_old_are_calls_and_their_results(client: openai.OpenAI) -> None:
    call, result = {"name": "weather", "arguments": "{}"}, {"name": "weather", "content": "rain"}
    old = [
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", **result},
    ]
    new = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", **result},
    ]
    told = [ask(client, messages=[*ASK, *said], tools=TOOLS) for said in (old, new)]
    assert (
        told[0].usage.prompt_tokens
        == told[1].usage.prompt_tokens
        > ask(client, tools=TOOLS).usage.prompt_tokens
    )


def test_a_share_of_nothing_leaves_the_likeliest_token(client: openai.OpenAI) -> None:
    likeliest = ask(client).choices[0].message.content
    assert ask(client, temperature=2, top_p=0).choices[0].message.content == likeliest
    assert ask(client, temperature=2, top_p=1, seed=1).choices[0].message.content != likeliest


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    said = ask(client).choices[0].message
    again = ask(
        client, messages=[*ASK, said, {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    )
    assert again.choices[0].finish_reason in ("stop", "length")


def test_completions_go_on_with_texts_and_tokens(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": tiny.NAME, "max_tokens": 6, "temperature": 0}
    one = client.completions.create(prompt="name", **options)
    two = client.completions.create(prompt=["name", "table"], **options)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == one.choices[0].text
    assert two.usage.completion_tokens <= 12
    streamed = client.completions.create(prompt="name", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text
    told = client.completions.create(prompt="name", logprobs=2, **options).choices[0].logprobs
    assert (
        len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 6
    )
    assert client.completions.create(prompt=[5, 6, 7], **options).usage.prompt_tokens == 3


def test_log_probabilities_of_completions_are_those_of_their_stream(client: openai.OpenAI) -> None:
    hot: dict[str, Any] = {"temperature": 2, "seed": 3, "logprobs": 2}
    asked: dict[str, Any] = {"model": tiny.NAME, "prompt": "😀 😀", "max_tokens": 40, **hot}
    whole = client.completions.create(**asked).choices[0]
    told = whole.logprobs
    streamed: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "top_logprobs": []}
    for chunk in client.completions.create(**asked, stream=True):
        for name, values in streamed.items():
            values.extend(getattr(chunk.choices[0].logprobs, name))
    assert streamed == {name: getattr(told, name) for name in streamed}
    assert any(token.startswith("bytes:") for token in told.tokens)
    assert told.text_offset == sorted(told.text_offset)
    assert 0 <= max(told.text_offset) < len(whole.text)
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) in (2, 3)
    ended = client.completions.create(**asked, stop=whole.text[2:4]).choices[0]
    assert ended.finish_reason == "stop"
    assert max(ended.logprobs.text_offset) < len(ended.text)


def test_models_are_listed_and_found(client: openai.OpenAI, job: dict) -> None:
    names = [model.id for model in client.models.list()]
    assert {tiny.NAME, job["adapter_id"]} <= set(names)
    assert client.models.retrieve(tiny.NAME).owned_by == "graft"
    assert client.models.retrieve(job["adapter_id"]).created > 1.7e9
    assert client.models.retrieve(f"{job['id']}@8").id == f"{job['id']}@8"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ad_none")


def test_wrong_requests_raise_what_openai_raises(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no base model"):
        ask(client, "gpt-9")
    for options, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"max_completion_tokens": 10_000}, "max_completion_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, **options)
        assert caught.value.status_code == 400
        assert caught.value.param == param
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="gr_wrong"))


def test_what_means_nothing_here_is_passed_over(client: openai.OpenAI) -> None:
    harmless: dict[str, Any] = {
        "store": False,
        "user": "me",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    }
    assert (
        ask(client, **harmless).choices[0].message.content
        == ask(client, extra_body=harmless["extra_body"]).choices[0].message.content
    )


@pytest.mark.usefixtures("service")
def test_calls_that_a_model_writes_are_calls() -> None:
    """The tiny model writes none; what the route does with one is shown on its own."""
    from api.openai.chat import _Written

    said, calls = "", []
    written = _Written(with_calls=True)
    for piece in (
        "Wait. <tool_",
        'call>{"name": "weather", ',
        '"arguments": {"city": "Rome"}}</tool_call>',
        "",
    ):
        delta = written.delta(piece, last=piece == "")
        said += delta.get("content", "")
        calls += delta.get("tool_calls", [])
    assert said == "Wait."
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather")]
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Rome"}
