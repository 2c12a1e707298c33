"""An Ollama Modelfile whose template writes what the prompt contract writes, found by trying and checked by tokens.

Ollama's templates are Go's text/template. `render` reads exactly the part of it that `template_of` writes, so that
what is checked is the template as it stands in the file; anything else is an error.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from core.errors import BadRequest
from core.ml import prompts, rendering, tokens
from core.ml.formats.chat.example import Conversation, Turn
from core.ml.prompts import Contract

Turns = list[dict[str, str]]
_SIGNS = ("qq0zz", "ww1zz", "qq2zz")
_SYSTEM = "ss0zz"
_ACTION = re.compile(r"\{\{(-?) *(.*?) *\}\}", re.DOTALL)
_ROLE = re.compile(r'eq \.Role "(\w+)"')
_LITERAL = re.compile(r'"([^"\\]*)"')
_ASKED = "Which of these is a fruit?\n\n- apple\n- stone"
SAMPLES: tuple[Turns, ...] = (
    [{"role": "user", "content": "Say hello."}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": _ASKED}],
    [
        {"role": "user", "content": "Wie heißt du? 你好"},
        {"role": "assistant", "content": "I am a model."},
        {"role": "user", "content": "SELECT name FROM t WHERE n > 12;"},
    ],
    [
        {"role": "system", "content": "You write SQL.\nNothing else."},
        {"role": "user", "content": "Count the users."},
        {"role": "assistant", "content": "SELECT COUNT(*) FROM users;"},
        {"role": "user", "content": "And in 2024?"},
    ],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2, as\n\nI said"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "- a\n- b"},
        {"role": "user", "content": "5"},
    ],
)


def modelfile(contract: Contract, file: str, *, adds_start: bool) -> tuple[str, dict[str, Any]]:
    """The Modelfile for a GGUF file beside it, and what is known about its template.

    `adds_start`: whoever reads the file puts the start token before every prompt.
    """
    template, facts = _checked_template(contract, adds_start)
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    for token in contract.stop_token_ids:
        text = contract.tokenizer.convert_ids_to_tokens(token)
        lines.append(f'PARAMETER stop "{text}"')
    return "\n".join(lines) + "\n", facts


def template_of(contract: Contract, *, adds_start: bool) -> str | None:
    """The contract's chat template in Go; None where it is not regular enough to be found by trying."""
    user, answer, again = _SIGNS
    turns = [_turn("user", user), _turn("assistant", answer), _turn("user", again)]
    try:
        once = _text(contract, turns[:1])
        twice = _text(contract, turns)
        given = _text(contract, [_turn("system", _SYSTEM), *turns[:1]])
    except BadRequest:
        return None
    opening, found, ending = once.partition(user)
    if not found or not twice.startswith(opening + user) or not twice.endswith(again + ending):
        return None
    inner = twice[len(opening + user) : len(twice) - len(again + ending)]
    before, found, after = inner.partition(answer)
    system, given_found, rest = given.partition(_SYSTEM)
    between, user_found, last = rest.partition(user)
    if not (found and given_found and user_found) or last != ending:
        return None
    start = contract.tokenizer.bos_token or ""
    if adds_start:
        if not (opening.startswith(start) and system.startswith(start)):
            return None
        opening, system = opening.removeprefix(start), system.removeprefix(start)
    return (
        f"{{{{- if .System }}}}{_go(system)}{{{{ .System }}}}{_go(between)}{{{{ else }}}}{_go(opening)}{{{{ end }}}}\n"
        '{{- range .Messages }}\n{{- if eq .Role "user" }}{{ .Content }}\n'
        f'{{{{- else if eq .Role "assistant" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}{{{{ end }}}}\n'
        f"{{{{- end }}}}{_go(ending)}"
    )


def render(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Ollama makes of a conversation. Raises ValueError for Go that this does not know."""
    parts = list(_parts(template))
    system = "\n\n".join(turn["content"] for turn in messages if turn["role"] == "system")
    text, rest = _block(parts, {"System": system, "Messages": messages}, write=True)
    if rest:
        raise ValueError(f"{{{{ {rest[0][1]} }}}} stands alone")
    return text


def _checked_template(contract: Contract, adds_start: bool) -> tuple[str | None, dict[str, Any]]:
    if contract.rows == "text":
        why = "Trained on plain texts: the prompt is the beginning of one."
        return "{{ .Prompt }}", {"template": True, "note": why}
    template = template_of(contract, adds_start=adds_start)
    if template is None or '"""' in template:
        why = (
            "The chat template follows no rule that Ollama's templates can say; use the one in the GGUF file."
        )
        return None, {"template": False, "note": why}
    equal = 0
    for sample in SAMPLES:
        try:
            expected = prompts.encode_prompt(contract, sample)
        except BadRequest:
            continue
        text = render(template, sample)
        if text != _without_start(contract, _text(contract, sample), adds_start):
            return None, {"template": False, "note": f"It would write {text[:200]!r} for {sample}."}
        equal += tokens.ids_of_rendered(contract.tokenizer, text, start=adds_start) == expected
    facts: dict[str, Any] = {"template": True, "samples": len(SAMPLES), "tokens_equal": equal}
    if _trims(contract):
        facts["note"] = "The chat template takes white space around a message away; Ollama's cannot."
    return template, facts


def _trims(contract: Contract) -> bool:
    return f" {_SIGNS[0]}\n" not in _text(contract, [_turn("user", f" {_SIGNS[0]}\n")])


def _without_start(contract: Contract, text: str, adds_start: bool) -> str:
    return text.removeprefix(contract.tokenizer.bos_token) if adds_start else text


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(contract: Contract, turns: Sequence[dict[str, str]]) -> str:
    given = Conversation([Turn(role=turn["role"], content=turn["content"]) for turn in turns])
    conversation = rendering.written(given, contract.styles)
    return rendering.render(contract.tokenizer, conversation.turns, conversation.tools, answer_next=True)


def _go(text: str) -> str:
    """Text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def _parts(template: str) -> Iterator[tuple[str, str]]:
    """("text", …) and ("action", …), white space before `{{-` taken away."""
    place = 0
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        yield "text", text.rstrip() if match[1] else text
        if match[2].endswith("-"):
            raise ValueError(f"{{{{ {match[2]} }}}} trims what comes after it")
        yield "action", match[2]
        place = match.end()
    if "{{" in template[place:]:
        raise ValueError("an action has no end")
    yield "text", template[place:]


def _block(
    parts: list[tuple[str, str]], scope: dict[str, Any], *, write: bool
) -> tuple[str, list[tuple[str, str]]]:
    """The text up to the next `else` or `end` of this block, and the parts from there on."""
    made = ""
    while parts:
        (kind, value), *parts = parts
        if kind == "text":
            made += value
        elif value == "end" or value.startswith("else"):
            return made if write else "", [(kind, value), *parts]
        elif value.startswith("if "):
            text, parts = _if(value[3:], parts, scope, write=write)
            made += text
        elif value == "range .Messages":
            for message in scope["Messages"]:
                text, _ = _block(parts, {"Role": message["role"], "Content": message["content"]}, write=write)
                made += text
            _, parts = _block(parts, {}, write=False)
            parts = parts[1:]
        elif (literal := _LITERAL.fullmatch(value)) is not None:
            made += literal[1]
        elif value not in (".System", ".Content"):
            raise ValueError(f"{{{{ {value} }}}} is not known here")
        elif write:
            made += scope[_field(value, scope)]
    return made if write else "", []


def _if(
    condition: str, parts: list[tuple[str, str]], scope: dict[str, Any], *, write: bool
) -> tuple[str, list[tuple[str, str]]]:
    holds = write and _holds(condition, scope)
    made, parts = _block(parts, scope, write=holds)
    while parts and parts[0][1] != "end":
        follow = parts[0][1].removeprefix("else").strip()
        applies = write and not holds and (not follow or _holds(follow.removeprefix("if "), scope))
        text, parts = _block(parts[1:], scope, write=applies)
        made += text
        holds = holds or applies
    if not parts:
        raise ValueError("an if has no end")
    return made, parts[1:]


def _holds(condition: str, scope: dict[str, Any]) -> bool:
    if (role := _ROLE.fullmatch(condition)) is not None:
        return bool(scope[_field(".Role", scope)] == role[1])
    return bool(scope[_field(condition, scope)])


def _field(value: str, scope: dict[str, Any]) -> str:
    if value[:1] != "." or value[1:] not in scope:
        raise ValueError(f"{{{{ {value} }}}} is not known here")
    return value[1:]
