"""Log probabilities as OpenAI's clients read them, of answers of any length."""

import time
from typing import Any

import pytest

from api.openai import logprobs
from core.ml import tokens
from tests import tiny


def told(names: list[int], top: dict[int, float] | None = None) -> dict[str, Any]:
    likely = {f"token_id:{token}": value for token, value in (top or {}).items()}
    return {
        "tokens": [f"token_id:{name}" for name in names],
        "token_logprobs": [-1.0] * len(names),
        "top_logprobs": [likely or {f"token_id:{name}": -1.0, "token_id:40": -2.0} for name in names],
    }


def ids(text: str) -> list[int]:
    found: list[int] = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


def completion(names: list[int], end: int = 10**6, **top: Any) -> dict[str, Any]:
    found = logprobs.OfCompletion(tiny.tokenizer()).told(told(names, **top), end)
    assert found is not None
    return found


def test_offsets_are_where_the_tokens_texts_begin() -> None:
    found = completion([70, 71, 70, 72])
    lengths = [len(text) for text in found["tokens"]]
    assert found["text_offset"] == [0, lengths[0], sum(lengths[:2]), sum(lengths[:3])]
    assert completion([])["text_offset"] == []


def test_parts_of_a_character_begin_where_it_does() -> None:
    text = "a🙂🙂b"
    begins, whole = [], b""
    for token in ids(text):
        begins.append(len(whole.decode(errors="ignore")))
        whole += tokens.text_and_bytes(tiny.tokenizer(), token)[1]
    assert len(begins) > len(text)
    assert completion(ids(text))["text_offset"] == begins
    pieces = logprobs.OfCompletion(tiny.tokenizer())
    streamed = [pieces.told(told([token]), len(text)) for token in ids(text)]
    assert [one["text_offset"] for one in streamed if one] == [[begin] for begin in begins]


def test_no_offset_is_past_the_text() -> None:
    assert completion([70, 70, 70], end=1)["text_offset"] == [0, 1, 1]


def test_a_control_token_takes_no_room_in_the_text() -> None:
    tokenizer = tiny.tokenizer()
    assert tokenizer.added_tokens_decoder[tokenizer.eos_token_id].special
    assert completion([70, tokenizer.eos_token_id, 71])["text_offset"][1:] == [1, 1]


def test_tokens_that_are_no_text_by_themselves_are_told_apart() -> None:
    halves = [
        token for token in ids("🙂é日") if "\ufffd" in tokens.text_and_bytes(tiny.tokenizer(), token)[0]
    ]
    assert len(set(halves)) > 1
    found = completion(halves[:1], top={token: -1.0 - i for i, token in enumerate(dict.fromkeys(halves))})
    assert len(found["top_logprobs"][0]) == len(set(halves))
    assert found["tokens"][0].startswith("bytes:\\x")
    assert found["tokens"][0] in found["top_logprobs"][0]


def test_the_chosen_token_is_among_the_likely_ones() -> None:
    (top,) = completion([70], top={71: -0.5, 72: -0.75})["top_logprobs"]
    assert list(top.values()) == [-0.5, -0.75, -1.0]
    assert top[tokens.text_and_bytes(tiny.tokenizer(), 70)[0]] == -1.0


def test_a_token_is_looked_up_once_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    look_up = tokens.text_and_bytes
    monkeypatch.setattr(
        tokens, "text_and_bytes", lambda tokenizer, token: asked.append(token) or look_up(tokenizer, token)
    )
    for form in (
        lambda: logprobs.of_chat(tiny.tokenizer(), told([70, 71] * 50)),
        lambda: completion([70, 71] * 50),
    ):
        asked.clear()
        assert form() is not None
        assert sorted(asked) == [40, 70, 71]


def test_a_long_answer_takes_no_time_of_its_square() -> None:
    began = time.monotonic()
    assert completion([70, 71] * 20_000)
    assert time.monotonic() - began < 5
