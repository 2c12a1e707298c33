"""What counts as a right answer, metric by metric, and how sure a difference is."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from core.ml.scores import choice, sql
from core.ml.scores import metrics as scores
from core.ml.scores.choice import Row

CLUBS = "Answer with SQL.\nCREATE TABLE clubs (id INTEGER PRIMARY KEY, name VARCHAR, points INTEGER, rate DECIMAL(5, 2))"
CITIES = "CREATE TABLE people (id INTEGER, city_id INTEGER, age INTEGER); CREATE TABLE cities (id INTEGER, name TEXT)"


def scored(metric: choice.Metric, pairs: list[tuple[str, str]], prompt: str = "") -> dict[str, float]:
    """The scores of these (expected, answered) texts; the base answers nothing."""
    rows = [Row(prompt, expected) for expected, _ in pairs]
    found = scores.compare(metric, rows, [""] * len(rows), [answer for _, answer in pairs])
    return {one.name: one.adapter for one in found}


def test_tables_are_found_in_a_time_that_grows_with_the_text() -> None:
    started = time.monotonic()
    for text in ("CREATE TABLE t(" * 100_000, "CREATE TABLE " * 100_000, "CREATE TABLE t(a" + "()" * 500_000):
        assert sql.tables(text) == []
    nested = "CREATE TABLE t (a INT, b DECIMAL(3, 2)); CREATE TABLE u (c TEXT)"
    assert sql.tables(nested) == nested.split("; ")
    assert time.monotonic() - started < 10


def test_white_space_is_no_difference_and_everything_else_is() -> None:
    assert scored("exact_match", [("a  b\n", "a b"), ("a b", "A b")]) == {"exact_match": 0.5}


def test_labels_are_told_in_any_case_and_rare_ones_count_as_much_in_the_macro_mean() -> None:
    pairs = [("yes", "Yes."), ("yes", "yes"), ("yes", " yes\n"), ("no", "yes"), ("no", "I think no")]
    found = scored("label_accuracy", pairs)
    assert found["label_accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 * 3 / (3 + 4) + 0) / 2)


def test_fields_are_compared_one_by_one_in_any_order() -> None:
    wanted = '{"people": 2, "names": ["Ann", "Bo"], "at": {"time": "noon"}}'
    assert scored(
        "json_validity", [(wanted, '{"at": {"time": "noon"}, "names": ["Bo", "Ann"], "people": 2.0}')]
    ) == {
        "json_valid": 1.0,
        "field_f1": 1.0,
    }
    assert scored("json_validity", [(wanted, '```json\n{"people": 2, "time": "noon"}\n```')]) == {
        "json_valid": 1.0,
        "field_f1": pytest.approx(2 * 1 / (4 + 2)),
    }
    assert scored("json_validity", [(wanted, wanted[:-1])]) == {"json_valid": 0.0, "field_f1": 0.0}
    assert scored("json_validity", [('{"a": true}', '{"a": 1}')])["field_f1"] == 0.0
    assert scored("json_validity", [("{}", "{}")])["field_f1"] == 1.0


@pytest.mark.parametrize(
    ("expected", "answered", "score"),
    [
        ('{"a": []}', "{}", 0.0),
        ("[]", "{}", 0.0),
        ('{"a": 1}', '{"a": 1, "b": []}', 2 / 3),
        ('{"a": 12345678901234567890}', '{"a": 12345678901234567891}', 0.0),
    ],
)
def test_what_is_empty_or_a_long_number_is_a_value(expected: str, answered: str, score: float) -> None:
    assert scored("json_validity", [(expected, answered)])["field_f1"] == pytest.approx(score)


@pytest.mark.parametrize("digits", [310, 5_000])
def test_a_number_beyond_all_others_is_only_wrong(digits: int) -> None:
    answered = f'{{"a": {"1" * digits}}}'
    assert scored("json_validity", [('{"a": 1}', answered)])["field_f1"] == 0.0


def test_a_row_whose_expected_answer_is_no_json_says_nothing_of_it() -> None:
    rows = [Row("", "{}"), Row("", "I do not know.")]
    found = scores.compare("json_validity", rows, ["", "{}"], ["{}", "I do not know."])
    assert [(one.name, one.base, one.adapter, one.rows, one.left_out) for one in found] == [
        ("json_valid", 0.0, 1.0, 1, 1),
        ("field_f1", 0.0, 1.0, 1, 1),
    ]


def test_words_of_every_writing_are_compared() -> None:
    assert scored("rouge", [("the cat sat", "The cat lay")])["rouge_l"] == pytest.approx(2 / 3)
    assert scored("rouge", [("кот сидел", "кот сидел")])["rouge_l"] == 1.0
    assert 0 < scored("rouge", [("猫が座った", "猫が寝た")])["rouge_l"] < 1
    assert scored("rouge", [("की", "के")])["rouge_l"] == 0.0
    assert 0 < scored("rouge", [("สวัสดี", "สวย")])["rouge_l"] < 1
    assert scored("rouge", [("👍👍", "👍👍"), ("!!!", "?")])["rouge_l"] == 0.5


@pytest.mark.parametrize(
    ("expected", "answered", "same"),
    [
        ("SELECT name FROM clubs WHERE points > 7", "select NAME from clubs where points >= 8;", True),
        ("SELECT name FROM clubs WHERE points > 7", "SELECT name FROM clubs WHERE points >= 7", False),
        ("SELECT name FROM clubs WHERE points > 7", "SELECT points FROM clubs WHERE points > 7", False),
        ("SELECT name FROM clubs WHERE name = 'Ajax'", "SELECT name FROM clubs WHERE name = 'ajax'", False),
        ("SELECT points FROM clubs WHERE name = \"Ajax\"", "SELECT points FROM clubs WHERE name = 'Ajax'", True),
        ("SELECT name FROM clubs WHERE rate = 66.86", "SELECT name FROM clubs WHERE rate = 66.8", False),
        ("SELECT COUNT(*) FROM clubs", "SELECT COUNT(name) FROM clubs", True),
        ("SELECT MAX(points) FROM clubs", "SELECT MIN(points) FROM clubs", False),
        ("SELECT name FROM clubs ORDER BY points", "SELECT name FROM clubs ORDER BY points DESC", False),
        ("SELECT name FROM clubs", "SELECT name FROM clubs ORDER BY points DESC", True),
        ("SELECT name FROM clubs", "```sql\nSELECT name FROM clubs\n```", True),
        ("SELECT name FROM clubs", "The query is SELECT name FROM clubs", False),
        ("SELECT name FROM clubs", "SELECT name FROM clubs; DROP TABLE clubs", False),
        ("SELECT name FROM clubs", "", False),
    ],
)  # fmt: skip
def test_queries_are_the_same_when_their_results_are(expected: str, answered: str, same: bool) -> None:
    assert sql.same_results(CLUBS, expected, answered) is same


def test_joined_tables_have_rows_that_meet() -> None:
    join = "SELECT c.name FROM people p JOIN cities c ON p.city_id = c.id WHERE p.age > 30"
    other = "SELECT name FROM cities WHERE id IN (SELECT city_id FROM people WHERE age > 30)"
    assert sql.same_results(CITIES, join, join)
    assert not sql.same_results(CITIES, join, other)  # a city once, not once a person
    assert not sql.same_results(CITIES, join, join.replace("30", "31"))


@pytest.mark.parametrize(
    ("expected", "answered", "same"),
    [
        ("SELECT count(*) FROM people", "SELECT count(*) FROM cities", False),
        ("SELECT count(*) FROM people", "SELECT 60", False),
        ("SELECT count(*) FROM people", "SELECT count(*) FROM people WHERE age > 5", False),
        ("SELECT DISTINCT city_id FROM people", "SELECT DISTINCT city_id FROM people WHERE age > 5", False),
        ("SELECT DISTINCT name FROM cities", "SELECT DISTINCT name FROM cities WHERE id = 5", False),
        ("SELECT id FROM people WHERE city_id IN (SELECT id FROM cities)", "SELECT id FROM people", False),
        (
            "SELECT id FROM people WHERE NOT city_id IN (SELECT id FROM cities)",
            "SELECT id FROM people",
            False,
        ),
        (
            "SELECT age FROM people WHERE NOT city_id IN (SELECT id FROM cities)",
            "SELECT age FROM people AS p WHERE NOT EXISTS (SELECT * FROM cities WHERE id = p.city_id)",
            True,
        ),
    ],
)
def test_rows_tell_one_table_or_condition_from_another(expected: str, answered: str, same: bool) -> None:
    assert sql.same_results(CITIES, expected, answered) is same


def test_rows_may_hold_a_number_twice() -> None:
    assert not sql.same_results(CITIES, "SELECT age FROM people", "SELECT DISTINCT age FROM people")
    assert not sql.same_results(
        CITIES, "SELECT count(DISTINCT age) FROM people", "SELECT count(age) FROM people"
    )
    # But the largest is one: both are usual.
    largest = "SELECT id FROM people WHERE age = (SELECT max(age) FROM people)"
    assert sql.same_results(CITIES, largest, "SELECT id FROM people ORDER BY age DESC LIMIT 1")


def test_an_answer_with_many_numbers_does_not_hide_that_of_the_right_query() -> None:
    right = "SELECT count(*) FROM people WHERE age = 5000"
    many = ", ".join(str(n) for n in range(1, 60, 2))
    assert sql.same_results(CITIES, right, f"{right} AND age NOT IN ({many})")
    assert sql.same_results(
        CITIES, "SELECT id FROM people WHERE age > 2", "SELECT id FROM people WHERE age > 2.4"
    )


@pytest.mark.parametrize("answered", ["x", "x" * 6_000, f"SELECT 1 WHERE age > {'9' * 400}", "SELECT 1"])
@pytest.mark.parametrize(
    "expected",
    [
        "SELECT YEAR(age) FROM people",  # no such function
        "SELECT a.id FROM people AS a, people AS b, people AS c",  # too many rows
    ],
)
def test_what_is_left_out_does_not_depend_on_the_answer(expected: str, answered: str) -> None:
    assert sql.same_results(CITIES, expected, answered) is None


def test_rows_of_three_tables_are_compared() -> None:
    three = "CREATE TABLE a (x INT, k INT); CREATE TABLE b (y INT, k INT); CREATE TABLE c (z INT, k INT)"
    join = "SELECT a.x, c.z FROM a JOIN b ON a.k=b.k JOIN c ON b.k=c.k"
    assert sql.same_results(three, join, join) is True
    assert sql.same_results(three, "SELECT a.x, b.y FROM a, b", "SELECT a.x, b.y FROM b, a") is True


def test_a_fence_is_found_in_a_time_that_grows_with_the_text() -> None:
    started = time.monotonic()
    for text in ("```" + "\n" * 9_000, "```json" + "\n" * 90_000, "```sql\n" * 1_400):
        assert sql.same_results(CITIES, "SELECT id FROM people", text) is False
        assert choice.json_of(text) is None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("value", ["9" * 400, "'\udc00'", f"'{'x' * 6_000}'"])
def test_what_an_answer_compares_with_never_leaves_the_row_out(value: str) -> None:
    answered = f"SELECT count(*) FROM people WHERE age > {value}"
    assert sql.same_results(CITIES, "SELECT count(*) FROM people", answered) is False


@pytest.mark.parametrize("length", [4_900, 100_000])
def test_a_query_is_looked_through_in_a_time_that_grows_with_it(length: int) -> None:
    expected = "SELECT a FROM t WHERE a " + "=" * length
    began = time.process_time()
    assert sql.same_results("CREATE TABLE t (a TEXT)", expected, "SELECT 1") is None
    assert time.process_time() - began < 0.3


def test_a_query_that_does_not_run_itself_is_left_out_and_counted() -> None:
    rows = [Row(CLUBS, "SELECT name FROM clubs"), Row(CLUBS, "SELECT nothing FROM clubs")]
    (found,) = scores.compare("sql_execution", rows, ["", ""], [row.expected for row in rows])
    assert (found.adapter, found.rows, found.left_out) == (1.0, 1, 1)
    assert scores.compare("sql_execution", rows[1:], [""], [""]) == []


@pytest.mark.parametrize(
    "answered",
    [
        "DELETE FROM clubs",
        "PRAGMA table_info(clubs)",
        "ATTACH DATABASE '{file}' AS other",
        "SELECT readfile('{file}')",
        "SELECT load_extension('{file}')",
        "VACUUM INTO '{file}'",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
        "SELECT count(*) FROM clubs a, clubs b, clubs c, clubs d, clubs e, clubs f",
        "SELECT zeroblob(1000000000)",
        "SELECT printf('%.*c', 1000000000, 'x') FROM clubs",
        "SELECT 'a\0b'",
    ],
)
def test_an_answer_can_neither_write_nor_run_for_ever(answered: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert sql.same_results(CLUBS, "SELECT name FROM clubs", answered.replace("{file}", str(file))) is False
    assert not file.exists()


@pytest.mark.parametrize(
    "prompt",
    [
        "CREATE TABLE t (a INTEGER DEFAULT (load_extension('x')))",
        "CREATE TABLE t (a INTEGER); CREATE TABLE t (a INTEGER)",
        "CREATE TABLE t (a INTEGER",
        "CREATE TABLE " + "t" * 10_000 + " (a INTEGER)",
    ],
)
def test_tables_that_cannot_be_made_are_no_rows_to_score(prompt: str) -> None:
    assert sql.same_results(prompt, "SELECT b FROM t", "SELECT b FROM t") is None


def test_metrics_are_chosen_by_the_data() -> None:
    query = [Row(CLUBS, f"SELECT name FROM clubs WHERE points > {n}") for n in range(20)]
    label = [Row("Which?", f"topic {n % 4}") for n in range(20)]
    fields = [Row("Extract.", json.dumps({"n": n})) for n in range(20)]
    short = [Row("Capital?", f"City {n}") for n in range(20)]
    free = [Row("Tell.", "word " * n) for n in range(1, 21)]
    assert [choice.chosen(rows)[0] for rows in (query, label, fields, short, free)] == [
        "sql_execution",
        "label_accuracy",
        "json_validity",
        "rouge",
        "rouge",
    ]
    assert ("exact_match" in choice.chosen(short), "exact_match" in choice.chosen(free)) == (True, False)
    assert choice.chosen([]) == []


def test_the_interval_is_paired_and_always_the_same() -> None:
    rng = np.random.default_rng(1)
    base, other = rng.random(60), rng.random(60)
    steady = scores.paired("x", base, base + 0.1)
    assert steady.interval == (pytest.approx(0.1), pytest.approx(0.1))  # the rows' own spread does not count
    noise = scores.paired("x", base, other)
    assert noise.interval[0] < noise.difference < noise.interval[1]
    assert noise.interval[0] < 0 < noise.interval[1]
    assert noise == scores.paired("x", base, other)
    assert scores.paired("x", [0.0], [1.0]).interval == (1.0, 1.0)
