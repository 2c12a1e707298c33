"""Log probabilities as OpenAI's clients read them, of answers of any length."""

import time
from typing import Any

import pytest

from api.openai import wire
from core.ml import tokens
from tests import tiny


def told(names: list[int]) -> dict[str, Any]:
    return {
        "tokens": [f"token_id:{name}" for name in names],
        "token_logprobs": [-1.0] * len(names),
        "top_logprobs": [{f"token_id:{name}": -1.0, "token_id:40": -2.0} for name in names],
    }


def test_offsets_are_where_the_tokens_texts_begin() -> None:
    found = wire.completion_logprobs(tiny.tokenizer(), told([70, 71, 70, 72]), 5)
    assert found is not None
    lengths = [len(text) for text in found["tokens"]]
    assert found["text_offset"] == [5, 5 + lengths[0], 5 + sum(lengths[:2]), 5 + sum(lengths[:3])]
    none = wire.completion_logprobs(tiny.tokenizer(), told([]), 5)
    assert none is not None
    assert none["text_offset"] == []


def test_a_token_is_looked_up_once_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    look_up = tokens.text_and_bytes
    monkeypatch.setattr(
        tokens, "text_and_bytes", lambda tokenizer, token: asked.append(token) or look_up(tokenizer, token)
    )
    for form in (
        lambda: wire.chat_logprobs(tiny.tokenizer(), told([70, 71] * 50)),
        lambda: wire.completion_logprobs(tiny.tokenizer(), told([70, 71] * 50), 0),
    ):
        asked.clear()
        assert form() is not None
        assert sorted(asked) == [40, 70, 71]


def test_a_long_answer_takes_no_time_of_its_square() -> None:
    began = time.monotonic()
    assert wire.completion_logprobs(tiny.tokenizer(), told([70, 71] * 20_000), 0) is not None
    assert time.monotonic() - began < 5
