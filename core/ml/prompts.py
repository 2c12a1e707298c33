"""The one place where a row becomes tokens and a loss mask. No torch.

Preview, training, evaluation and generation all come through here, so they cannot differ in a token.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, Literal, NamedTuple

from core.errors import BadRequest
from core.ml import rendering, tokens
from core.ml.formats.chat import weights
from core.ml.formats.chat.example import Conversation, Example, Turn
from core.ml.rendering import Marks, Styles

LossOn = Literal["auto", "assistant", "completion", "all"]
Message = Mapping[str, Any]

# The turn-end token need not be the very last trained one: many templates add a line break.
TAIL = 3
# So many rows, or so many characters of theirs, go to the tokenizer together.
_BATCH = 256
_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Contract:
    """A tokenizer with its chat template, the tokens that end an answer, and what the template leaves to us.

    `rows` "text": trained on plain texts, so that a prompt is the beginning of one.
    """

    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    template: Literal["model", "plain"] = "model"
    styles: Styles = field(default_factory=Styles)
    rows: Literal["turns", "text"] = "turns"

    @cached_property
    def control(self) -> re.Pattern[str]:
        """The tokens that no text may forge."""
        return rendering.control_tokens(self.tokenizer)

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row; `trained[i]` says whether the loss counts token i.

    `prompt` counts the tokens before the first answer; all of them where a text has no turns.
    """

    ids: list[int]
    trained: list[bool]
    prompt: int


class _Plan(NamedTuple):
    """A conversation as text, cut where an answer begins and where it ends: every second of `pieces` is an answer.

    `trained` are the places of the pieces to train.
    """

    pieces: list[str]
    trained: list[int]
    marks: Marks | None


def encode(contract: Contract, example: Example, *, loss_on: LossOn = "auto") -> Encoded:
    """Tokens and loss mask of one row. `loss_on` "auto": the answers, or the whole of a text without turns.

    The mask goes by position: the tokens that an assistant's turn adds to the conversation before it.
    This needs every shorter conversation to be the beginning of the longer one, and is refused where a
    template rewrites a turn that is trained. The pieces between borders are tokenised one by one, so no token
    reaches over the border of prompt and answer, neither here nor at generation.

    Raises:
        BadRequest: `template_not_stable`, `double_bos`, `template_error` or `no_turns`.
    """
    encoded = next(encode_all(contract, [example], loss_on=loss_on))
    if isinstance(encoded, BadRequest):
        raise encoded
    return encoded


def encode_all(
    contract: Contract, examples: Iterable[Example], *, loss_on: LossOn = "auto"
) -> Iterator[Encoded | BadRequest]:
    """`encode` for many rows, faster: conversations go to the tokenizer together. A refused row gives its error."""
    for some in _batches(contract, examples, loss_on):
        plain = [plan.pieces for _, plan in some if isinstance(plan, _Plan) and plan.marks is None]
        ids = iter(tokens.ids_of_pieces(contract.tokenizer, plain))
        for example, plan in some:
            try:
                if isinstance(plan, _Plan):
                    known = next(ids) if plan.marks is None else _ids_of(contract, plan)
                    yield _masked(contract, plan, known, loss_on)
                else:
                    yield plan or _text(contract, str(example), loss_on)
            except BadRequest as error:
                yield error


def _batches(
    contract: Contract, examples: Iterable[Example], loss_on: LossOn
) -> "Iterator[list[tuple[Example, _Plan | BadRequest | None]]]":
    some: list[tuple[Example, _Plan | BadRequest | None]] = []
    characters = 0
    for example in examples:
        plan: _Plan | BadRequest | None = None
        if isinstance(example, Conversation):
            try:
                plan = _plan(contract, example, loss_on)
                characters += sum(map(len, plan.pieces))
            except BadRequest as error:
                plan = error
        else:
            characters += len(example)
        some.append((example, plan))
        if len(some) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield some
            some, characters = [], 0
    yield some


def _ids_of(contract: Contract, plan: _Plan) -> list[list[int]]:
    if plan.marks is None:
        return tokens.ids_of_pieces(contract.tokenizer, [plan.pieces])[0]
    return [
        tokens.ids_of_marked(contract.tokenizer, piece, plan.marks, continued=i > 0)
        for i, piece in enumerate(plan.pieces)
    ]


def encode_prompt(
    contract: Contract, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The tokens after which the model answers: the same that came before an answer in training."""
    turns = [Turn(**message) for message in messages]  # type: ignore[typeddict-item]
    plan = _plan(contract, Conversation(turns, tools))
    return _checked(contract, list(chain.from_iterable(_ids_of(contract, plan))))


def encode_beginning(contract: Contract, text: str) -> list[int]:
    """The tokens of a text that the model goes on with. Spaces at its end belong to the next token, as in training."""
    return encode_plain(contract, text.rstrip(" "))


def encode_plain(contract: Contract, text: str) -> list[int]:
    """A text as it stands, after the start token if its tokenizer has one."""
    start = [contract.tokenizer.bos_token_id] if tokens.starts_with_bos(contract.tokenizer) else []
    marks = rendering.marks_for(Conversation([Turn(role="user", content=text)]), contract.control)
    if marks is None:
        return start + tokens.ids_of(contract.tokenizer, [text])[0]
    return start + tokens.ids_of_marked(contract.tokenizer, rendering.marked(text, marks), marks)


def ends_trained(contract: Contract, encoded: Encoded) -> bool:
    """Whether the end of the answer is among what is learned."""
    tail = [token for token, trained in zip(encoded.ids, encoded.trained, strict=True) if trained][-TAIL:]
    return any(token in contract.stop_token_ids for token in tail)


def truncated(contract: Contract, encoded: Encoded, limit: int) -> Encoded | None:
    """The row cut to `limit` tokens from the left of its prompt; None where it does not fit even so.

    The start token stays, and so does every trained token: an answer is never cut.
    """
    if len(encoded.ids) <= limit:
        return encoded
    head = 1 if encoded.ids[0] == contract.tokenizer.bos_token_id else 0
    cut = len(encoded.ids) - limit
    # The first token of a row is seen, but never predicted: a trained one needs another before it.
    if any(encoded.trained[: cut + 1]) or head + cut >= len(encoded.ids):
        return None
    return Encoded(
        encoded.ids[:head] + encoded.ids[head + cut :],
        encoded.trained[:head] + encoded.trained[head + cut :],
        max(encoded.prompt - cut, head),
    )


def text_of(contract: Contract, ids: list[int]) -> str:
    return str(contract.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def pieces(contract: Contract, ids: list[int]) -> list[str]:
    """Each token's own text; a token that holds a part of a character shows as `\\ufffd`."""
    return [text_of(contract, [token]) for token in ids]


def _text(contract: Contract, text: str, loss_on: LossOn) -> Encoded:
    weights.check_text(loss_on)
    ids = encode_plain(contract, text)
    end = contract.tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    return Encoded(ids, [True] * len(ids), len(ids))


def _plan(contract: Contract, example: Conversation, loss_on: LossOn | None = None) -> _Plan:
    """The pieces of a conversation. Without `loss_on` it is the prompt of an answer."""
    conversation = rendering.written(example, contract.styles)
    marks = rendering.marks_for(conversation, contract.control)
    if marks is not None:
        turns, tools = rendering.marked([conversation.turns, conversation.tools], marks)
        conversation = conversation._replace(turns=turns, tools=tools)
    turns, untrained = conversation.turns, conversation.untrained
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    counted = weights.counted(answers, untrained, loss_on)
    whole = rendering.render(contract.tokenizer, turns, conversation.tools, answer_next=loss_on is None)
    borders = [0]
    trained = []
    for number, turn in enumerate(answers):
        found = _borders(contract.tokenizer, conversation, turn, whole)
        if found is not None and found[0] < borders[-1]:
            found = None
        if turn in counted:
            if found is None:
                raise _not_stable(example, number)
            trained.append(len(borders))
        if found is not None:
            borders += found
    borders.append(len(whole))
    for turn, said in enumerate(turns):
        if (turn in counted or said["role"] != "assistant") and not rendering.shows(whole, said, marks):
            raise BadRequest(
                "template_error",
                f'The chat template leaves out or changes what a message of role "{said["role"]}" says.',
                hint="Change these rows, or use another base model.",
            )
    return _Plan([whole[begin:end] for begin, end in pairwise(borders)], trained, marks)


def _borders(tokenizer: Any, conversation: Conversation, turn: int, whole: str) -> tuple[int, int] | None:
    """Where an answer begins and ends in the whole text; None where that does not begin as the turns before it."""
    turns, tools = conversation.turns, conversation.tools
    after = rendering.render(tokenizer, turns[: turn + 1], tools, answer_next=False)
    end = tokenizer.eos_token
    if not whole.startswith(after) and end and after.endswith(end):
        after = after.removesuffix(end)  # some templates write it after the last turn only
    if turn:
        before = rendering.render(tokenizer, turns[:turn], tools, answer_next=True)
    else:
        before = rendering.opening(tokenizer, conversation)
    if not (whole.startswith(after) and after.startswith(before)):
        return None
    return len(before), len(after)


def _not_stable(example: Conversation, number: int) -> BadRequest:
    answers = [i for i, turn in enumerate(example.turns) if turn["role"] == "assistant"]
    return BadRequest(
        "template_not_stable",
        f"The chat template writes messages[{answers[number]}] differently when it is the last turn, "
        "so the trained part cannot be marked with certainty.",
        param=f"messages[{answers[number]}]",
        hint='Use loss_on "completion", conversations that end with this turn, or another base model.',
    )


def _masked(contract: Contract, plan: _Plan, known: list[list[int]], loss_on: LossOn) -> Encoded:
    ids = _checked(contract, list(chain.from_iterable(known)))
    first = len(known[0])
    trained = [loss_on == "all"] * len(ids)
    ends = list(accumulate(map(len, known)))
    for place in plan.trained:
        trained[ends[place - 1] : ends[place]] = [True] * len(known[place])
    return Encoded(ids, trained, first)


def _checked(contract: Contract, ids: list[int]) -> list[int]:
    bos = contract.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise BadRequest("double_bos", "The chat template and the tokenizer both add a start token.")
    return ids
