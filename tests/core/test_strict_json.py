"""JSON with one meaning, by the fast way and by the slow one."""

import json

import pytest

from core import strict_json
from core.strict_json import JsonError, Number


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "b", "c": [1, true, null, {"d": "\\"quoted\\""}]}',
        '{"a": "\\\\", "b": "\\\\\\""}',
        '{"a": 18446744073709551616, "b": -9223372036854775809}',
        '{"a": 123456789012345678901234567890}',
        '{"\\u0061": "\\u00e9 \\ud83d\\ude00"}',
        ' {"": ""} ',
        "{}",
    ],
)
def test_both_ways_give_the_same_value(text: str) -> None:
    fast, slow = strict_json.loads_line(text.encode(), depth=8), strict_json.loads(text, depth=8)
    assert fast == slow == json.loads(text)
    assert strict_json.loads(strict_json.dumps(fast), depth=8) == fast


@pytest.mark.parametrize("written", ["1.10", "1E5", "0.1000000000000000055511151231257827", "-0.0", "1e-7"])
def test_a_number_remembers_how_it_was_written(written: str) -> None:
    value = strict_json.loads_line(f'{{"a": [{written}]}}'.encode(), depth=8)["a"][0]
    assert isinstance(value, Number)
    assert value.written == written
    assert value == float(written)
    assert strict_json.dumps({"a": [value, "é\n"]}) == f'{{"a": [{written}, "é\\n"]}}'


def test_a_long_integer_stays_exact() -> None:
    assert strict_json.loads_line(b"[12345678901234567890123]", depth=8) == [12345678901234567890123]
    with pytest.raises(JsonError, match="5000 digits"):
        strict_json.loads_line(b"[" + b"7" * 5000 + b"]", depth=8)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', '[{"x": {"b": 1, "\\u0062": 2}}]', '{"\\\\": 1, "\\\\": 2}']
)
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(JsonError) as caught:
        strict_json.loads_line(text.encode(), depth=8)
    assert caught.value.code == "duplicate_key"
    assert caught.value.end == len(text)


def test_nesting_is_bounded() -> None:
    assert strict_json.loads("[" * 8 + "]" * 8, depth=8) == [[[[[[[[]]]]]]]]
    for levels in (9, 5000, 200_000):
        with pytest.raises(JsonError) as caught:
            strict_json.loads_line(b"[" * levels + b"]" * levels, depth=8)
        assert caught.value.code == "too_deep"
