"""JSON Lines and JSON arrays: what is wrong with their JSON, and what only looks so."""

import json

from tests.corpus.case import COLUMNS, DEPTH, LINE_BYTES, Case, Good, among, bad, good, line, pair

_ONE, _TWO = line(pair(1)).strip(), line(pair(2)).strip()


def _raw(name: str, raw: bytes, code: str, word: str) -> Case:
    """A broken line as the third of a file."""
    return bad(name, among(raw), code, 3, word)


def _value(name: str, value: str, code: str, word: str) -> Case:
    return _raw(name, f'{{"prompt": {value}, "completion": "an answer"}}'.encode(), code, word)


def _array(name: str, content: bytes, at: int, word: str, code: str = "invalid_json", count: int = 1) -> Case:
    return bad(name, content, code, at, word, count=count, filename="rows.json")


def _row_of(size: int) -> bytes:
    """A row whose line is `size` bytes long without its end."""
    bare = len(json.dumps(pair(1, prompt="")))
    return json.dumps(pair(1, prompt="x" * (size - bare))).encode() + b"\n"


def _deep(levels: int) -> str:
    return "[" * levels + "]" * levels


_LINES = [
    good("CRLF and blank lines", b"\r\n".join([_ONE, b"", b"  \t", _TWO, b""]), 2, "prompt_completion"),
    good("no final line end of a line", _ONE + b"\n" + _TWO, 2, "prompt_completion"),
    good("white space around", b"  " + _ONE + b"  \n\t" + _TWO, 2, "prompt_completion"),
    bad(
        "a row that breaks off among indented ones",
        _ONE + b"\n" + _ONE[:-9] + b"\n" + (b" " + _TWO + b"\n") * 5,
        "invalid_json",
        2,
        "goes on",
    ),
    bad("lone carriage returns", _ONE + b"\r" + _TWO + b"\r", "invalid_json", 1, "CR alone"),
    bad(
        "a byte order mark in the middle",
        _ONE + b"\n\xef\xbb\xbf" + _TWO,
        "invalid_json",
        2,
        "byte order mark",
    ),
    good("two byte order marks", b"\xef\xbb\xbf" * 2 + _ONE + b"\n" + _TWO, 2, "prompt_completion"),
    bad(
        "rows inside an object over several lines",
        json.dumps({"rows": [pair(1), pair(2)]}, indent=1).encode(),
        "unsupported_file",
        None,
        '"rows"',
    ),
    _raw("an open quote before many quotes", b'{"prompt": "' + b'\\"' * 100_000, "invalid_json", "JSON"),
    bad("error after CRLF and blank lines", _ONE + b"\r\n\r\n\r\n{\r\n", "invalid_json", 4, "JSON"),
    good(
        "line separators of Unicode in text",
        "".join(f'{{"prompt": "a{c}b", "completion": "c{c}d"}}\n' for c in "\u2028\u2029\x85").encode(),
        3,
        "prompt_completion",
    ),
    bad(
        "error after line separators of Unicode",
        '{"prompt": "\u2028\u2029\x85\\n", "completion": "an answer"}\n{"a\n'.encode(),
        "invalid_json",
        2,
        "JSON",
    ),
    bad("very long line", among(_row_of(3 * LINE_BYTES)), "line_too_long", 3, str(LINE_BYTES)),
    good("line of the limit", _row_of(LINE_BYTES) + _TWO, 2, "prompt_completion", "very_long_rows"),
    good(
        "last line of the limit",
        _TWO + b"\n" + _row_of(LINE_BYTES)[:-1],
        2,
        "prompt_completion",
        "very_long_rows",
    ),
    bad("line beyond the limit", _row_of(LINE_BYTES + 1), "line_too_long", 1, str(LINE_BYTES)),
    bad(
        "one object over several lines",
        json.dumps(pair(), indent=1).encode(),
        "invalid_json",
        1,
        "next line",
        count=4,
    ),
    bad("two objects on a line", _ONE + b"\n" + _ONE + _TWO, "invalid_json", 2, "xtra data"),
    bad("a comma after each line", _ONE + b",\n" + _TWO + b",\n", "invalid_json", 1, "xtra data", count=2),
    _raw("single quotes", b"{'prompt': 'a', 'completion': 'b'}", "invalid_json", "double quotes"),
    _raw("Python's None", b'{"prompt": "a", "completion": None}', "invalid_json", "JSON"),
    _raw("a comment", b'// {"prompt": "a"}', "invalid_json", "JSON"),
    _raw("a trailing comma", b'{"prompt": "a", "completion": "b",}', "invalid_json", "JSON"),
    _raw("a line cut short", _ONE[:30], "invalid_json", "JSON"),
    _raw(
        "a control character in a string",
        b'{"prompt": "a\x01b", "completion": "c d"}',
        "invalid_json",
        "ontrol",
    ),
    _raw("a tab in a string", b'{"prompt": "a\tb", "completion": "c d"}', "invalid_json", "ontrol"),
    _raw("a wrong escape", b'{"prompt": "C:\\Users", "completion": "c d"}', "invalid_json", "scape"),
    _raw("a NUL byte", b'{"prompt": "a\0b", "completion": "c d"}', "invalid_json", ""),
    bad("a NUL byte far down", line(pair(1)) * 200 + b'{"prompt": "a\0b"}\n', "invalid_json", 201, ""),
    *(
        _raw(f"a {word} for a row", raw, "not_an_object", word)
        for word, raw in {
            "string": b'"text"',
            "number": b"12",
            "boolean": b"true",
            "null": b"null",
            "array": b'["a", "b"]',
        }.items()
    ),
    bad("strings only", b'"a b"\n"c d"\n', "not_an_object", 1, "string", count=2),
    bad("numbers only", b"1\n2\n3\n", "not_an_object", 1, "number", count=3),
    _raw("an empty object", b"{}", "missing_field", "prompt"),
    bad("empty objects only", b"{}\n{}\n", "unknown_format", None, "olumn"),
    *(_value(name, name, "invalid_json", name) for name in ("NaN", "Infinity", "-Infinity")),
    _value("5,000 digits", "9" * 5000, "invalid_json", "5000 digits"),
    _value("a number too large", "1e999", "invalid_json", "too large"),
    _value("5,000 levels", _deep(5000), "too_deep", "nested"),
    _value("100,000 levels", _deep(100_000), "too_deep", "nested"),
    _value("5,000 open brackets", "[" * 5000, "too_deep", "nested"),
    _value("5,000 levels of objects", '{"a":' * 5000 + "1" + "}" * 5000, "too_deep", "nested"),
    _raw("one level too many", line(pair(meta=json.loads(_deep(DEPTH)))), "too_deep", str(DEPTH)),
    good(
        "as deep as is read",
        among(line(pair(7, m=json.loads(_deep(DEPTH - 1))))),
        3,
        "prompt_completion",
        "unread_field",
    ),
    _raw("a key twice", b'{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate_key", "prompt"),
    _raw(
        "a key twice in an escape",
        b'{"prompt": "a", "prom\\u0070t": "b", "completion": "c"}',
        "duplicate_key",
        "prompt",
    ),
    _raw(
        "a key twice inside",
        b'{"prompt": "a", "completion": "b", "m": {"k": 1, "k": 2}}',
        "duplicate_key",
        '"k"',
    ),
    _value("half a surrogate pair", '"a\\ud83d"', "invalid_text", "surrogate"),
    _value("surrogates in wrong order", '"\\ude00\\ud83d"', "invalid_text", "surrogate"),
    _value("an escaped NUL", '"a\\u0000b"', "invalid_text", "NUL"),
    _raw(
        "an escaped NUL in a key", b'{"prompt": "a", "completion": "b", "\\u0000": 1}', "invalid_text", "NUL"
    ),
    good(
        "backslashes that are no escapes",
        among(b'{"prompt": "\\\\ud83d \\\\u0000", "completion": "\\\\ n"}'),
        3,
        "prompt_completion",
    ),
    good(
        "escaped surrogate pair",
        among(b'{"prompt": "\\ud83d\\ude00", "completion": "a \\u00e9"}'),
        3,
        "prompt_completion",
    ),
    good(
        "scripts of all kinds",
        "".join(
            line(pair(n, prompt=text)).decode()
            for n, text in enumerate(
                (
                    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
                    "שלום עולם \u202eabc\u202c",
                    "e\u0301 a\u0308\u0323 Z̸̧̧",
                    "日本語 한국어 ไทย",
                    "\ufeff\u200b\u00ad\ufffe\uffff",
                    "\U0010ffff\U000e0041",
                    "ǅ İ ß ﬁ",
                )
            )
        ).encode(),
        7,
        "prompt_completion",
    ),
    bad(
        "too many columns",
        among(line(pair(8) | {f"c{n}": 1 for n in range(COLUMNS)})),
        "too_many_columns",
        3,
        "256",
    ),
    good(
        "as many columns as are read",
        among(line(pair(8) | {f"c{n}": 1 for n in range(COLUMNS - 2)})),
        3,
        "prompt_completion",
        "unread_field",
    ),
    Case(
        "another column in every row",
        lambda: b"".join(line(pair(n) | {f"column {n}": "x"}) for n in range(3000)),
        Good(3000, "prompt_completion", frozenset({"unread_field"})),
    ),
    bad("a column's name of 200 kB", line({"x" * 200_000: "a", "y": "b"}), "unknown_format", None, "olumn"),
    bad("80 broken lines", b"{broken}\n" * 80, "invalid_json", 1, "JSON", count=80),
    good(
        "numbers as text",
        among(b'{"prompt": 1.10, "completion": -0.0}'),
        3,
        "prompt_completion",
        "one_word_answers",
    ),
    bad(
        "rows inside an object",
        json.dumps({"data": [pair(1), pair(2)]}).encode(),
        "unknown_format",
        None,
        "data",
    ),
]

_MANY = b",\n".join(line(pair(n)).strip() for n in range(1, 9))
_ARRAYS = [
    good("array", b"[" + _ONE + b", " + _TWO + b"]", 2, "prompt_completion", filename="rows.json"),
    good("array, pretty-printed", json.dumps([pair(1), pair(2)], indent=4).encode(), 2, "prompt_completion", filename="rows.json"),
    good("array under another name", b"[\r\n" + _MANY + b"\r\n]\r\n", 8, "prompt_completion", "name_mismatch"),
    good("array with a byte order mark", b"\xef\xbb\xbf[" + _MANY + b"]", 8, "prompt_completion", filename="rows.json"),
    Case(
        "array of three mebibytes",
        lambda: json.dumps([pair(n, prompt=f"é{n}" * 200) for n in range(3000)], indent=1, ensure_ascii=False).encode(),
        Good(3000, "prompt_completion"),
        "rows.json",
    ),
    bad("empty array", b"[]", "empty_file", None, "no rows", filename="rows.json"),
    _array("array with a trailing comma", b"[\n" + _MANY + b",\n]", 10, "JSON"),
    _array("array with two commas", b"[" + _ONE + b",\n,\n" + _TWO + b"]", 2, "JSON"),
    _array("array without a comma", b"[\n" + _ONE + b"\n" + _TWO + b"\n]", 3, "comma"),
    _array("array that is not closed", b"[\n" + _MANY, 9, "end of the file"),
    _array("array cut inside a row", b"[\n" + _MANY[:-10], 9, "JSON"),
    _array("array with rows after it", b"[\n" + _MANY + b"\n]\n" + _ONE, 11, "follows the end"),
    _array("array with garbage after it", b"[" + _MANY + b"]\n\n}", 10, "follows the end"),
    _array("two arrays", b"[" + _ONE + b"]\n[" + _TWO + b"]", 2, "follows the end"),
    _array("array in an array", b"[\n[" + _ONE + b"]\n]", 2, "array", "not_an_object"),
    _array("array of numbers", b"[1,\n2,\n3]", 1, "number", "not_an_object", 3),
    _array("array of strings", b'[\n"a b", "c d"]', 2, "string", "not_an_object", 2),
    _array("array with a null", b"[\n" + _ONE + b",\nnull]", 3, "null", "not_an_object"),
    _array("array with NaN", b"[\n" + _ONE + b',\n{"prompt": "a",\n "completion": NaN}]', 3, "NaN"),
    _array("array with an error inside a row", json.dumps([pair(1), pair(2)], indent=1).replace(" 2", ' 2" "').encode(), 7, "JSON"),
    _array("array with a key twice", b"[\n" + _ONE + b',\n{"prompt": "a", "prompt": "b"}]', 3, "prompt", "duplicate_key"),
    _array("array of 5,000 levels", b"[\n" + _ONE + b",\n" + _deep(5000).encode() + b"]", 3, "nested", "too_deep"),
    _array("5,000 opening brackets", b"[" * 5000, 1, "nested", "too_deep"),
    _array("array with a long row", b"[\n" + _ONE + b",\n" + _row_of(LINE_BYTES * 2) + b"]", 3, str(LINE_BYTES), "line_too_long"),
    _array("array with an open quote", b"[\n" + _ONE + b',\n{"prompt": "' + b"x" * LINE_BYTES * 9 + b"]", 3, "JSON|quotation", "line_too_long"),
    _array("array with a surrogate", b"[\n" + _ONE + b',\n{"prompt": "\\ud800"}]', 3, "surrogate", "invalid_text"),
    _array("array with 5,000 digits", b"[\n" + _ONE + b',\n{"prompt": ' + b"9" * 5000 + b"}]", 3, "5000 digits"),
]  # fmt: skip

CASES = _LINES + _ARRAYS
