"""Texts that were written in a published layout, back to the conversation they were made of.

Only then can the answer alone be trained, and no markers are written twice: `<s>[INST] q [/INST] a </s>`
(Llama 2), `### Instruction: q ### Response: a` (Alpaca), `### Human: q### Assistant: a` (Guanaco) and
`<|im_start|>user q<|im_end|>` (ChatML).
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable
from typing import Literal

from core.ml.formats.chat.example import Conversation, RowError, Turn

Layout = Literal["llama2", "alpaca", "guanaco", "chatml"]

# A mark that opens, and one that must follow it: two searches, since one pattern for both takes quadratic time.
_SIGNS: dict[Layout, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "llama2": (re.compile(r"\[INST\]"), re.compile(r"\[/INST\]")),
    "alpaca": (
        re.compile(r"^###[ ]?Instruction:", re.MULTILINE),
        re.compile(r"^###[ ]?Response:", re.MULTILINE),
    ),
    "guanaco": (re.compile(r"###[ ]?Human:"), re.compile(r"###[ ]?Assistant:")),
    "chatml": (re.compile(r"<\|im_start\|>\w+\n"), re.compile(r"<\|im_end\|>")),
}
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "### End")
# What a layout has between a mark and the turn: the end of the line and blank ones, or one space.
_BORDER = re.compile(r"(?:[ \t]*\r?\n)+| ")
# Marks of the same kind in other words: headings such as `### Question:` and `## Answer`, and beginnings of lines
# such as `Q:` and `**User:**`, where fewer words are taken: programs have lines that begin with `Input:`.
_ASKERS = "question|query|instruction|prompt|user|human|customer"
_ANSWERERS = "answer|response|completion|assistant|gpt|bot|ai|agent"


def _marks(headings: str, lines: str, others: str) -> re.Pattern[str]:
    # Each begins with a sign of its own, which is looked for several times as fast as the start of a line.
    heading = rf"##[ \t]*(?:{headings})\b[ \t]*(?::|$)"
    line = rf"\n[ \t]*(?:\*\*)?(?:{lines})(?:\*\*)?:"
    return re.compile(f"{heading}|{line}|{others}", re.IGNORECASE | re.MULTILINE)


_ASKED = _marks(
    f"{_ASKERS}|input|problem",
    f"{_ASKERS}|q",
    r"\[inst\]|<\|user\|>|<start_of_turn>user|<\|start_header_id\|>user|(?-i:\bUSER: )",
)
_ANSWERED = _marks(
    f"{_ANSWERERS}|output|solution|model",
    f"{_ANSWERERS}|a",
    r"\[/inst\]|<\|assistant\|>|<start_of_turn>model|<\|start_header_id\|>assistant|(?-i:\bASSISTANT: )",
)
_START = re.compile(r"\s*(?:<s>|<\|begin_of_text\|>)?\s*")


def found(text: str) -> list[Layout]:
    """The layouts whose marks are in the text, in order."""
    return [
        name
        for name, (opens, follows) in _SIGNS.items()
        if (mark := opens.search(text)) and follows.search(text, mark.end())
    ]


def common(texts: Iterable[str]) -> tuple[set[Layout], bool]:
    """All layouts that are in any of the texts, and whether some text has none."""
    seen: set[Layout] = set()
    plain = False
    for text in texts:
        names = found(text)
        seen.update(names)
        plain = plain or not names
    return seen, plain


def looks_like_turns(text: str) -> bool:
    """Whether a text in no known layout has marks of a question, and later of an answer, as many layouts have."""
    text = f"\n{text}"
    return (asked := _ASKED.search(text)) is not None and _ANSWERED.search(text, asked.end()) is not None


def conversation(text: str, layout: Layout, column: str) -> Conversation:
    """The turns of a text.

    Raises:
        RowError: `layout_mismatch`, the text is not, or not wholly, in this layout; `no_answer`.
    """
    turns = _READERS[layout](text)
    whole = f'Mend the row, or train the whole text of every row: mapping={{"text": "{{{column}}}"}}.'
    if not turns:
        message = f'The text is not in the layout "{layout}" that the first rows of the file have.'
        raise RowError(column, "layout_mismatch", message, whole)
    for one, other in itertools.pairwise(turns):
        if one["role"] == other["role"]:
            message = (
                f'In the layout "{layout}" the text has two turns of the {one["role"]} in a row, the second from '
                f"{json.dumps(other['content'][:40], ensure_ascii=False)} on: a mark of the layout may stand in a turn."
            )
            raise RowError(column, "layout_mismatch", message, whole)
    if not any(turn["role"] == "assistant" for turn in turns):
        message = f'The text is in the layout "{layout}", but has no answer, so there is nothing to learn.'
        raise RowError(column, "no_answer", message, "Add the answer, or leave the row out.")
    return Conversation(turns)


def _without_start(text: str) -> str:
    start = _START.match(text)
    return text[start.end() :] if start else text


def _without_end(text: str) -> str:
    text = text.rstrip()
    mark = next((mark for mark in _ENDS if text.endswith(mark)), "")
    return text.removesuffix(mark).rstrip()


def _content(text: str) -> str:
    """What a turn says: without the space or the line breaks that the layout has after its mark, but indented as it is."""
    border = _BORDER.match(text)
    return text[border.end() if border else 0 :].rstrip()


def _llama2(text: str) -> list[Turn]:
    before, *parts = _without_start(text).split("[INST]")
    if before.strip():
        return []
    turns: list[Turn] = []
    for i, part in enumerate(parts):
        question, mark, answer = part.partition("[/INST]")
        if not mark or "[/INST]" in answer:
            return []
        if i == 0 and question.lstrip().startswith("<<SYS>>") and "<</SYS>>" in question:
            system, _, question = question.lstrip().removeprefix("<<SYS>>").partition("<</SYS>>")
            turns.append(Turn(role="system", content=_content(system)))
        turns.append(Turn(role="user", content=_content(question)))
        answer = _content(answer.rstrip().removesuffix("<s>").rstrip().removesuffix("</s>"))
        if answer or i + 1 < len(parts):
            turns.append(Turn(role="assistant", content=answer))
    return turns


def _marked(text: str, roles: dict[str, str], *, line_start: bool) -> list[Turn]:
    """Turns that begin with a mark such as `### Name:`; what stands before the first is the system's."""
    text = _without_end(_without_start(text))
    pattern = f"{'^' if line_start else ''}###[ ]?({'|'.join(roles)}):"
    before, *parts = re.split(pattern, text, flags=re.MULTILINE)
    turns = [Turn(role="system", content=before.strip())] if before.strip() else []
    names = parts[::2]
    for i, raw in enumerate(parts[1::2]):
        content, role = _content(_without_end(raw)), roles[names[i]]
        if role == "input":
            if i == 0 or roles[names[i - 1]] != "user":
                return []
            turns[-1]["content"] += f"\n\n{content}" if content else ""
        elif content or role != "assistant" or i + 1 < len(names):
            turns.append(Turn(role=role, content=content))
    return turns if parts else []


def _alpaca(text: str) -> list[Turn]:
    roles = {"Instruction": "user", "Input": "input", "Response": "assistant", "System": "system"}
    return _marked(text, roles, line_start=True)


def _guanaco(text: str) -> list[Turn]:
    return _marked(text, {"Human": "user", "Assistant": "assistant"}, line_start=False)


def _chatml(text: str) -> list[Turn]:
    turns: list[Turn] = []
    pos = 0
    pattern = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\s*|\Z)", re.DOTALL)
    text = _without_end(_without_start(text)).removesuffix("<|im_start|>assistant")
    while match := pattern.match(text, pos):
        if match[1] not in ("system", "user", "assistant") or "<|im_start|>" in match[2]:
            return []
        turns.append(Turn(role=match[1], content=match[2]))
        pos = match.end()
    return turns if pos == len(text) else []


_READERS: dict[Layout, Callable[[str], list[Turn]]] = {
    "llama2": _llama2,
    "alpaca": _alpaca,
    "guanaco": _guanaco,
    "chatml": _chatml,
}
LAYOUTS: tuple[Layout, ...] = tuple(_READERS)
