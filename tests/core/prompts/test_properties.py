"""Any conversation of any roles and any Unicode is refused, or is trained as it stands."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import BadRequest
from core.ml import contract as contracts
from core.ml import prompts
from core.ml.formats.chat.example import Conversation, Turn
from core.ml.prompts import Contract, LossOn
from tests import templates
from tests.templates import BASES, FAMILIES, Family

KNOWN = FAMILIES | BASES
# Those that write what is said as it is said: no trimming, and no piece of text that a token swallows.
EXACT = ["chatml", "mistral", "zephyr", "qwen", *BASES]
profile = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

CONTROL = sorted({token for family in KNOWN.values() for token in family.tokens})
BITS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(CONTROL),
    st.sampled_from([f"{token[: len(token) // 2]}" for token in CONTROL]),
    st.sampled_from(
        [*" \n\t\u00a0", "\r\n", "\n\n", "▁", "\ufeff", "<0x0A>", "[INST]", "[/INST]", "<<SYS>>"]
    ),
    st.sampled_from(
        ["\U000f0000", "\U000f0001", "\ue000", "\u0301", "\u200d", "\x00", "é", "👩‍🚀", "assistant"]
    ),
)
TEXTS = st.lists(BITS, max_size=5).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant", "user", "assistant", "tool"])
TURNS = st.lists(st.builds(lambda role, text: Turn(role=role, content=text), ROLES, TEXTS), max_size=6)


@st.composite
def orderly(draw: st.DrawFn) -> list[Turn]:
    """A conversation that most templates take."""
    turns = [Turn(role="system", content=draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn(role="user", content=draw(TEXTS)), Turn(role="assistant", content=draw(TEXTS))]
    return turns


CONVERSATIONS = st.one_of(orderly(), orderly(), TURNS)
WEIGHTLESS = st.frozensets(st.integers(0, 6), max_size=2)
LOSSES: list[LossOn] = ["auto", "assistant", "completion", "all"]


@cache
def contract_of(name: str) -> Contract:
    with TemporaryDirectory() as folder:
        return contracts.load(templates.save(KNOWN[name], Path(folder)))


def as_read(name: str, text: str) -> str:
    """A tokenizer of pieces knows no other space than its own mark."""
    return text.replace("▁", " ") if KNOWN[name].pieces else text


def borders(trained: list[bool]) -> list[tuple[int, int]]:
    """Where each unbroken run of trained tokens begins and ends."""
    edges = [i for i, (a, b) in enumerate(zip([False, *trained], [*trained, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def expected_runs(family: Family, turns: list[Turn], untrained: frozenset[int]) -> list[str]:
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    made = []
    for i in answers:
        last = family.last if family.last and i + 1 == len(turns) else family.answer
        if i not in untrained:
            made.append(last.replace("{}", turns[i]["content"]))
    return made


@profile
@given(turns=CONVERSATIONS, untrained=WEIGHTLESS, name=st.sampled_from(EXACT))
def test_the_trained_tokens_are_the_answers_and_their_ends(
    turns: list[Turn], untrained: frozenset[int], name: str
) -> None:
    contract, family = contract_of(name), KNOWN[name]
    try:
        encoded = prompts.encode(contract, Conversation(turns, None, untrained))
    except BadRequest:
        return
    text = prompts.text_of(contract, encoded.ids)
    runs = []
    for begin, end in borders(encoded.trained):
        before = prompts.text_of(contract, encoded.ids[:begin])
        assert text.startswith(before)
        runs.append(prompts.text_of(contract, encoded.ids[:end])[len(before) :])
    heads = [turn["content"] for turn in turns if turn["role"] != "assistant"]
    assert all(as_read(name, content).strip() in text for content in heads)
    if not any(a["role"] == b["role"] == "assistant" for a, b in pairwise(turns)):
        assert runs == [as_read(name, run) for run in expected_runs(family, turns, untrained)]


@profile
@given(turns=CONVERSATIONS, name=st.sampled_from([*KNOWN]))
def test_control_tokens_stand_only_where_the_template_writes_them(turns: list[Turn], name: str) -> None:
    contract = contract_of(name)
    try:
        encoded = prompts.encode(contract, Conversation(turns), loss_on="all")
    except BadRequest:
        return
    harmless = [Turn(role=turn["role"], content="a" * bool(turn["content"])) for turn in turns]
    written = prompts.encode(contract, Conversation(harmless), loss_on="all")
    control = contract.tokenizer.added_tokens_decoder
    assert [i for i in encoded.ids if i in control] == [i for i in written.ids if i in control]


@profile
@given(turns=CONVERSATIONS, name=st.sampled_from([*KNOWN]))
def test_a_prompt_is_what_training_saw(turns: list[Turn], name: str) -> None:
    contract = contract_of(name)
    try:
        encoded = prompts.encode(contract, Conversation(turns))
    except BadRequest:
        return
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    for answer in answers[1:] if answers[:1] == [0] else answers:
        prompt = prompts.encode_prompt(contract, turns[:answer])
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.trained[len(prompt)]
    if answers and answers[0]:
        assert encoded.prompt == len(prompts.encode_prompt(contract, turns[: answers[0]]))


@profile
@given(
    rows=st.lists(st.one_of(CONVERSATIONS.map(Conversation), TEXTS), max_size=6),
    name=st.sampled_from([*KNOWN]),
    loss_on=st.sampled_from(LOSSES),
)
def test_rows_together_are_encoded_as_each_alone(
    rows: list[Conversation | str], name: str, loss_on: LossOn
) -> None:
    contract = contract_of(name)
    together = list(prompts.encode_all(contract, rows, loss_on=loss_on))
    assert len(together) == len(rows)
    for row, one in zip(rows, together, strict=True):
        if isinstance(one, BadRequest):
            with pytest.raises(BadRequest) as caught:
                prompts.encode(contract, row, loss_on=loss_on)
            assert caught.value.as_dict() == one.as_dict()
        else:
            assert prompts.encode(contract, row, loss_on=loss_on) == one


@profile
@given(
    turns=CONVERSATIONS,
    name=st.sampled_from([*KNOWN]),
    cut=st.integers(1, 60),
    loss_on=st.sampled_from(LOSSES),
)
def test_a_row_that_is_cut_keeps_every_trained_token_and_the_limit(
    turns: list[Turn], name: str, cut: int, loss_on: LossOn
) -> None:
    contract = contract_of(name)
    try:
        encoded = prompts.encode(contract, Conversation(turns), loss_on=loss_on)
    except BadRequest:
        return
    limit = max(len(encoded.ids) - cut, 1)
    made = prompts.truncated(contract, encoded, limit)
    if made is None:
        return
    assert len(made.ids) == len(made.trained) <= limit
    assert encoded.ids[len(encoded.ids) - len(made.ids) + 1 :] == made.ids[1:]
    assert not made.trained[0] or encoded.trained[0]
    assert sum(made.trained) == sum(encoded.trained)
    assert prompts.ends_trained(contract, made) == prompts.ends_trained(contract, encoded)
    assert not any(made.trained[: made.prompt])


@profile
@given(text=TEXTS, name=st.sampled_from([*KNOWN]))
def test_a_plain_text_is_trained_as_it_stands(text: str, name: str) -> None:
    contract, family = contract_of(name), KNOWN[name]
    encoded = prompts.encode(contract, text)
    assert all(encoded.trained)
    control = contract.tokenizer.added_tokens_decoder
    ends = [family.bos] if family.adds_bos else []
    assert [str(control[i]) for i in encoded.ids if i in control] == [*ends, family.eos]
    plain = prompts.text_of(contract, encoded.ids).removesuffix(family.eos)
    plain = plain.removeprefix(ends[0] if ends else "")
    assert plain.lstrip(" ") == as_read(name, text).lstrip(" ")
