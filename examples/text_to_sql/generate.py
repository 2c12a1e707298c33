"""Write train.jsonl and valid.jsonl from schemas.json; `--check` only compares them.

The same schemas, seed and counts give the same bytes. A schema is in one of the two files only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SEED = 20
ROWS_PER_SCHEMA = {"train": 22, "valid": 6}


class Column(NamedTuple):
    name: str
    # name: identifies a row; text: a category; count, measure, level, year: numbers that are
    # spoken of in different ways, of which a level or a year is never summed
    kind: str
    values: list[Any]


class Schema(NamedTuple):
    table: str
    columns: list[Column]

    def of(self, *kinds: str) -> list[Column]:
        return [c for c in self.columns if c.kind in kinds]

    @property
    def key(self) -> Column:
        return self.of("name")[0]

    @property
    def context(self) -> str:
        types = {"name": "TEXT", "text": "TEXT"}
        columns = ", ".join(f"{c.name} {types.get(c.kind, 'INT')}" for c in self.columns)
        return f"CREATE TABLE {self.table} ({columns})"


NUMBERS = ("count", "measure", "level", "year")
Pair = tuple[str, str]


class Words(NamedTuple):
    over: list[str]
    under: list[str]
    most: list[str]
    least: list[str]
    order: tuple[str, str]
    asked: str


# How each kind of number is asked for, compared and ranked; {c} is the column, {v} the value.
MEASURE = Words(
    over=["with {c} above {v}", "with {c} greater than {v}", "whose {c} is over {v}"],
    under=["with {c} below {v}", "with {c} less than {v}", "whose {c} is under {v}"],
    most=["highest {c}", "largest {c}"],
    least=["lowest {c}", "smallest {c}"],
    order=("lowest first", "highest first"),
    asked="{c}",
)
WORDS = {
    "count": Words(
        over=["with more than {v} {c}", "that have more than {v} {c}", "with over {v} {c}"],
        under=["with fewer than {v} {c}", "that have fewer than {v} {c}", "with under {v} {c}"],
        most=["most {c}", "highest number of {c}"],
        least=["fewest {c}", "lowest number of {c}"],
        order=("lowest first", "highest first"),
        asked="number of {c}",
    ),
    "measure": MEASURE,
    "level": MEASURE,
    "year": Words(
        over=["with {c} after {v}", "whose {c} is after {v}"],
        under=["with {c} before {v}", "whose {c} is before {v}"],
        most=["latest {c}"],
        least=["earliest {c}"],
        order=("earliest first", "latest first"),
        asked="{c}",
    ),
}
# Kinds that may be added up; a mean of years says nothing either.
SUMMED = ("count", "measure")
AVERAGED = ("count", "measure", "level")


def sql_value(value: str | int) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def text_condition(schema: Schema, rng: random.Random) -> Pair:
    column = rng.choice(schema.of("text"))
    value = rng.choice(column.values)
    if rng.random() < 0.15:
        return f"whose {column.name} is not {value}", f"{column.name} <> {sql_value(value)}"
    words = rng.choice(["with {c} {v}", "whose {c} is {v}", "where the {c} is {v}"])
    return words.format(c=column.name, v=value), f"{column.name} = {sql_value(value)}"


def number_condition(schema: Schema, rng: random.Random) -> Pair:
    column = rng.choice(schema.of(*NUMBERS))
    words = WORDS[column.kind]
    phrases, sign = rng.choice([(words.over, ">"), (words.under, "<")])
    value = rng.choice(column.values)
    phrase = rng.choice(phrases).format(c=column.name, v=value)
    return phrase, f"{column.name} {sign} {value}"


def condition(schema: Schema, rng: random.Random) -> Pair:
    if schema.of("text") and rng.random() < 0.5:
        return text_condition(schema, rng)
    return number_condition(schema, rng)


def lookup(schema: Schema, rng: random.Random) -> Pair:
    key, column = schema.key, rng.choice(schema.of("text", *NUMBERS))
    value = rng.choice(key.values)
    asked = WORDS[column.kind].asked.format(c=column.name) if column.kind in WORDS else column.name
    words = rng.choice(["What is the {c} of {v}?", "Show the {c} of {v}.", "Find the {c} of {v}."])
    return (
        words.format(c=asked, v=value),
        f"SELECT {column.name} FROM {schema.table} WHERE {key.name} = {sql_value(value)}",
    )


def one_condition(schema: Schema, rng: random.Random) -> Pair:
    phrase, where = condition(schema, rng)
    words = rng.choice(["Show the {k} of {t} {p}.", "List the {k} of all {t} {p}."])
    return (
        words.format(k=schema.key.name, t=schema.table, p=phrase),
        f"SELECT {schema.key.name} FROM {schema.table} WHERE {where}",
    )


def two_conditions(schema: Schema, rng: random.Random) -> Pair:
    first, where_first = text_condition(schema, rng)
    second, where_second = number_condition(schema, rng)
    words = rng.choice(["Show the {k} of {t} {a} and {b}.", "List the {k} of all {t} {a} and {b}."])
    return (
        words.format(k=schema.key.name, t=schema.table, a=first, b=second),
        f"SELECT {schema.key.name} FROM {schema.table} WHERE {where_first} AND {where_second}",
    )


def two_columns(schema: Schema, rng: random.Random) -> Pair:
    phrase, where = condition(schema, rng)
    # A column that the condition fixes is not worth showing.
    shown = [c for c in schema.of("text", *NUMBERS) if f"{c.name} = " not in where]
    column = rng.choice(shown)
    return (
        f"Show the {schema.key.name} and {column.name} of {schema.table} {phrase}.",
        f"SELECT {schema.key.name}, {column.name} FROM {schema.table} WHERE {where}",
    )


def count_all(schema: Schema, rng: random.Random) -> Pair:
    words = rng.choice(["How many {t} are there?", "Count all {t}.", "How many {t} do we have?"])
    return words.format(t=schema.table), f"SELECT COUNT(*) FROM {schema.table}"


def count_some(schema: Schema, rng: random.Random) -> Pair:
    phrase, where = condition(schema, rng)
    words = rng.choice(["How many {t} are there {p}?", "Count the {t} {p}."])
    return (
        words.format(t=schema.table, p=phrase),
        f"SELECT COUNT(*) FROM {schema.table} WHERE {where}",
    )


def aggregate(schema: Schema, rng: random.Random) -> Pair:
    column = rng.choice(schema.of(*NUMBERS))
    asked = WORDS[column.kind].asked.format(c=column.name)
    # Not "most pages", which asks for a row.
    high, low = ("latest", "earliest") if column.kind == "year" else ("highest", "lowest")
    choices = [("MAX", high), ("MIN", low)]
    if column.kind in AVERAGED:
        choices.append(("AVG", rng.choice(["average", "mean"])))
    if column.kind in SUMMED:
        choices.append(("SUM", "total"))
    function, called = rng.choice(choices)
    phrase, where = "", ""
    if schema.of("text") and rng.random() < 0.5:
        phrase, where = text_condition(schema, rng)
        phrase, where = f" {phrase}", f" WHERE {where}"
    sentence = rng.choice(["What is the {a} of all {t}{p}?", "Find the {a} of {t}{p}."])
    return (
        sentence.format(a=f"{called} {asked}", t=schema.table, p=phrase),
        f"SELECT {function}({column.name}) FROM {schema.table}{where}",
    )


def top(schema: Schema, rng: random.Random) -> Pair:
    column = rng.choice(schema.of(*NUMBERS))
    words = WORDS[column.kind]
    phrases, direction = rng.choice([(words.most, " DESC"), (words.least, "")])
    extreme = rng.choice(phrases).format(c=column.name)
    limit = rng.choice([1, 1, 2, 3, 5])
    key, table = schema.key.name, schema.table
    question = f"{rng.choice(['Which', 'What'])} {key} has the {extreme}?"
    if limit > 1:
        question = f"Show the {key} of the {limit} {table} with the {extreme}, in that order."
    order = f"ORDER BY {column.name}{direction} LIMIT {limit}"
    return question, f"SELECT {key} FROM {table} {order}"


def ordered(schema: Schema, rng: random.Random) -> Pair:
    column = rng.choice(schema.of(*NUMBERS))
    direction = rng.choice(["", " DESC"])
    words = WORDS[column.kind].order[bool(direction)]
    key, table = schema.key.name, schema.table
    verb = rng.choice(["sorted", "ordered"])
    return (
        f"List the {key} of all {table} {verb} by {column.name}, {words}.",
        f"SELECT {key} FROM {table} ORDER BY {column.name}{direction}",
    )


def distinct(schema: Schema, rng: random.Random) -> Pair:
    column = rng.choice(schema.of("text"))
    words = rng.choice(["List each different {c} of {t}.", "Show every distinct {c} of {t}."])
    return (
        words.format(c=column.name, t=schema.table),
        f"SELECT DISTINCT {column.name} FROM {schema.table}",
    )


def per_group(schema: Schema, rng: random.Random) -> Pair:
    group = rng.choice(schema.of("text")).name
    words = rng.choice(["How many {t} are there for each {c}?", "Count the {t} per {c}."])
    return (
        f"{words.format(t=schema.table, c=group)} Show the {group} and the count.",
        f"SELECT {group}, COUNT(*) FROM {schema.table} GROUP BY {group}",
    )


Shape = Callable[[Schema, random.Random], Pair]
SHAPES: list[Shape] = [
    lookup, one_condition, count_some, aggregate, top, two_conditions, two_columns, ordered,
    distinct, per_group, count_all,
]  # fmt: skip
NEED_TEXT: list[Shape] = [two_conditions, distinct, per_group]
# Asked once per schema: they have few wordings.
RARE: list[Shape] = [distinct, per_group, count_all]


def rows_of(schema: Schema, count: int, turn: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` different questions; `turn` moves the first shape on from schema to schema."""
    shapes = [s for s in SHAPES if schema.of("text") or s not in NEED_TEXT]
    start = turn * count % len(shapes)
    queue = shapes[start:] + shapes[:start]
    common = [s for s in queue if s not in RARE]
    answers: dict[str, str] = {}
    while len(answers) < count:
        if not queue:
            queue = list(common)
        question, answer = queue.pop(0)(schema, rng)
        answers.setdefault(question, answer)
    return [{"context": schema.context, "question": q, "answer": a} for q, a in answers.items()]


def generate() -> dict[str, str]:
    """The text of each file, by its name."""
    rng = random.Random(SEED)
    found = json.loads((HERE / "schemas.json").read_text(encoding="utf-8"))
    files: dict[str, str] = {}
    for split, count in ROWS_PER_SCHEMA.items():
        rows: list[dict[str, str]] = []
        for turn, entry in enumerate(e for e in found if e["split"] == split):
            schema = Schema(entry["table"], [Column(**c) for c in entry["columns"]])
            rows += rows_of(schema, count, turn, rng)
        rng.shuffle(rows)
        files[f"{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file differs")
    check = parser.parse_args().check
    status = 0
    for name, text in generate().items():
        path = HERE / name
        if not check:
            path.write_bytes(text.encode())
        elif not path.is_file() or path.read_bytes() != text.encode():
            sys.stderr.write(f"{path} is not what generate.py writes\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
