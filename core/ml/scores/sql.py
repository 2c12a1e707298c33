"""Does a predicted SQL query give what the right one gives, on made-up rows of the tables in its prompt? No torch.

Prompts and predictions are untrusted text: tables are made in memory alone, a query may only read, and what a
value, a text or a query may cost is bounded. The bound on time counts SQLite's steps, not seconds, so that a
slow machine gives the same score.
"""

import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection
from itertools import count, islice

# Rows of a table: between these, or each query that counts all rows of one would be right.
_FEWEST_ROWS, _ROWS = 40, 60
# One filling may hide a difference by chance; this many with other rows hardly ever do.
_FILLINGS = 6
_STEPS = 2_000_000
_STEPS_PER_CALL = 1_000
_MOST_RESULT_ROWS = 10_000
# Values of columns that are joined: few enough to meet in two tables, and those of one are not those of another.
_JOINED = 12
_JOINED_HERE = 8

_MAKES = {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,  # of a primary key
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_REINDEX,
}
_READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_LONGEST = 5_000
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: _LONGEST,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
# What SQLite says no with. A Warning, which is no Error, is what several statements raise before Python 3.12;
# a ValueError is a NUL or half a surrogate pair in the text.
_REFUSALS = (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError)

# A name has a length, or texts without brackets would take the square of theirs.
_TABLE = re.compile(r"\bCREATE\s+TABLE\b[^();]{0,200}\(", re.IGNORECASE)
_BRACKET = re.compile(r"[()]")
_QUERY = re.compile(r"\s*(?:SELECT|WITH|VALUES)\b", re.IGNORECASE)
_FENCE = re.compile(r"```(?:sql)?[^\S\n]*\n(.*?)```", re.IGNORECASE | re.DOTALL)
_STRING = re.compile(r"'((?:[^']|'')*)'|\"([^\"]*)\"")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])")
# A comparison with a literal, or with some: IN (1, 2), BETWEEN 1 AND 2.
_COMPARES = r"(?:[<>=!]{1,2}|(?:NOT\s+)?(?:LIKE|IN\s*\(|BETWEEN))\s*"
_LITERAL = r"(?:'(?:[^']|'')*'|\"[^\"]*\"|\d+(?:\.\d+)?(?![\w.]))"
_LIST = rf"{_LITERAL}(?:\s*(?:,|AND)\s*{_LITERAL})*"
# The column NAME beside another one, or compared with what a query gives, or given by that.
_JOINS = (
    r"\bNAME\b\W*(?:=\s*[A-Za-z_]\w*\.\w|(?:NOT\s+)?IN\s*\(\s*SELECT\b)|=\s*\w+\.NAME\b"
    r"|\bIN\s*\(\s*SELECT\s+(?:DISTINCT\s+)?(?:\w+\.)?NAME\b"
)
_ORDERS = r"\bORDER\s+BY\b.*\bNAME\b|\b(?:MAX|MIN)\s*\(\s*(?:\w+\.)?NAME\b"
_NUMERIC_TYPE = re.compile(r"INT|REAL|FLOA|DOUB|NUM|DEC", re.IGNORECASE)
_ORDER_BY = re.compile(r"\bORDER\s+BY\b", re.IGNORECASE)

_Cell = str | int | float
_Row = tuple[object, ...]


def tables(text: str) -> list[str]:
    """The CREATE TABLE statements in a text, each up to the bracket that closes its columns."""
    ends: dict[int, int] = {}
    opened = []
    for bracket in _BRACKET.finditer(text):
        if bracket[0] == "(":
            opened.append(bracket.start())
        elif opened:
            ends[opened.pop()] = bracket.end()
    found, after = [], 0
    for match in _TABLE.finditer(text):
        end = ends.get(match.end() - 1)
        if end is not None and match.start() >= after:  # not one within another
            found.append(text[match.start() : end])
            after = end
    return found


def is_query(text: str) -> bool:
    return _QUERY.match(text) is not None


def same_results(prompt: str, expected: str, predicted: str) -> bool | None:
    """Whether `predicted` is one query with the results of `expected`; rows in any order unless that orders them.

    No value is NULL: what differs in that alone is taken for the same, such as count(*) and the count of a column.

    None: `expected` itself does not run on the tables of the prompt.
    """
    if len(expected) > _LONGEST:
        return None  # SQLite would say no, after it was looked through for literals
    made = tables(prompt)
    right, told = len(predicted) <= 2 * _LONGEST, False
    fenced = _FENCE.search(predicted) if right else None
    predicted = fenced[1] if fenced else predicted
    ordered = _ORDER_BY.search(_bare(expected)) is not None
    for filling in range(_FILLINGS):
        # Whether `expected` runs must not depend on the answer.
        compares = filling % 2 == 1
        if compares and not right:
            continue
        try:
            connection = _filled(made, expected, predicted if compares else "", filling)
        except _REFUSALS:
            if not compares:
                return None
            right = False
            continue
        try:
            wanted = _result(connection, expected)
            found = _result(connection, predicted) if right else None
        finally:
            connection.close()
        if wanted is None:
            if not compares:
                return None
            continue
        if found is None or (found != wanted if ordered else Counter(found) != Counter(wanted)):
            right = False
        told = told or _tells(wanted)
    # Where no filling gives any result, nothing but the same words says that a query is the right one.
    return right and (told or _plain(predicted) == _plain(expected))


def _tells(rows: list[_Row]) -> bool:
    return any(cell not in (None, 0) for row in rows for cell in row)


def _plain(sql: str) -> str:
    return " ".join(sql.rstrip("; \n").lower().split())


def _filled(statements: Collection[str], expected: str, predicted: str, filling: int) -> sqlite3.Connection:
    """The tables in memory, filled, and open for reading only.

    The rows hold the literals of `expected` and near misses of them in each column that could take them, so that a wrong
    condition, column or aggregate has another result; and those that `predicted` compares a column with, since a condition
    that is too much may leave all other rows, or none.
    """
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    connection.set_authorizer(_only(_MAKES))
    for statement in statements:
        connection.execute(statement)
    connection.set_authorizer(None)
    # A string as the seed: its hash is the same in every process, unlike hash().
    rng = random.Random(f"{sorted(statements)}\n{expected}\n{filling}")  # noqa: S311 - no secret
    for (table,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
    ).fetchall():
        found = connection.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
        columns = [_cells(str(c[1]), str(c[2]), bool(c[5]), expected, predicted, rng) for c in found]
        connection.executemany(
            f"INSERT OR IGNORE INTO {_quoted(table)} VALUES ({', '.join('?' * len(columns))})",  # noqa: S608
            islice(zip(*columns, strict=True), rng.randint(_FEWEST_ROWS, _ROWS)),
        )
    connection.set_authorizer(_only(_READS))
    return connection


def _cells(
    column: str, declared: str, key: bool, expected: str, predicted: str, rng: random.Random
) -> list[_Cell]:
    name, bare = re.escape(column), _bare(expected)
    numeric = _NUMERIC_TYPE.search(declared) is not None
    if key or re.search(_JOINS.replace("NAME", name), bare, re.IGNORECASE):
        every = rng.sample(range(1, _ROWS + 1), _ROWS)
        known = every if key else rng.choices([1 + n % _JOINED for n in every[:_JOINED_HERE]], k=_ROWS)
        # Digits in text columns too: the other side of a join may have the other type.
        return [n if numeric else str(n) for n in known]
    # Ties would leave the order of a result open, so an ordered column holds no value twice; nor does one whose largest
    # is asked for, which may be found by ordering.
    ordered = re.search(_ORDERS.replace("NAME", name), bare, re.IGNORECASE | re.DOTALL) is not None
    compared, predictions = _compared(name, expected), _compared(name, predicted)
    if numeric:
        numbers = _floats(compared) or _floats(_NUMBER.findall(bare))
        theirs = _floats(predictions)
        if "INT" in declared.upper():
            theirs = [number for number in theirs if number.is_integer()]
        return _numbers(numbers, theirs, not ordered, rng)
    texts = (compared or _literals(expected)) + predictions
    return _texts(column, texts[:_ROWS], ordered, rng)


def _floats(literals: list[str]) -> list[float]:
    return [float(literal) for literal in literals if _NUMBER.fullmatch(literal)]


def _compared(name: str, sql: str) -> list[str]:
    """The literals that a query compares a column with."""
    return [
        literal
        for match in re.finditer(rf"\b{name}\b\W*?{_COMPARES}({_LIST})", sql, re.IGNORECASE)
        for literal in _literals(match[1])
    ]


def _literals(sql: str) -> list[str]:
    texts = [(one or other).replace("''", "'") for one, other in _STRING.findall(sql)]
    return texts + _NUMBER.findall(_bare(sql))


def _numbers(literals: list[float], others: list[float], repeated: bool, rng: random.Random) -> list[_Cell]:
    """Values near the `literals`, near the `others` as far as there is room, and by chance."""
    every = [value + step for values in (literals, others) for value in values for step in (0, -1, 1)]
    near = list(dict.fromkeys(every))[:_ROWS]
    pool = {float(rng.randint(1, 3_000)) for _ in range(2 * _ROWS)}
    for value in literals + others:
        # Half of the other rows on each side of the literal, however large it is.
        reach = max(_ROWS, int(value))
        pool |= {float(int(value) + rng.randint(-reach, reach)) for _ in range(2 * _ROWS)}
    far = rng.sample(sorted(pool.difference(near)), _ROWS)
    cells = list(near)
    if repeated:
        again = near or far[: _ROWS // 4]
        cells += rng.choices(literals or again, k=_ROWS // 4) + rng.choices(again, k=_ROWS // 4)
    cells = (cells + far)[:_ROWS]
    rng.shuffle(cells)
    return [int(cell) if cell.is_integer() else cell for cell in cells]


def _texts(column: str, literals: list[str], ordered: bool, rng: random.Random) -> list[_Cell]:
    # Named by the column: no value of one text column is one of another by chance.
    if ordered:
        unique: list[_Cell] = [*dict.fromkeys(literals)]
        unique += [f"{column} {n}" for n in range(_ROWS - len(unique))]
        rng.shuffle(unique)
        return unique
    own = [f"{column} {n}" for n in range(4)]
    near = [text for literal in literals for text in (literal, f"{literal} II")]
    return [
        rng.choice(literals) if literals and rng.random() < 0.5 else rng.choice(own + near)
        for _ in range(_ROWS)
    ]


def _result(connection: sqlite3.Connection, sql: str) -> list[_Row] | None:
    """The rows of one query, or None when `sql` is anything else or takes too much."""
    calls = count(1)
    most = _STEPS // _STEPS_PER_CALL
    connection.set_progress_handler(lambda: next(calls) > most, _STEPS_PER_CALL)
    try:
        cursor = connection.execute(sql.strip())
        if cursor.description is None:
            return None
        rows: list[_Row] = cursor.fetchmany(_MOST_RESULT_ROWS + 1)
    except _REFUSALS:
        return None
    if len(rows) > _MOST_RESULT_ROWS:
        return None
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]


def _only(allowed: set[int]) -> Callable[..., int]:
    return lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


def _bare(sql: str) -> str:
    """A query without its texts."""
    return _STRING.sub("''", sql)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
