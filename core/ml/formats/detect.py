"""Which format a table has, how sure that is, and what else it could be."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from core.errors import BadRequest
from core.ml.formats.chat import layouts
from core.ml.formats.chat import mapping as mappings
from core.ml.formats.chat.example import RowError
from core.ml.formats.chat.mapping import Mapping
from core.ml.formats.chat.messages import OPENAI_ROLES
from core.ml.formats.chat.rows import Format, reader

# Rows that detection looks at, and how many characters of them.
SAMPLE = 100
SAMPLE_CHARS = 16 * 1024**2
# Columns that a message names, and characters of each.
_NAMES = 20
_NAME = 60
# A longer mapping is no example.
_EXAMPLE = 1000

_QUESTIONS = (
    "question",
    "query",
    "instruction",
    "input",
    "prompt",
    "user",
    "text",
    "source",
    "problem",
    "sentence",
)
_ANSWERS = (
    "answer",
    "chosen",
    "response",
    "output",
    "completion",
    "assistant",
    "target",
    "solution",
    "label",
    "category",
    "sql",
)
_FORM = {
    "messages": [
        {"role": "user", "content": "{COLUMN OF THE QUESTION}"},
        {"role": "assistant", "content": "{COLUMN OF THE ANSWER}"},
    ]
}
_ROLES_FORM = {"roles": {"NAME OF WHO ASKS": "user", "NAME OF WHO ANSWERS": "assistant"}}
# Columns that are no question and answer: a preference's, and those of a message that lost its list.
_PREFERENCE = {"chosen", "rejected", "preferred_output", "non_preferred_output"}
_NO_PAIR = {"id", "chosen", "rejected", "role", "content", "from", "value"}
_CONTEXTS = ("context", "passage", "document", "schema", "background", "input")


@dataclass(frozen=True)
class Detection:
    """`others` are formats that the columns fit too; `mapping` is how a text is read."""

    format: Format
    confidence: Literal["certain", "likely"]
    why: str
    others: list[str] = field(default_factory=list)
    mapping: Mapping | None = None

    def as_dict(self) -> dict[str, Any]:
        layout = self.mapping.get("layout") if self.mapping else None
        return {
            "format": self.format,
            "layout": layout,
            "confidence": self.confidence,
            "why": self.why,
            "alternatives": self.others,
        }


def detect(sample: Sequence[dict[str, Any]]) -> Detection:
    """The format of the first rows.

    Raises:
        BadRequest: `unknown_format` with a mapping to use, or `ambiguous_format` with the formats to choose from.
    """
    columns = list(dict.fromkeys(name for row in sample for name in row))
    # A column without any value is no sign of a format.
    filled = {name for row in sample for name, value in row.items() if value not in (None, "")}
    fitting = _fitting([name for name in columns if name in filled], sample) or _fitting(columns, sample)
    structured = [name for name in fitting if name != "text"]
    if len(structured) > 1:
        raise BadRequest(
            "ambiguous_format",
            f"The columns {listed(columns)} fit more than one format: {', '.join(structured)}.",
            param="format",
            hint=f'Say which: format="{structured[0]}" or format="{structured[1]}".',
        )
    if not fitting:
        raise BadRequest(
            "unknown_format",
            f"Columns {listed(columns) or 'none'} are no format that is read without a mapping.",
            param="mapping",
            hint=_mapping_hint(columns, sample),
        )
    found = fitting[0]
    if found == "text":
        return text(sample)
    others = fitting[1:]
    return Detection(found, "likely" if others else "certain", f"Columns {listed(columns)}.", list(others))


def text(sample: Sequence[dict[str, Any]]) -> Detection:
    """How a text column is read: as conversations in a known layout, or as it stands.

    Raises:
        BadRequest: `ambiguous_format`, when rows have several layouts, or some of them none.
    """
    texts = [row["text"] for row in sample if isinstance(row.get("text"), str)]
    seen, plain = layouts.common(texts)
    if not seen:
        why = "A text column without any known layout: the whole text is trained."
        if not any(map(layouts.looks_like_turns, texts)):
            return Detection("text", "certain", why, [], {"text": "{text}"})
        why = "A text column that looks like questions and answers, but in no known layout: all of it is trained."
        return Detection("text", "likely", why, ["questions and answers"], {"text": "{text}"})
    if len(seen) > 1 or plain:
        names = " and ".join(sorted(seen)) + (" and no layout" if plain else "")
        options = [{"text": "{text}", "layout": name} for name in sorted(seen)] + [{"text": "{text}"}]
        raise BadRequest(
            "ambiguous_format",
            f"The texts of the first {len(sample)} rows are in different layouts: {names}.",
            param="mapping",
            hint=f"Say in the mapping how to read them, for example {' or '.join(map(json.dumps, options))} (all of it).",
        )
    layout = next(iter(seen))
    why = f'A text column in the layout "{layout}": it is read as conversations, and only the answers are trained.'
    return Detection("text", "certain", why, ["text without layout"], {"text": "{text}", "layout": layout})


def _fitting(columns: list[str], sample: Sequence[dict[str, Any]]) -> list[Format]:
    names = set(columns)
    fitting: list[Format] = []
    if "messages" in names:
        fitting.append("messages")
    if "conversations" in names:
        fitting.append("sharegpt")
    if {"prompt", "completion"} <= names:
        fitting.append("prompt_completion")
    if {"instruction", "output"} <= names:
        fitting.append("alpaca")
    if "text" in names and (len(names) == 1 or fitting or not _other_part(columns, sample)):
        fitting.append("text")
    return fitting


def _other_part(columns: list[str], sample: Sequence[dict[str, Any]]) -> bool:
    """Whether a column beside `text` may be its answer: then nobody said that the text alone is meant."""
    return any(name != "text" and any(isinstance(row.get(name), str) for row in sample) for name in columns)


def listed(columns: Sequence[str]) -> str:
    """The names of columns in a message: of many or endless ones the beginning."""
    names = ", ".join(name if len(name) <= _NAME else f"{name[:_NAME]}…" for name in columns[:_NAMES])
    return f"{names} and {len(columns) - _NAMES} more" if len(columns) > _NAMES else names


def _mapping_hint(columns: Sequence[str], sample: Sequence[dict[str, Any]]) -> str:
    made = suggest(columns, sample)
    lists = [name for name in columns if any(_objects(row.get(name)) for row in sample)]
    if made is None and lists:
        name = lists[0][:_NAME]
        form = {"messages": name, "role": "KEY OF THE SPEAKER", "content": "KEY OF THE TEXT"} | _ROLES_FORM
        return (
            f'If "{name}" holds the rows of the file, upload that list alone. If it holds messages, say in a mapping '
            f"how they are written, in this form: {json.dumps(form, ensure_ascii=False)}"
        )
    hint = "Say in a mapping which columns play which part"
    example = json.dumps(made or _FORM, ensure_ascii=False)
    return f"{hint}, for example {example}" if len(example) <= _EXAMPLE else f"{hint}."


def suggest(columns: Sequence[str], sample: Sequence[dict[str, Any]]) -> Mapping | None:
    """A mapping that most likely fits, and reads some of these rows; None where the columns do not say the answer."""
    # A preference's lists of messages are one answer each, without the question.
    for name in () if len(_PREFERENCE.intersection(columns)) > 1 else columns:
        items = next((row[name] for row in sample if _objects(row.get(name))), None)
        if items and (made := _readable(_list_mapping(name, items), columns, sample)):
            return made
    return _readable(_table_mapping(columns, sample), columns, sample)


def _objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _readable(
    made: Mapping | None, columns: Sequence[str], sample: Sequence[dict[str, Any]]
) -> Mapping | None:
    """The mapping, if it reads any row: nobody is told to use one that is refused."""
    if made is None:
        return None
    try:
        mappings.check(made, columns)
    except BadRequest:
        return None
    read = reader("mapping", made)
    for row in sample:
        try:
            read(row)
        except RowError:
            continue
        return made
    return None


def _table_mapping(columns: Sequence[str], sample: Sequence[dict[str, Any]]) -> Mapping | None:
    lower = {name.lower(): name for name in reversed(columns)}
    answer = next((lower[name] for name in _ANSWERS if name in lower), None)
    if columns and (len(columns) == 1 or (answer is None and "text" in lower)):
        return {"text": f"{{{lower.get('text', columns[0])}}}"}
    if answer is None and len(columns) == 2 and not _NO_PAIR & lower.keys():
        answer = columns[1]  # a table of two: first what is asked, then what is answered
    if answer is None:
        return None
    texts = [
        name
        for name in columns
        if name not in (answer, "system") and any(isinstance(row.get(name), str) for row in sample)
    ]
    question = next((lower[name] for name in _QUESTIONS if name in lower and lower[name] != answer), None)
    context = next((lower[n] for n in _CONTEXTS if n in lower and lower[n] not in (answer, question)), None)
    asked = [name for name in (context, question) if name] if question else texts
    if not asked:
        return None
    turns = [
        {"role": "user", "content": "\n\n".join(f"{{{name}}}" for name in asked)},
        {"role": "assistant", "content": f"{{{answer}}}"},
    ]
    if any(row.get("system") for row in sample):
        turns.insert(0, {"role": "system", "content": "{system}"})
    return {"messages": turns}


def _list_mapping(column: str, items: list[Any]) -> Mapping:
    keys = list(items[0])
    role = next((key for key in ("role", "from", "speaker", "author") if key in keys), "role")
    content = next((key for key in ("content", "value", "text", "message") if key in keys), "content")
    names = list(dict.fromkeys(str(item.get(role)) for item in items if isinstance(item, dict)))
    roles = {
        "human": "user",
        "gpt": "assistant",
        "customer": "user",
        "agent": "assistant",
        "bot": "assistant",
    }
    if len(names) == 2 and not roles.keys() & names and not OPENAI_ROLES.keys() & names:
        roles = dict(zip(names, ("user", "assistant"), strict=True))  # two speakers: the first asks
    made: Mapping = {"messages": column, "role": role, "content": content}
    if used := {name: roles[name] for name in sorted(names) if name in roles}:
        made["roles"] = used
    return made
