"""The plain form for other tools: what Graft reads from it is what it was written from."""

import io
from pathlib import Path
from typing import Any

import pytest

from core import strict_json
from core.errors import BadRequest
from core.ml import contract as contracts
from core.ml import prompts, rendering
from core.ml.formats import validate
from core.ml.formats.chat import plain, weights
from core.ml.formats.chat.example import Conversation, Example
from core.ml.formats.files.rows import Limits
from core.ml.formats.validate import Reading
from core.ml.prompts import Contract, LossOn
from tests.core.formats.given import jsonl
from tests.corpus import read
from tests.corpus.case import DEPTH, LINE_BYTES, Case
from tests.templates import FAMILIES, tokenizer

# A row in the plain form may be longer, and its tools lie deeper than JSON in a text does.
AGAIN = Limits(line_bytes=4 * LINE_BYTES, depth=DEPTH + 8)


@pytest.fixture(scope="module", params=["chatml", "qwen", "gemma"])
def contract(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Contract:
    """Templates that write tools as text, by themselves, and no system message at all."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    tokenizer(FAMILIES[request.param]).save_pretrained(folder)
    return contracts.load(folder)


def again(examples: list[Example]) -> list[Example]:
    """The examples written, and read as a new file."""
    content = "".join(strict_json.dumps(plain.row_of(example)) + "\n" for example in examples).encode()
    kind, mapping = ("messages", None)
    if isinstance(examples[0], str):
        kind, mapping = "mapping", {"text": "{text}"}
    report = validate.inspect(io.BytesIO(content), kind=kind, mapping=mapping, limits=AGAIN)
    assert (report.error_count, report.rows) == (0, len(examples)), report.errors
    how = Reading("jsonl", False, kind, mapping, AGAIN)  # type: ignore[arg-type]
    return [example for _, example in validate.conversations(io.BytesIO(content), how)]


def essence(example: Example) -> Any:
    """All of an example but the names of what was passed over."""
    return example[:3] if isinstance(example, Conversation) else example


@pytest.mark.parametrize("case", read.GOOD, ids=lambda case: case.name)
def test_what_is_written_is_read_as_the_same_conversations(case: Case) -> None:
    examples = read.examples(case)
    assert [essence(example) for example in again(examples)] == [essence(example) for example in examples]


@pytest.mark.parametrize("loss_on", ["auto", "completion", "all"])
def test_what_is_written_for_a_base_trains_the_same_tokens(contract: Contract, loss_on: LossOn) -> None:
    compared = 0
    for name, examples in read.first_examples():
        for example in examples:
            try:
                expected = prompts.encode(contract, example, loss_on=loss_on)
            except BadRequest:
                continue  # a conversation that this template refuses
            trained = weights.weighted(example, loss_on)
            if isinstance(trained, Conversation):
                trained = rendering.written(trained, contract.styles)
            (written,) = again([trained])
            mask: LossOn = "all" if loss_on == "all" else "auto"
            assert prompts.encode(contract, written, loss_on=mask) == expected, name
            compared += 1
    assert compared > 50


ROW = {
    "messages": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2", "weight": 0},
        {"role": "user", "content": "q3"},
        {"role": "assistant", "content": "a3", "weight": 1},
    ]
}


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("auto", [None, 0, None]),
        ("assistant", [None, 0, None]),
        ("completion", [0, 0, None]),
        ("all", [None, None, None]),
    ],
)
def test_answers_that_are_not_trained_have_weight_0(loss_on: str, expected: list[int | None]) -> None:
    how = Reading("jsonl", False, "messages", None)
    ((_, example),) = validate.conversations(io.BytesIO(jsonl(ROW)), how)
    row = plain.row_of(weights.weighted(example, loss_on))
    assert [turn.get("weight") for turn in row["messages"][1::2]] == expected
    assert [turn["content"] for turn in row["messages"]] == ["q1", "a1", "q2", "a2", "q3", "a3"]


def test_a_row_of_which_loss_on_trains_nothing_is_refused() -> None:
    last = Conversation([*map(dict, ROW["messages"][:2])], None, frozenset({1}))  # type: ignore[list-item]
    with pytest.raises(BadRequest, match="weight 0") as raised:
        weights.weighted(last, "completion")
    assert raised.value.code == "nothing_trained"
    with pytest.raises(BadRequest, match="plain texts") as raised:
        weights.weighted("a text", "assistant")
    assert raised.value.code == "no_turns"


def test_calls_are_written_as_openai_does_with_their_numbers_as_they_stood() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1.10}'}}
    turns = [ROW["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = {"messages": turns, "functions": [{"name": "f"}]}
    ((_, example),) = validate.conversations(
        io.BytesIO(jsonl(row)), Reading("jsonl", False, "messages", None)
    )
    assert plain.row_of(example) == {
        "messages": [turns[0], {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
