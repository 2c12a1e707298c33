"""A row as it was most likely meant: columns, keys and roles as they are called."""

import difflib
import itertools
from collections.abc import Iterable
from typing import Any

from core import strict_json
from core.ml.formats import tolerant
from core.ml.formats.chat.messages import MAX_MESSAGES, SHAREGPT_ROLES
from core.ml.formats.chat.rows import COLUMNS, Format

# How alike a word must be to be meant: a slip of one or two letters.
_ALIKE = 0.8
# Keys of one message, and characters of a name, that are looked at: no real one has more.
_KEYS_READ = 64
_NAME = 40
# The columns without which a row of a format cannot be read.
_NEEDED: dict[Format, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "alpaca": frozenset({"instruction", "output"}),
    "text": frozenset({"text"}),
    "mapping": frozenset(),
}
_KEYS = {"role": ("from", "speaker", "author"), "content": ("value", "text", "message")}


def row(values: dict[str, Any], kind: Format | None) -> dict[str, Any]:
    """The row with columns and roles as format `kind` calls them; None: as any format does."""
    known = COLUMNS[kind] if kind else frozenset().union(*COLUMNS.values())
    needed = _NEEDED[kind] if kind else frozenset().union(*_NEEDED.values())
    mended = _renamed(values, known, needed)
    for name in ("messages", "conversations"):
        cell = mended.get(name)
        if isinstance(cell, str) and isinstance(listed := tolerant.meant(cell, strict_json.DEPTH), list):
            mended[name] = listed  # pandas writes a list so
        if isinstance(mended.get(name), list) and len(mended[name]) <= MAX_MESSAGES:
            mended[name] = [_message(item, name) for item in mended[name]]
    return mended


def _renamed(values: dict[str, Any], known: frozenset[str], needed: frozenset[str]) -> dict[str, Any]:
    """Only what is needed is guessed: `systems` beside a prompt may well be no misspelt `system`."""
    spelt = {_plain(name): name for name in values if name not in known}
    called = {}
    for column in sorted(known - values.keys()):
        # `prompt_id` is no misspelt `prompt`: the longer the word, the more alike.
        near = _near(column, spelt, max(_ALIKE, 1 - 1 / len(column))) if column in needed else None
        if near is None and column in spelt:
            near = column
        if near is not None:
            called[spelt.pop(near)] = column
    return {called.get(name, name): value for name, value in values.items()}


def _message(item: Any, column: str) -> Any:
    if not isinstance(item, dict):
        return item
    role_key, content_key = (
        ("from", "value") if column == "conversations" and "from" in item else ("role", "content")
    )
    made = dict(item)
    for key, others in ((role_key, _KEYS["role"]), (content_key, _KEYS["content"])):
        if key not in made:
            spelt = {_plain(name): name for name in itertools.islice(made, _KEYS_READ)}
            other = next((name for name in others if name in spelt), None) or _near(key, spelt, _ALIKE)
            if other is not None:
                made[key] = made.pop(spelt[other])
    role = made.get(role_key)
    if isinstance(role, str):
        made[role_key] = _role(role, column)
    if isinstance(made.get(content_key), bool | int | float):
        made[content_key] = strict_json.dumps(made[content_key])
    return made


def _role(role: str, column: str) -> str:
    known = _plain(role)
    if known not in SHAREGPT_ROLES and known not in ("developer", "function"):
        known = _near(known, SHAREGPT_ROLES, _ALIKE) or role
    plain = SHAREGPT_ROLES.get(known, known)
    return known if column == "conversations" or plain == "call" else plain


def _plain(name: str) -> str:
    return name[:_NAME].strip().lower()


def _near(name: str, known: Iterable[str], alike: float) -> str | None:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=alike)
    return found[0] if found else None
