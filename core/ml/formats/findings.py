"""What is worth knowing of rows that can be read: counted as they pass by, in bounded memory."""

import json
import re
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.ml.formats.chat import layouts
from core.ml.formats.chat.example import Conversation, Example

LISTED = 10
# A row of so many characters is more than most models read.
LONG = 32_000
# Longer "words" are sentences of scripts without spaces.
_WORD = 40
# What chat templates of known families write between turns.
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|end_of_text|begin_of_text|start_header_id|end_header_id|eot_id|eom_id"
    r"|system|user|assistant|end|tool_call|tool_response|channel|message|start|return)\|>"
    r"|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<\uff5c[^\uff5c<>]{1,30}\uff5c>"
)
# Rows are kept as four numbers each: hash of the row, hash of its prompt, line, characters.
_FIELDS = 4
_FLUSH_ROWS = 65_536
_AT_ONCE = 500_000
# Names of fields that are not read: more are counted together.
_NAMES = 50
_OTHER_NAMES = "…"

_CONTENT, _ROLE = itemgetter("content"), itemgetter("role")

_MESSAGES = {
    "duplicates": "Rows that repeat an earlier row: {count}.",
    "conflicting_answers": "Rows that give another answer to a prompt that was there before: {count}.",
    "in_both_files": "Rows that are also in the other data set: {count}. A validation with them proves nothing.",
    "empty_answers": "Rows with an empty answer: {count}. They teach to say nothing.",
    "one_word_answers": "Rows with an answer of one word: {count}. That is right for labels only.",
    "ends_with_user": "Rows that end with a turn that is not the assistant's: {count}. "
    "What follows the last answer is not trained.",
    "unanswered_calls": "Rows that go on after tool calls without their results: {count}.",
    "speaker_names": "Rows with names of speakers: {count}. Most chat templates leave these names out.",
    "looks_like_turns": "Texts that look like questions and answers in no known layout: {count}. "
    "All of each text is trained, the questions too. To train the answers alone, write the rows as messages.",
    "control_tokens": "Rows with control tokens of chat templates in their text: {count}. "
    "They stay text and begin no turn.",
    "very_long_rows": f"Rows of more than {LONG} characters: {{count}}. See training.overlength.",
    "single_row": "The file has one row only.",
}


@dataclass
class Counted:
    """How often something was met, and the first lines."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < LISTED:
            self.lines.append(line)


_Numbers = NDArray[np.int64]


class Findings:
    """Fed with every good row; `warnings` and `length` at the end."""

    def __init__(self) -> None:
        self.rows = 0
        self.duplicates = 0
        self.counted: dict[str, Counted] = {}
        self._recent = array("q")
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object

    def add(self, line: int, example: Example) -> None:
        self.rows += 1
        if isinstance(example, str):
            text, row = example, hash(example)
            prompt, size = row, len(text)
            if layouts.looks_like_turns(text):
                self.note("looks_like_turns", line)
        else:
            text, row, prompt = self._conversation(line, example)
            size = len(text) - len(example.turns) + 1  # without the line breaks between turns
        if size > LONG:
            self.note("very_long_rows", line)
        if ("<" in text or "[" in text) and _CONTROL.search(text):
            self.note("control_tokens", line)
        self._recent.extend((row, prompt, line, size))
        if len(self._recent) >= _FLUSH_ROWS * _FIELDS:
            self._flush()

    def note(self, code: str, line: int) -> None:
        self.counted.setdefault(code, Counted()).add(line)

    def _conversation(self, line: int, example: Conversation) -> tuple[str, int, int]:
        """The whole text, and the hashes of the row and of what comes before its last answer."""
        turns, tools = example.turns, ""
        contents = list(map(_CONTENT, turns))
        roles = list(map(_ROLE, turns))
        if example.tools or max(map(len, turns)) > 2:
            contents = [turn["content"] + _calls(turn) for turn in turns]
            if any("tool_calls" in turns[i] and role != "tool" for i, role in enumerate(roles[1:])):
                self.note("unanswered_calls", line)
            if any("name" in turn and turn["role"] != "tool" for turn in turns):
                self.note("speaker_names", line)
            tools = json.dumps(example.tools, sort_keys=True)
        last, short = 0, None
        for i, role in enumerate(roles):
            if role == "assistant":
                last = i
                if short != "empty_answers" and i not in example.untrained:
                    short = _short(contents[i]) or short
        if last + 1 < len(turns):
            self.note("ends_with_user", line)
        if short is not None:
            self.note(short, line)
        prompt = hash((tools, *roles[:last], *contents[:last]))
        row = hash((prompt, *roles[last:], *contents[last:]))
        # Without a prompt there is none that could be answered in two ways.
        return "\n".join(contents), row, prompt if last else row

    def unread(self, line: int, name: str) -> None:
        code = f"unread_field:{name[:60]}"
        if code not in self.counted and len(self.counted) >= _NAMES:
            code = f"unread_field:{_OTHER_NAMES}"
        self.note(code, line)

    def warnings(self, other: "Findings | None" = None) -> list[dict[str, Any]]:
        """Each kind once, with its count and first lines."""
        self._flush()
        repeated = self._repeated(0)
        self.duplicates = self._note_rows("duplicates", repeated)
        self._note_rows("conflicting_answers", self._repeated(1) & ~repeated)
        if other is not None:
            self._note_rows("in_both_files", self._shared(other))
        if self.rows == 1:
            self._note_rows("single_row", np.ones(1, np.bool_))
        return [
            {
                "code": code.split(":")[0],
                "message": _message(code, found),
                "count": found.count,
                "lines": found.lines,
            }
            for code, found in self.counted.items()
        ]

    def length(self) -> dict[str, int]:
        """Characters of a row."""
        self._flush()
        lengths = np.concatenate(
            [part[:, 3].astype(np.int32) for part in self._parts()] or [np.zeros(1, np.int32)]
        )
        p50, p95 = np.percentile(lengths, (50, 95), method="lower")
        return {"p50": int(p50), "p95": int(p95), "max": int(lengths.max())}

    def _flush(self) -> None:
        self._file.seek(0, 2)
        self._recent.tofile(self._file)
        del self._recent[:]

    def _parts(self) -> Iterator[_Numbers]:
        self._file.seek(0)
        while part := self._file.read(_FLUSH_ROWS * _FIELDS * 8):
            yield np.frombuffer(part, dtype=np.int64).reshape(-1, _FIELDS)

    def _keys(self, column: int, groups: int, group: int) -> Iterator[tuple[_Numbers, _Numbers]]:
        """(places, keys) of the rows whose key belongs to the group, about a million at a time."""
        places, keys = [], []
        count = start = 0
        for part in self._parts():
            mine = np.flatnonzero(part[:, column] % groups == group)
            places.append(mine + start)
            keys.append(part[mine, column])
            start, count = start + len(part), count + len(mine)
            if count >= _AT_ONCE:
                yield np.concatenate(places), np.concatenate(keys)
                places, keys, count = [], [], 0
        if count:
            yield np.concatenate(places), np.concatenate(keys)

    def _repeated(self, column: int) -> NDArray[np.bool_]:
        """Of every row in order, whether its key was there before."""
        again = np.ones(self.rows, np.bool_)
        groups = self.rows // _AT_ONCE + 1
        for group in range(groups):
            seen = np.zeros(0, np.int64)
            for places, keys in self._keys(column, groups, group):
                different, first = np.unique(keys, return_index=True)
                fresh = np.isin(different, seen, assume_unique=True, invert=True)
                again[places[first[fresh]]] = False
                seen = np.concatenate([seen, different[fresh]])
        return again

    def _shared(self, other: "Findings") -> NDArray[np.bool_]:
        """Of every row in order, whether it is in the other file too."""
        other._flush()
        shared = np.zeros(self.rows, np.bool_)
        groups = max(self.rows, other.rows) // _AT_ONCE + 1
        for group in range(groups):
            for _, theirs in other._keys(0, groups, group):
                known = np.unique(theirs)
                for places, keys in self._keys(0, groups, group):
                    shared[places[np.isin(keys, known)]] = True
        return shared

    def _note_rows(self, code: str, which: NDArray[np.bool_]) -> int:
        """Note these rows, of which there may be none; how many there are."""
        count = int(which.sum())
        lines: list[int] = []
        start = 0
        for part in self._parts():
            if len(lines) >= min(count, LISTED):
                break
            lines += part[which[start : start + len(part)], 2].tolist()
            start += len(part)
        if count:
            self.counted[code] = Counted(count, lines[:LISTED])
        return count


def _short(answer: str) -> str | None:
    words = answer.split(None, 1)
    if not words:
        return "empty_answers"
    return "one_word_answers" if len(words) == 1 and len(words[0]) <= _WORD else None


def _calls(turn: Any) -> str:
    calls = [call["function"] for call in turn.get("tool_calls", ())]
    return json.dumps(calls, sort_keys=True) if calls else ""


def _message(code: str, found: Counted) -> str:
    kind, _, name = code.partition(":")
    if name == _OTHER_NAMES:
        return "Further fields are not read: nothing of them is trained."
    if kind == "unread_field":
        return f'"{name}" is not read: nothing of it is trained.'
    return _MESSAGES[kind].format(count=found.count)
