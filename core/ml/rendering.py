"""Conversations to text through a chat template, for core.ml.prompts.

Control tokens that people wrote stay text: they are put between two marks before the template runs, and
what is between marks is tokenised as plain text after it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from core import strict_json
from core.errors import BadRequest
from core.ml.formats.chat.example import Conversation, Turn

# A base model that has no chat template gets this one: plain marks, and the model's own end token.
PLAIN = (
    "{% for message in messages %}{{ '' if loop.first else '\\n\\n' }}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] }}"
    "{% else %}{{ '### Assistant:\\n' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)

Style = Literal["template", "text"]
# Two private characters that are not in the conversation become the marks.
_PRIVATE = range(0xF0000, 0xFFFFD)


class Styles(NamedTuple):
    """Who writes system messages and tools: the template, or we, as text around it."""

    system: Style = "template"
    tools: Style = "template"


class Marks(NamedTuple):
    """The two characters around each control token in what people wrote, and the pattern of these tokens."""

    start: str
    end: str
    control: re.Pattern[str]


def written(conversation: Conversation, styles: Styles) -> Conversation:
    """The conversation as the template gets it: what it cannot write itself is put into its texts."""
    turns, tools, untrained = conversation.turns, conversation.tools, conversation.untrained
    if styles.tools == "text" and (
        tools or any("tool_calls" in turn or turn["role"] == "tool" for turn in turns)
    ):
        turns, untrained = _tools_as_text(turns, tools, untrained)
        tools = None
    if styles.system == "text" and turns and turns[0]["role"] == "system":
        turns, untrained = _system_in_user(turns, untrained)
    return Conversation(turns, tools, untrained)


def _system_in_user(turns: list[Turn], untrained: frozenset[int]) -> tuple[list[Turn], frozenset[int]]:
    system, *rest = turns
    if not rest or rest[0]["role"] != "user":
        return [Turn(role="user", content=system["content"]), *rest], untrained
    first = Turn(role="user", content=f"{system['content']}\n\n{rest[0]['content']}")
    return [first, *rest[1:]], frozenset(i - 1 for i in untrained)


def _tools_as_text(
    turns: list[Turn], tools: list[dict[str, Any]] | None, untrained: frozenset[int]
) -> tuple[list[Turn], frozenset[int]]:
    """Functions in the system message, calls in the answers, results in a user's turn, each between tags."""
    made: list[Turn] = []
    moved = set()
    for i, turn in enumerate(turns):
        if turn["role"] == "tool":
            content = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if made and turns[i - 1]["role"] == "tool":
                made[-1]["content"] += f"\n{content}"
                continue
            made.append(Turn(role="user", content=content))
            continue
        parts = [turn["content"]] if turn["content"] else []
        parts += [
            f"<tool_call>\n{strict_json.dumps(call['function'])}\n</tool_call>"
            for call in turn.get("tool_calls", ())
        ]
        if i in untrained:
            moved.add(len(made))
        written_turn = Turn(role=turn["role"], content="\n".join(parts))
        if "name" in turn:
            written_turn["name"] = turn["name"]
        made.append(written_turn)
    if tools:
        listed = "\n".join(strict_json.dumps(tool["function"]) for tool in tools)
        text = (
            "You can call these functions, described in JSON:\n"
            f"<tools>\n{listed}\n</tools>\n"
            'To call one, answer with {"name": …, "arguments": {…}} between <tool_call> and </tool_call>.'
        )
        if made and made[0]["role"] == "system":
            made[0] = Turn(role="system", content=f"{made[0]['content']}\n\n{text}")
        else:
            made.insert(0, Turn(role="system", content=text))
            moved = {i + 1 for i in moved}
    return made, frozenset(moved)


def styles_of(tokenizer: Any) -> Styles:
    """What the tokenizer's chat template writes by itself, found out by trying."""
    user, answer = Turn(role="user", content="uu0"), Turn(role="assistant", content="aa0")
    system = Turn(role="system", content="ss0")
    own_system = _shows(tokenizer, Conversation([system, user, answer]), ["ss0", "uu0", "aa0"])
    function = {"name": "ff0", "description": "dd0", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call00000", "type": "function", "function": {"name": "ff0", "arguments": {"kk0": "vv0"}}}
    tooled = Conversation(
        [
            user,
            Turn(role="assistant", content="", tool_calls=[call]),
            Turn(role="tool", content="rr0", tool_call_id="call00000", name="ff0"),
            answer,
        ],
        [{"type": "function", "function": function}],
    )
    own_tools = _shows(tokenizer, tooled, ["dd0", "kk0", "vv0", "rr0", "aa0"])
    return Styles("template" if own_system else "text", "template" if own_tools else "text")


def _shows(tokenizer: Any, conversation: Conversation, signs: list[str]) -> bool:
    try:
        text = render(tokenizer, conversation.turns, conversation.tools, answer_next=False)
    except BadRequest:
        return False
    return all(sign in text for sign in signs)


def system_default(tokenizer: Any) -> str | None:
    """The system message that the template writes where a conversation has none."""
    user = Turn(role="user", content="uu0")
    try:
        given = render(tokenizer, [Turn(role="system", content="ss0"), user], None, answer_next=False)
        bare = render(tokenizer, [user], None, answer_next=False)
    except BadRequest:
        return None
    before, sign, after = given.partition("ss0")
    if (
        not sign
        or not bare.startswith(before)
        or not bare.endswith(after)
        or len(bare) <= len(before + after)
    ):
        return None
    return bare[len(before) : -len(after)]


def marks_for(conversation: Conversation, control: re.Pattern[str]) -> Marks | None:
    """Two characters that occur nowhere in the conversation; None where no control token does."""
    texts = list(_texts([conversation.turns, conversation.tools]))
    if not any(control.search(text) for text in texts):
        return None
    used = set().union(*texts)
    free = list(islice((chr(code) for code in _PRIVATE if chr(code) not in used), 2))
    if len(free) < 2:
        raise BadRequest("too_many_private_characters", "The conversation holds every private character.")
    return Marks(free[0], free[1], control)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def marked(value: Any, marks: Marks) -> Any:
    """A copy with every control token in its texts between marks, names in objects included."""
    if isinstance(value, str):
        return marks.control.sub(f"{marks.start}\\g<0>{marks.end}", value)
    if isinstance(value, Mapping):
        return {marked(name, marks): marked(item, marks) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked(item, marks) for item in value]
    return value


def shows(text: str, turn: Turn, marks: Marks | None) -> bool:
    """Whether what a turn says is in the text of its conversation, as it stands or as a JSON string."""
    content = turn["content"].strip()
    if content in text:
        return True
    # Templates that look for a marked token may leave one mark of two; some set other white space.
    dropped = rf"[\s{marks.start}{marks.end}]+" if marks else r"\s+"
    bare = re.sub(dropped, "", text)
    return any(
        re.sub(dropped, "", form) in bare
        for form in (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
    )


def opening(tokenizer: Any, conversation: Conversation) -> str:
    """What the template writes before an answer that opens the conversation; it renders no empty one."""
    first = conversation.turns[0]
    tried = []
    for content in "01":
        turn = first.copy()
        turn["content"] = content
        tried.append(render(tokenizer, [turn], conversation.tools, answer_next=False))
    same = next((i for i, pair in enumerate(zip(*tried, strict=False)) if pair[0] != pair[1]), None)
    return tried[0][:same]


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """The tokens that a text must not be able to forge, as transformers finds them: special ones and the template's."""
    try:
        tokens = tokenizer._get_control_tokens(tokenizer.chat_template)
    except TemplateError as error:
        raise BadRequest("template_error", f"The chat template is broken: {error}") from error
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def render(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None,
    *,
    answer_next: bool,
) -> str:
    """The text of the turns. Raises BadRequest `template_error` where the template refuses them."""
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=tools,
                add_generation_prompt=answer_next,
                tokenize=False,
            )
        )
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise BadRequest("template_error", f"The chat template refuses this conversation: {error}") from error
