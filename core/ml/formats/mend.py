"""A row as it was most likely meant: columns, keys and roles as they are called."""

import difflib
from typing import Any

from core import strict_json
from core.errors import nearest
from core.ml.formats.chat.messages import SHAREGPT_ROLES
from core.ml.formats.chat.rows import COLUMNS

# How alike a column's name must be to be meant.
_ALIKE = 0.8
_COLUMNS = frozenset().union(*COLUMNS.values())
_KEYS = {"role": ("from", "speaker", "author"), "content": ("value", "text", "message")}


def row(values: dict[str, Any], *, rename: bool) -> dict[str, Any]:
    """The row with columns and roles as they are called; a mapping names the columns itself."""
    mended = {}
    for name, value in values.items():
        near = difflib.get_close_matches(name[:40].strip().lower(), _COLUMNS, n=1, cutoff=_ALIKE)
        new = near[0] if rename and near and name not in _COLUMNS else name
        mended[name if new in values or new in mended else new] = value
    for name in ("messages", "conversations"):
        if isinstance(mended.get(name), list):
            mended[name] = [_message(item, name) for item in mended[name]]
    return mended


def _message(item: Any, column: str) -> Any:
    if not isinstance(item, dict):
        return item
    role_key, content_key = (
        ("from", "value") if column == "conversations" and "from" in item else ("role", "content")
    )
    made = dict(item)
    for key, others in ((role_key, _KEYS["role"]), (content_key, _KEYS["content"])):
        if key not in made:
            other = next((name for name in others if name in made), None) or nearest(key, made)
            if other is not None:
                made[key] = made.pop(other)
    role = made.get(role_key)
    if isinstance(role, str):
        made[role_key] = _role(role, column)
    if isinstance(made.get(content_key), bool | int | float):
        made[content_key] = strict_json.dumps(made[content_key])
    return made


def _role(role: str, column: str) -> str:
    known = role.strip().lower()
    if known not in SHAREGPT_ROLES and known != "developer":
        known = nearest(known[:40], SHAREGPT_ROLES) or role
    plain = SHAREGPT_ROLES.get(known, known)
    return known if column == "conversations" or plain == "call" else plain
