"""Texts that were written in a published layout, back to the conversation they were made of.

Only then can the answer alone be trained, and no markers are written twice: `<s>[INST] q [/INST] a </s>`
(Llama 2), `### Instruction: q ### Response: a` (Alpaca), `### Human: q### Assistant: a` (Guanaco) and
`<|im_start|>user q<|im_end|>` (ChatML).
"""

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


def conversation(text: str, layout: Layout, column: str) -> Conversation:
    """The turns of a text.

    Raises:
        RowError: `layout_mismatch`, the text is not, or not wholly, in this layout.
    """
    turns = _READERS[layout](text)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(
            column,
            "layout_mismatch",
            f'The text is not in the layout "{layout}" that the first rows of the file have.',
            f'Mend the row, or train the whole text of every row: mapping={{"text": "{{{column}}}"}}.',
        )
    return Conversation(turns)


def _without_start(text: str) -> str:
    start = _START.match(text)
    return text[start.end() :] if start else text


def _without_end(text: str) -> str:
    text = text.rstrip()
    mark = next((mark for mark in _ENDS if text.endswith(mark)), "")
    return text.removesuffix(mark).rstrip()


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
            turns.append(Turn(role="system", content=system.strip()))
        turns.append(Turn(role="user", content=question.strip()))
        answer = answer.rstrip().removesuffix("<s>").rstrip().removesuffix("</s>").strip()
        if answer or i + 1 < len(parts):
            turns.append(Turn(role="assistant", content=answer))
    return turns


def _marked(text: str, mark: str, roles: dict[str, str], *, line_start: bool) -> list[Turn]:
    """Turns that begin with a mark such as `### Name:`; what stands before the first is the system's."""
    text = _without_end(_without_start(text))
    pattern = f"{'^' if line_start else ''}{mark}({'|'.join(roles)}):[ \t]*"
    before, *parts = re.split(pattern, text, flags=re.MULTILINE)
    turns = [Turn(role="system", content=before.strip())] if before.strip() else []
    for name, raw in zip(parts[::2], parts[1::2], strict=True):
        content = _without_end(raw).strip()
        role = roles[name]
        if role == "input":
            if not turns or turns[-1]["role"] != "user":
                return []
            turns[-1]["content"] += f"\n\n{content}" if content else ""
        elif content or role == "user":
            turns.append(Turn(role=role, content=content))
    return turns


def _alpaca(text: str) -> list[Turn]:
    roles = {"Instruction": "user", "Input": "input", "Response": "assistant", "System": "system"}
    return _marked(text, "###[ ]?", roles, line_start=True)


def _guanaco(text: str) -> list[Turn]:
    return _marked(text, "###[ ]?", {"Human": "user", "Assistant": "assistant"}, line_start=False)


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
