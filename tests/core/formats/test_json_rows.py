"""JSON Lines and JSON arrays: what is read, and the physical line of what cannot be read."""

import io
import json

import pytest

from core.ml.formats.files import json_rows
from core.ml.formats.files.rows import Limits, Row
from tests.core.formats.given import GOOD, LIMIT, problems, rows_of


def lines(data: bytes, limit: int = LIMIT) -> list[Row]:
    return rows_of(data, "jsonl", limit)


def array(data: bytes, limit: int = LIMIT) -> list[Row]:
    return rows_of(data, "json", limit)


def test_jsonl_takes_bom_crlf_blank_lines_and_no_final_newline() -> None:
    found = lines(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD + b"\n\n" + GOOD)
    assert [row.line for row in found] == [1, 4, 6]
    assert all(row.values == {"prompt": "a", "completion": "b"} for row in found)


def test_a_broken_line_in_the_middle_is_named_by_its_physical_line() -> None:
    found = lines(GOOD + b"\n\n" + b'{"prompt": "a", \n' + GOOD + b"\n")
    assert problems(found) == [(3, "invalid_json")]
    assert [row.line for row in found] == [1, 3, 4]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"prompt": NaN, "completion": "b"}', "invalid_json"),
        (b'{"prompt": -Infinity, "completion": "b"}', "invalid_json"),
        (b'{"prompt": 1e999, "completion": "b"}', "invalid_json"),
        (b'{"prompt": "a\\u0000b", "completion": "b"}', "invalid_text"),
        (b'{"prompt": "a\x00b", "completion": "b"}', "invalid_json"),
        (b'{"prompt": "\\ud83d", "completion": "b"}', "invalid_text"),
        (b'{"prompt": "\\uDE00\\uD83D", "completion": "b"}', "invalid_text"),
        (b'{"\\udead": 1}', "invalid_text"),
        (b'{"prompt": ' + b"7" * 5000 + b', "completion": "b"}', "invalid_json"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "not_utf8"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "not_utf8"),
        (b'{"prompt": "a", "prompt": "b"}', "duplicate_key"),
        (b'{"prompt": "a", "pro\\u006dpt": "b"}', "duplicate_key"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "duplicate_key"),
        (b'["prompt", "completion"]', "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"12", "not_an_object"),
        (b"1.5", "not_an_object"),
        (b"null", "not_an_object"),
        (b"{} {}", "invalid_json"),
        (b"{'prompt': 'a'}", "invalid_json"),
        (b"\xc2\xa0", "invalid_json"),
        ("\u2028".encode(), "invalid_json"),
        (b"\xef\xbb\xbf" + GOOD, "invalid_json"),
    ],
)
def test_what_is_no_row_says_why(line: bytes, code: str) -> None:
    found = lines(GOOD + b"\n" + line + b"\n" + GOOD + b"\n", limit=10_000)
    assert problems(found) == [(2, code)]
    assert [row.line for row in found] == [1, 2, 3]
    element = array(b"[" + GOOD + b",\n" + line + b"]", limit=10_000)
    if line.strip() != b"{} {}" and code != "not_an_object":
        assert problems(element)[0] == (2, code if line[:1] == b"{" else "invalid_json")


def test_an_object_that_goes_on_in_the_next_line_is_told_so() -> None:
    found = lines(b'{"prompt": "a",\n"completion": "b"}\n')
    assert found[0].problem is not None
    assert "goes on in the next line" in (found[0].problem.hint or "")


@pytest.mark.parametrize(
    ("data", "line", "words", "hint"),
    [
        (GOOD + b"\n\xef\xbb\xbf" + GOOD, 2, "byte order mark", "Remove it"),
        (GOOD + b"\r" + GOOD + b"\r", 1, "CR alone", "LF or CRLF"),
    ],
)
def test_what_joining_and_old_programs_leave_in_a_file_is_named(
    data: bytes, line: int, words: str, hint: str
) -> None:
    found = lines(data)[-1]
    assert found.problem is not None
    assert (found.line, found.problem.code) == (line, "invalid_json")
    assert words in found.problem.message
    assert hint in (found.problem.hint or "")


def test_byte_order_marks_before_the_first_row_are_passed_over() -> None:
    marks = b"\xef\xbb\xbf" * 2
    good = [json.loads(GOOD)]
    assert [row.values for row in lines(marks + GOOD)] == good
    assert [row.values for row in array(marks + b"[" + GOOD + b"]")] == good
    assert [row.values for row in rows_of(marks + b"prompt,completion\na,b\n", "csv")] == good


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_five_thousand_levels_of_nesting_are_one_broken_line(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    deep = b'{"prompt": ' + opening * 5000 + b"1" + closing * 5000 + b"}"
    found = lines(GOOD + b"\n" + deep + b"\n" + GOOD + b"\n", limit=100_000)
    assert problems(found) == [(2, "too_deep")]
    assert [row.line for row in found] == [1, 2, 3]


def test_whole_surrogate_pairs_and_written_escapes_are_text() -> None:
    found = lines(b'{"a": "\\ud83d\\ude00"}\n' + rb'{"a": "\\ud83d and C:\\ud"}')
    assert [row.values for row in found] == [{"a": "😀"}, {"a": "\\ud83d and C:\\ud"}]


def test_a_backslash_followed_by_u0000_is_text_and_no_nul() -> None:
    line = json.dumps({"prompt": r"What is \u0000 in JSON?", "completion": "NUL"}).encode()
    assert lines(line)[0].values == {"prompt": r"What is \u0000 in JSON?", "completion": "NUL"}


def row_of(size: int) -> bytes:
    """A JSON line of exactly `size` bytes."""
    return b'{"a": "' + b"x" * (size - 9) + b'"}'


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(ending: bytes) -> None:
    assert problems(lines(GOOD + b"\n" + row_of(LIMIT) + ending)) == []
    assert problems(lines(GOOD + b"\n" + row_of(LIMIT + 1) + ending)) == [(2, "line_too_long")]


@pytest.mark.parametrize("times", [2, 3, 10])
def test_lines_after_a_too_long_one_keep_their_numbers(times: int) -> None:
    found = lines(GOOD + b"\n" + row_of(LIMIT * times) + b"\n" + GOOD + b"\nbroken\n")
    assert problems(found) == [(2, "line_too_long"), (4, "invalid_json")]


def test_a_too_long_first_line_after_a_bom_is_one_line() -> None:
    found = lines(b"\xef\xbb\xbf" + row_of(LIMIT * 2) + b"\n" + GOOD + b"\nbroken\n")
    assert problems(found) == [(1, "line_too_long"), (3, "invalid_json")]


# ---- JSON arrays


def test_elements_have_the_line_they_begin_on() -> None:
    data = b'\xef\xbb\xbf\n[ {"a": "x\\n"},\r\n\r\n{\n"a":\n"y"\n}\n,\n{"a": "z"}\n]\n'
    assert [(row.line, row.values["a"]) for row in array(data)] == [(2, "x\n"), (4, "y"), (9, "z")]
    assert array(b"[]") == []
    assert array(b" [\n] \n") == []


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (b"[%s,\n%s,\n]", 3, "Expecting value"),
        (b"[%s,\n%s\n", 3, "the end of the file"),
        (b"[%s,\n%s,\n", 3, "Expecting value"),
        (b"[%s,\n%s\n%s]", 3, "instead of a comma"),
        (b'[%s,\n%s,\n{"a": \n tru}]', 4, "Expecting value"),
        (b'[%s,\n%s,\n{"a": "never closed}]', 3, "Unterminated"),
        (b"[%s,\n%s]\n\n{}", 4, "follows the end"),
        (b'[%s,\n%s,\n\n{"a": "\xff"}]', 4, "not UTF-8"),
        (b'[%s,\n%s,\n\n{"a": "\xc3', 4, "not UTF-8"),
    ],
)
def test_a_broken_array_gives_what_stands_before_and_the_line(data: bytes, line: int, words: str) -> None:
    found = array(data.replace(b"%s", GOOD))
    assert [row.line for row in found[:2]] == [1, 2]
    assert [row.problem for row in found[:2]] == [None, None]
    assert found[2].line == line
    assert found[2].problem is not None
    assert words in found[2].problem.message
    assert len(found) == 3 or words == "instead of a comma"


def test_an_element_that_is_refused_does_not_end_an_array() -> None:
    data = b'[{"a": 1, "a": 2},\n{"a": "\\u0000"},\n"text",\n{"a": [[[[]]]]},\n{"a": 1}\n]'
    found = list(json_rows.array(io.BytesIO(data), Limits(depth=4)))
    assert problems(found) == [
        (1, "duplicate_key"),
        (2, "invalid_text"),
        (3, "not_an_object"),
        (4, "too_deep"),
    ]
    assert found[4].values == {"a": 1}


def test_an_array_larger_than_the_window_keeps_its_lines() -> None:
    row = b'{"a": "' + b"x" * 1000 + b'\xc3\xa9"}'
    count = 5000
    found = list(json_rows.array(io.BytesIO(b"[\n" + b",\n".join([row] * count) + b"\n]"), Limits()))
    assert [row.line for row in found] == list(range(2, count + 2))
    assert all(row.values["a"].endswith("xé") for row in found)
    bad = b"[\n" + b",\n".join([row] * count) + b",\n{\xff}\n]"
    assert problems(list(json_rows.array(io.BytesIO(bad), Limits()))) == [(count + 2, "not_utf8")]


class Counting(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.taken += len(found)
        return found


@pytest.mark.parametrize("element", [b'{"a": "%s"}', b'{"a": "%s'])
def test_a_huge_element_is_not_read_to_its_end(element: bytes) -> None:
    file = Counting(b"[" + GOOD + b",\n" + element % (b"x" * 30_000_000) + b"]")
    found = list(json_rows.array(file, Limits(line_bytes=2_000_000)))
    assert problems(found) == [(2, "line_too_long")]
    assert file.taken < 6_000_000


@pytest.mark.parametrize(
    ("fault", "word"), [(b'{"a": 1} {"a": 2}', "comma"), (b'{"a": NaN}', "NaN"), (b'{"a" 1}', "delimiter")]
)
def test_in_a_long_array_the_fault_itself_is_told(fault: bytes, word: str) -> None:
    good = b'{"a": "' + b"x" * 200 + b'"},\n'
    data = b"[" + good * 3 + fault + b",\n" + good * 100 + b"1]"
    found = rows_of(data, "json", 1000)
    problem = next(row for row in found if row.problem is not None)
    assert problem.line == 4
    assert problem.problem is not None
    assert word in problem.problem.message
    assert "column" not in problem.problem.message
