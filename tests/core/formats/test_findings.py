"""What is counted of rows that can be read, with few rows and with more than memory should hold."""

from typing import Any

import numpy as np
import pytest

from core.ml.formats import findings
from core.ml.formats.chat.example import Conversation, Turn
from core.ml.formats.findings import Findings
from tests.core.formats.given import ASSISTANT, USER, codes, inspect, pair, warning


def chat(*contents: str, first: str = "user") -> Conversation:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return Conversation([Turn(role=roles[i % 2], content=text) for i, text in enumerate(contents)])


def test_duplicates_are_counted_and_their_first_lines_named() -> None:
    report = inspect("", pair("a"), pair("b"), *[pair("a")] * 12, pair("b"))
    assert report.duplicates == 13
    assert report.warnings == [
        {
            "code": "duplicates",
            "message": "Rows that repeat an earlier row: 13.",
            "count": 13,
            "lines": list(range(4, 14)),
        }
    ]
    assert report.summary()["warning_count"] == 13


def test_rows_that_only_look_alike_are_no_duplicates() -> None:
    report = inspect(pair("ab", "c d"), pair("a", "bc d"), pair("a ", "bc d"))
    assert (report.duplicates, report.warnings) == (0, [])
    made = Findings()
    made.add(1, chat("a b", "c d"))
    made.add(2, chat("a b", "c d", first="assistant"))
    made.add(
        3, Conversation(chat("a b", "c d").turns, tools=[{"type": "function", "function": {"name": "f"}}])
    )
    assert made.warnings() == [
        {
            "code": "ends_with_user",
            "message": findings._MESSAGES["ends_with_user"].format(count=1),
            "count": 1,
            "lines": [2],
        }
    ]


def test_another_answer_to_a_prompt_is_told_with_the_later_line() -> None:
    answers = ["one two", "three four", "one two", "five six", "three four"]
    report = inspect(pair("other"), *[pair("a", answer) for answer in answers])
    assert codes(report) == {"duplicates": 2, "conflicting_answers": 2}
    assert warning(report, "conflicting_answers")["lines"] == [3, 5]
    assert warning(report, "duplicates")["lines"] == [4, 6]


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        (["two words"], None),
        (["word"], "one_word_answers"),
        (["word", ""], "empty_answers"),
        ([" \n"], "empty_answers"),
        (
            [
                "これは句読点のない一つの長い文でありまして単語ではありませんので数えられてはならないと思われます"
            ],
            None,
        ),
    ],
)
def test_empty_and_one_word_answers_are_told(answers: list[str], code: str | None) -> None:
    made = Findings()
    made.add(7, chat(*[text for answer in answers for text in ("a question", answer)]))
    made.add(9, chat("another question", "a good answer"))
    assert [(found["code"], found["lines"]) for found in made.warnings()] == ([(code, [7])] if code else [])


def test_an_answer_that_is_not_trained_may_be_empty() -> None:
    made = Findings()
    made.add(1, chat("q", "", "q", "a good answer")._replace(untrained=frozenset({1})))
    made.add(2, chat("q 2", "a good answer"))
    assert made.warnings() == []


def test_a_call_is_an_answer() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    made = Findings()
    for line, arguments in enumerate(({"n": 1}, {"n": 2}, {"n": 1}), 1):
        function = {"name": "f", "arguments": arguments}
        turn = Turn(role="assistant", content="", tool_calls=[{**call, "function": function}])
        made.add(line, Conversation([Turn(role="user", content="q"), turn]))
    assert [(found["code"], found["lines"]) for found in made.warnings()] == [
        ("duplicates", [3]),
        ("conflicting_answers", [2]),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>",
        "<|eot_id|>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "</s>",
        "<end_of_turn>",
        "<\uff5cUser\uff5c>",
        "[TOOL_CALLS]",
    ],
)
def test_control_tokens_in_a_text_are_told(text: str) -> None:
    report = inspect(pair("a", f"an {text} inside"), pair("b", "a < b and c[0] > <b>"))
    assert codes(report) == {"control_tokens": 1}


def test_last_user_turns_long_rows_and_single_rows_are_told_with_their_lines() -> None:
    report = inspect("", {"messages": [USER, ASSISTANT, USER]})
    assert codes(report) == {"ends_with_user": 1, "single_row": 1}
    assert warning(report, "single_row")["lines"] == [2]
    assert codes(inspect(pair("a"), pair("b", "x y" * 11_000))) == {"very_long_rows": 1}


def test_calls_without_results_are_told() -> None:
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    result = {"role": "tool", "content": "found"}
    report = inspect(
        {"messages": [USER, calls, ASSISTANT]},
        {"messages": [USER, calls, result, ASSISTANT]},
        {"messages": [USER, calls]},  # it learns to call
    )
    assert codes(report) == {"unanswered_calls": 1}
    assert warning(report, "unanswered_calls")["lines"] == [1]


def test_columns_and_message_fields_that_are_not_read_are_told() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{**USER, "mood": "glad"}, ASSISTANT], "id": 1, "empty": None, "none": ""},
        {"messages": [{**USER, "content": "Ho"}, ASSISTANT], "id": 2},
    ]
    report = inspect(*rows)
    assert [(found["message"].split(" is not")[0], found["lines"]) for found in report.warnings] == [
        ('"id"', [1, 2]),
        ('"messages[].mood"', [1]),
    ]


def test_endless_names_of_fields_are_counted_together() -> None:
    report = inspect(*[{**pair(f"question {i}"), f"{'x' * 100}": 1, f"field{i}": 1} for i in range(200)])
    assert len(report.warnings) <= 52
    assert sum(found["count"] for found in report.warnings) == 400
    assert all(len(found["message"]) < 200 for found in report.warnings)


def test_length_quantiles_count_characters() -> None:
    report = inspect(*[pair("é" * n, "x") for n in range(100, 0, -1)])
    assert report.length == {"p50": 51, "p95": 96, "max": 101}


# ---- More rows than are held at once


def naive(keys: list[int]) -> list[bool]:
    seen: set[int] = set()
    return [key in seen or seen.add(key) is not None for key in keys]


@pytest.mark.parametrize("spread", [1, 7, 1000, 10**6])
def test_many_rows_are_compared_as_few_are(monkeypatch: pytest.MonkeyPatch, spread: int) -> None:
    monkeypatch.setattr(findings, "_AT_ONCE", 300)
    monkeypatch.setattr(findings, "_FLUSH_ROWS", 64)
    draws = np.random.default_rng(spread).integers(0, spread, (2, 5000)).tolist()
    made, other = Findings(), Findings()
    for line, (prompt, answer) in enumerate(zip(*draws, strict=True), 1):
        made.add(line, chat(f"q {prompt}", f"the {answer % 50}"))
    for line in range(0, 5000, 3):
        other.add(line, chat(f"q {draws[0][line]}", f"the {draws[1][line] % 50}"))
    rows = [(prompt, answer % 50) for prompt, answer in zip(*draws, strict=True)]
    again = naive([hash(row) for row in rows])
    conflicting = [seen and not same for seen, same in zip(naive(draws[0]), again, strict=True)]
    theirs = {rows[line] for line in range(0, 5000, 3)}
    expected = {
        "duplicates": [i for i, same in enumerate(again, 1) if same],
        "conflicting_answers": [i for i, other_answer in enumerate(conflicting, 1) if other_answer],
        "in_both_files": [i for i, row in enumerate(rows, 1) if row in theirs],
    }
    found = {item["code"]: (item["count"], item["lines"]) for item in made.warnings(other)}
    assert found == {code: (len(lines), lines[:10]) for code, lines in expected.items() if lines}
    assert made.duplicates == sum(again)


def test_rows_of_another_file_are_told() -> None:
    other = Findings()
    other.add(1, chat("a", "b c"))
    other.add(2, "a text")
    made = Findings()
    for line, example in enumerate([chat("a", "b d"), chat("a", "b c"), "a text", "another"], 1):
        made.add(line, example)
    assert {item["code"]: item["lines"] for item in made.warnings(other)} == {
        "conflicting_answers": [2],
        "in_both_files": [2, 3],
    }
    assert Findings().warnings(other) == []


def test_names_of_speakers_are_told_once() -> None:
    named = {"messages": [{**USER, "name": "Ann"}, {**ASSISTANT, "name": "Bob"}]}
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    result = {"role": "tool", "name": "look", "content": "found"}
    report = inspect(named, {"messages": [USER, calls, result, ASSISTANT]}, {"messages": [USER, ASSISTANT]})
    assert codes(report) == {"speaker_names": 1}
    assert warning(report, "speaker_names")["lines"] == [1]


def test_texts_that_look_like_turns_are_told() -> None:
    rows = [
        {"text": "once upon a time"},
        {"text": "### Question: Hi\n### Answer: Hello"},
        {"text": "Q: a\nA: b"},
    ]
    report = inspect(*rows)
    assert codes(report) == {"looks_like_turns": 2}
    assert warning(report, "looks_like_turns")["lines"] == [2, 3]
    assert "the questions too" in warning(report, "looks_like_turns")["message"]
