"""Does a predicted SQL answer give what the right one gives on made-up rows of its table?"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from itertools import count

ROWS = 60
# One table may hide a difference by chance; this many with other rows hardly ever do.
FILLINGS = 6
STEPS = 200_000
MOST_RESULT_ROWS = 2_000
STEPS_PER_CALL = 1_000

READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
# A prediction is untrusted text, so what one value, text or pattern may cost is bounded too.
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 5_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}

STRING = re.compile(r"'((?:[^']|'')*)'")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])")
NUMERIC_TYPE = re.compile(r"INT|REAL|FLOA|DOUB|NUM|DEC", re.IGNORECASE)
ORDER_BY = re.compile(r"\bORDER\s+BY\b", re.IGNORECASE)

Cell = str | int | float
Row = tuple[object, ...]


def build(context: str, gold: str = "", filling: int = 0) -> sqlite3.Connection:
    """The tables of `context` in memory, filled, and open for reading only.

    The rows hold the literals of `gold` and near misses of them in each column that could take
    them, so that a wrong condition, column or aggregate has another result.
    """
    connection = sqlite3.connect(":memory:")
    connection.executescript(context)
    tables = [str(r[0]) for r in connection.execute("SELECT name FROM sqlite_master ORDER BY name")]
    # A string as the seed: its hash is the same in every process, unlike hash().
    rng = random.Random(f"{context}\n{gold}\n{filling}")
    for table in tables:
        name = _quoted(table)
        found = connection.execute(f"PRAGMA table_info({name})").fetchall()
        columns = [_cells(str(c[1]), str(c[2]), gold, rng) for c in found]
        marks = ", ".join("?" * len(columns))
        rows = zip(*columns, strict=True)
        connection.executemany(f"INSERT OR IGNORE INTO {name} VALUES ({marks})", rows)
    connection.commit()
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    connection.set_authorizer(_only_reads)
    return connection


def score(context: str, gold: str, predicted: str) -> bool:
    """Whether `predicted`, as it stands, is one query with the results of `gold`.

    Rows count in any order unless `gold` orders them. A `gold` that does not run is a ValueError.
    """
    ordered = ORDER_BY.search(STRING.sub("''", gold)) is not None
    for filling in range(FILLINGS):
        connection = build(context, gold, filling)
        try:
            expected = _result(connection, gold)
            if expected is None:
                raise ValueError(f"the gold SQL does not run on its context: {gold}")
            found = _result(connection, predicted)
        finally:
            connection.close()
        if found is None:
            return False
        if found != expected if ordered else Counter(found) != Counter(expected):
            return False
    return True


def _cells(column: str, declared: str, gold: str, rng: random.Random) -> list[Cell]:
    name = re.escape(column)
    bare = STRING.sub("''", gold)
    # Ties would leave the order of a result open, so an ordered column holds no value twice.
    ordered = re.search(rf"\bORDER\s+BY\b.*\b{name}\b", bare, re.IGNORECASE) is not None
    compared = re.search(rf"\b{name}\W*(?:[<>=!]|BETWEEN|IN\b|NOT\b)", bare, re.IGNORECASE)
    repeated = compared is not None and not ordered
    if NUMERIC_TYPE.search(declared):
        return _numbers([float(n) for n in NUMBER.findall(bare)], repeated, rng)
    literals = [text.replace("''", "'") for text in STRING.findall(gold)]
    return _texts(column, literals, ordered, rng)


def _numbers(literals: list[float], repeated: bool, rng: random.Random) -> list[Cell]:
    near = {value + step for value in literals for step in (-1, 0, 1)}
    pool = {float(rng.randint(1, 3_000)) for _ in range(2 * ROWS)}
    for value in literals:
        # Half of the other rows on each side of the literal, however large it is.
        reach = max(ROWS, int(value))
        pool |= {float(int(value) + rng.randint(-reach, reach)) for _ in range(2 * ROWS)}
    others = rng.sample(sorted(pool - near), ROWS)
    cells = sorted(near)[:ROWS]
    if repeated:
        cells += [rng.choice(sorted(near)) for _ in range(ROWS // 2)] if near else []
    cells = (cells + others)[:ROWS]
    rng.shuffle(cells)
    return [int(cell) if cell.is_integer() else cell for cell in cells]


def _texts(column: str, literals: list[str], ordered: bool, rng: random.Random) -> list[Cell]:
    # Named by the column: no value of one text column is one of another by chance.
    if ordered:
        unique: list[Cell] = [*literals, *(f"{column} {n}" for n in range(ROWS - len(literals)))]
        rng.shuffle(unique)
        return unique
    own = [f"{column} {n}" for n in range(4)]
    near = [text for literal in literals for text in (literal, f"{literal} II")]
    return [
        rng.choice(literals) if literals and rng.random() < 0.5 else rng.choice(own + near)
        for _ in range(ROWS)
    ]


def _result(connection: sqlite3.Connection, sql: str) -> list[Row] | None:
    """The rows of one query, or None when `sql` is anything else or takes too much."""
    calls = count(1)
    most = STEPS // STEPS_PER_CALL
    connection.set_progress_handler(lambda: next(calls) > most, STEPS_PER_CALL)
    try:
        cursor = connection.execute(sql.strip())
        if cursor.description is None:
            return None
        rows: list[Row] = cursor.fetchmany(MOST_RESULT_ROWS + 1)
    # A Warning, which is no Error, is what several statements raise before Python 3.12; a
    # ValueError is a NUL or half a surrogate pair in the text.
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None
    if len(rows) > MOST_RESULT_ROWS:
        return None
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]


def _only_reads(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in READS else sqlite3.SQLITE_DENY


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
