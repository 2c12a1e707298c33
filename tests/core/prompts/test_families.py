"""The templates of real model families: what is trained, and what comes before it at generation."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import BadRequest, GraftError
from core.ml import contract as contracts
from core.ml import prompts
from core.ml.formats.chat.example import Conversation, Turn
from core.ml.prompts import Contract, Encoded, LossOn
from tests import templates
from tests.templates import BASES, FAMILIES, Family

SYSTEM = Turn(role="system", content="Be brief, été.")
ONE = [Turn(role="user", content="How are you?"), Turn(role="assistant", content="Fine, 東京 😀.")]
THREE = [
    *ONE,
    Turn(role="user", content="And you"),
    Turn(role="assistant", content="Say\n\n  it"),
    Turn(role="user", content="Bye"),
    Turn(role="assistant", content="Au revoir."),
]
CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": "Genève", "days": 2}},
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "How it is there", "parameters": {"type": "object"}},
}
CALLING = [
    Turn(role="user", content="How is it?"),
    Turn(role="assistant", content="", tool_calls=[CALL]),
    Turn(role="tool", content='{"sky": "grey"}', tool_call_id="call00000", name="weather"),
    Turn(role="assistant", content="Grey."),
]
ALL = [*FAMILIES, *BASES]


@pytest.fixture(scope="module")
def contract_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contract]:
    folder = tmp_path_factory.mktemp("families")
    known = FAMILIES | BASES
    return {name: contracts.load(templates.save(known[name], folder / name)) for name in known}


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def family(name: str) -> Family:
    return (FAMILIES | BASES)[name]


@pytest.fixture
def contract(name: str, contract_of: dict[str, Contract]) -> Contract:
    return contract_of[name]


def trained(contract: Contract, encoded: Encoded) -> list[str]:
    """The text of every unbroken run of trained tokens, as it stands in the whole."""
    runs, begin = [], None
    for i, on in enumerate([*encoded.trained, False]):
        if on and begin is None:
            begin = i
        if not on and begin is not None:
            before = prompts.text_of(contract, encoded.ids[:begin])
            runs.append(prompts.text_of(contract, encoded.ids[:i])[len(before) :])
            begin = None
    return runs


def test_a_family_is_read_for_what_its_template_writes(family: Family, contract: Contract) -> None:
    assert contract.template == ("model" if family.template else "plain")
    assert contract.styles == (family.system, family.tools)


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
def test_every_answer_is_trained_with_its_end(family: Family, contract: Contract, system: list[Turn]) -> None:
    for turns in (ONE, THREE[:4], THREE):
        encoded = prompts.encode(contract, Conversation([*system, *turns]))
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert trained(contract, encoded) == family.trained(*answers)
        assert prompts.ends_trained(contract, encoded)
        text = prompts.text_of(contract, encoded.ids)
        assert all(turn["content"] in text for turn in [*system, *turns])


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
@pytest.mark.parametrize("border", ["", "\n", " ", "\n\n"])
def test_a_prompt_is_what_training_saw_before_each_answer(
    contract: Contract, system: list[Turn], border: str
) -> None:
    turns = [turn.copy() for turn in [*system, *THREE]]
    for turn in turns:
        turn["content"] = border + turn["content"] + border
    encoded = prompts.encode(contract, Conversation(turns))
    begins = [i for i, on in enumerate(encoded.trained) if on and not encoded.trained[i - 1]]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert encoded.prompt == begins[0]
    for begin, answer in zip(begins, answers, strict=True):
        assert prompts.encode_prompt(contract, turns[:answer]) == encoded.ids[:begin]


def test_the_start_token_comes_once(family: Family, contract: Contract) -> None:
    bos = contract.tokenizer.bos_token_id
    for ids in (prompts.encode(contract, Conversation(THREE)).ids, prompts.encode_plain(contract, "<s> Say")):
        assert bos is None or ids[:2] != [bos, bos]
        assert ids[:1] == [bos] or not family.adds_bos


def test_an_answer_of_no_weight_is_not_trained(family: Family, contract: Contract) -> None:
    whole = family.trained(*(turn["content"] for turn in THREE[1::2]))
    for system in ([], [SYSTEM]):
        at = len(system)
        conversation = Conversation([*system, *THREE], None, frozenset({at + 1}))
        assert trained(contract, prompts.encode(contract, conversation)) == whole[1:]


@pytest.mark.parametrize("loss_on", ["auto", "assistant", "completion", "all"])
def test_what_the_loss_is_on(family: Family, contract: Contract, loss_on: LossOn) -> None:
    encoded = prompts.encode(contract, Conversation(THREE), loss_on=loss_on)
    whole = family.trained(*(turn["content"] for turn in THREE[1::2]))
    assert encoded.ids == prompts.encode(contract, Conversation(THREE)).ids
    if loss_on == "all":
        assert all(encoded.trained)
    else:
        assert trained(contract, encoded) == (whole[-1:] if loss_on == "completion" else whole)


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
def test_tools_and_results_are_read_and_calls_are_trained(
    family: Family, contract: Contract, system: list[Turn]
) -> None:
    turns = [*system, *CALLING]
    encoded = prompts.encode(contract, Conversation(turns, [TOOL]))
    text = prompts.text_of(contract, encoded.ids)
    for part in ("How it is there", '{"sky": "grey"}', *(turn["content"] for turn in turns)):
        assert part in text
    call, answer = trained(contract, encoded)
    assert json.loads(call[call.index("{") : call.rindex("}") + 1]) == CALL["function"]
    assert "grey" not in call
    assert answer == family.trained("Grey.")[0]
    begins = [i for i, on in enumerate(encoded.trained) if on and not encoded.trained[i - 1]]
    at = len(system)
    for begin, until in zip(begins, (at + 1, at + 3), strict=True):
        assert prompts.encode_prompt(contract, turns[:until], [TOOL]) == encoded.ids[:begin]


def test_several_results_follow_several_calls(contract: Contract) -> None:
    second = {**CALL, "id": "call00001", "function": {"name": "weather", "arguments": {"town": "Bern"}}}
    turns = [
        CALLING[0],
        Turn(role="assistant", content="I look.", tool_calls=[CALL, second]),
        CALLING[2],
        Turn(role="tool", content="blue", tool_call_id="call00001", name="weather"),
        CALLING[3],
    ]
    encoded = prompts.encode(contract, Conversation(turns, [TOOL]))
    assert "blue" in prompts.text_of(contract, encoded.ids)
    call, _ = trained(contract, encoded)
    assert all(part in call for part in ("I look.", "Genève", "Bern"))


def test_a_first_turn_of_the_assistant_is_trained_alone(family: Family, contract: Contract) -> None:
    turns = [Turn(role="assistant", content="s"), *ONE]
    if "must alternate" in family.template:
        with pytest.raises(BadRequest, match="must alternate"):
            prompts.encode(contract, Conversation(turns))
        return
    encoded = prompts.encode(contract, Conversation(turns))
    assert trained(contract, encoded) == family.trained("s", ONE[1]["content"])


def test_a_saved_contract_gives_the_same_ids(contract: Contract, tmp_path: Path) -> None:
    contracts.save(contract, tmp_path)
    again = contracts.load(tmp_path)
    assert (again.stop_token_ids, again.styles, again.template, again.template_sha256) == (
        contract.stop_token_ids,
        contract.styles,
        contract.template,
        contract.template_sha256,
    )
    for conversation in (Conversation([SYSTEM, *THREE]), Conversation(CALLING, [TOOL]), "Say hello"):
        assert prompts.encode(again, conversation) == prompts.encode(contract, conversation)
    assert prompts.encode_prompt(again, ONE[:1]) == prompts.encode_prompt(contract, ONE[:1])


def test_a_saved_contract_refuses_another_tokenizer(contract: Contract, tmp_path: Path) -> None:
    contracts.save(contract, tmp_path)
    other = contract.tokenizer.__class__.from_pretrained(str(tmp_path))
    other.add_tokens(["hello"])
    other.save_pretrained(tmp_path)
    with pytest.raises(GraftError) as caught:
        contracts.load(tmp_path)
    assert caught.value.code == "contract_broken"


def test_the_stop_token_is_the_one_that_ends_a_turn(family: Family, contract: Contract) -> None:
    stops = [contract.tokenizer.convert_ids_to_tokens(stop) for stop in contract.stop_token_ids]
    assert stops[0] in family.answer
    assert family.eos in stops
