"""The corpus' good files as Graft reads them."""

import io
from functools import cache
from typing import Any

from core import strict_json
from core.ml.formats import validate
from core.ml.formats.chat.example import Example
from core.ml.formats.files.rows import Limits
from core.ml.formats.validate import Reading
from tests.corpus import chats, files, lines, tables
from tests.corpus.case import COLUMNS, DEPTH, LINE_BYTES, ROWS, UNPACKED_BYTES, Case, Good

LIMITS = Limits(line_bytes=LINE_BYTES, unpacked_bytes=UNPACKED_BYTES, rows=ROWS, columns=COLUMNS, depth=DEPTH)
GOOD = [
    case for case in files.CASES + lines.CASES + chats.CASES + tables.CASES if isinstance(case.expected, Good)
]


def examples(case: Case) -> list[Example]:
    file, form = io.BytesIO(case.content()), case.form
    mapping: Any = strict_json.loads(form["mapping"], depth=DEPTH) if "mapping" in form else None
    report = validate.inspect(file, kind=form.get("format", "auto"), mapping=mapping, limits=LIMITS)
    assert report.detection is not None
    file.seek(0)
    found = report.detection
    how = Reading(report.file_type, report.packed, found.format, found.mapping, LIMITS)
    return [example for _, example in validate.conversations(file, how)]


@cache
def first_examples() -> list[tuple[str, list[Example]]]:
    """(name, first examples) of each file."""
    return [(case.name, examples(case)[:3]) for case in GOOD]
