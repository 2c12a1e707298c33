"""Broken lines: what is read of them, what is left out, and how long a hostile one takes."""

import json
import time
from typing import Any

import pytest

from core.ml.formats.files.rows import Limits
from tests.core.formats.given import ASSISTANT, GOOD, USER, jsonl
from tests.core.formats.test_repair import examine


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b'{"prompt": "a", "completion": "b",}', {"prompt": "a", "completion": "b"}),
        (b'{"prompt": "a,}", "completion": "b, ]",},', {"prompt": "a,}", "completion": "b, ]"}),
        (b'{"prompt": "a\\u0000\\\\u0000", "completion": "b"}', {"prompt": "a\\u0000", "completion": "b"}),
        (b"{'prompt': 'a', 'completion': \"it's\"}", {"prompt": "a", "completion": "it's"}),
        (b"{'prompt': 'a', 'completion': True, 'n': None,}", {"prompt": "a", "completion": True, "n": None}),
        (
            b"{u'prompt': u'a \\x85 \"q\" \\U0001f600', 'completion': 'b'}",
            {"prompt": 'a \x85 "q" 😀', "completion": "b"},
        ),
        (b"{'prompt': 'a', 'Completion': 1.10}", {"prompt": "a", "completion": 1.1}),
        (b'{"Prompt": "a", "completon": "b"}', {"prompt": "a", "completion": "b"}),
        (b'{"prompt": "caf\xe9", "completion": "b"}', {"prompt": "café", "completion": "b"}),
        (
            b'{"prompt": "\x93Stra\xdfe\x94 l\x92\xe9t\xe9", "completion": "\x80 5"}',
            {"prompt": "“Straße” l\u2019été", "completion": "€ 5"},
        ),
        (b'{"prompt": "a",\n  "completion": "b"\n}', {"prompt": "a", "completion": "b"}),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a", "completion": "b"}', {"prompt": "a", "completion": "b"}),
        (b'{"prompt": "a", "Completion": 1.10}', {"prompt": "a", "completion": 1.1}),
    ],
)
def test_a_broken_row_is_mended(line: bytes, row: dict[str, Any]) -> None:
    found, rows = examine(GOOD + b"\n" + line + b"\n" + GOOD)
    assert rows == [json.loads(GOOD), row, json.loads(GOOD)]
    assert found.repair is not None
    assert (found.repair.changed, found.repair.left_out) == (1, 0)
    assert found.repair.diff.startswith("@@ line 2 @@\n-")
    assert f"+{json.dumps(row, ensure_ascii=False)}".replace("1.1}", "1.10}") in found.repair.diff


def test_a_pretty_printed_object_is_one_row() -> None:
    pretty = json.dumps({"messages": [USER, ASSISTANT]}, indent=2)
    inner = (
        '{"messages": [\n  {"role": "user", "content": "Hi"},\n  {"role": "assistant", "content": "{"}\n]}'
    )
    found, rows = examine(f"{pretty}\n\n{inner}\n".encode())
    assert rows == [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": "{"}]},
    ]
    assert found.repair is not None
    assert "@@ line 1 @@" in found.repair.diff
    assert "@@ line 14 @@" in found.repair.diff


def test_signs_that_are_taken_mean_the_same_in_every_code_page() -> None:
    for page in ("cp1250", "cp1252", "cp1254", "cp1257"):
        raw = '{"prompt": "€ „Größe“ \u2018été\u2019 … \u2013 — ”", "completion": "ÄÖÜäöüßÉéóa"}'.encode(page)
        _, rows = examine(GOOD + b"\n" + raw)
        assert rows[1:] == [json.loads(raw.decode(page))]


CUT = '{"messages": [{"role": "user", "content": "trunc'


@pytest.mark.parametrize(
    "cut", [CUT, f" {CUT}", '{"messages": [\n  {"role": "user", "content": "Hi"},\n  {"ro', "  {"]
)
@pytest.mark.parametrize("end", ["", "}\n", "}}\n"])
def test_a_row_that_breaks_off_takes_no_good_ones_with_it(cut: str, end: str) -> None:
    good = [{"messages": [USER, {"role": "assistant", "content": f"number {n}"}]} for n in range(12)]
    first, *others, last = map(json.dumps, good)
    found, rows = examine("\n".join([first, cut, *(f" {line}" for line in others), f"{end}{last}"]).encode())
    assert rows == good
    assert found.repair is not None
    assert (found.repair.changed, found.repair.left_out) == (0, 1 + bool(end))


def test_an_object_over_several_lines_that_never_ends_is_left_out_once() -> None:
    inner = '{"messages": [\n  {"role": "user", "content": "Hi"},\n  {"role": "assistant", "content": "b"}'
    found, rows = examine(f'{json.dumps({"messages": [USER, ASSISTANT]})}\n{inner}\n{CUT}"}}]}}\n'.encode())
    assert found.repair is not None
    assert (len(rows), found.repair.left_out) == (1, 2)
    assert "@@ line 2 @@" in found.repair.diff
    assert "@@ line 5 @@" in found.repair.diff


@pytest.mark.parametrize("text", ["use { braces", 'say \\" and {', "{{ name"])
def test_a_brace_in_single_quotes_opens_nothing(text: str) -> None:
    line = f"{{'prompt': '{text}', 'completion': 'b'}},\n".encode()
    found, rows = examine(GOOD + b"\n" + line * 2 + b" " + GOOD)
    meant = {"prompt": text.replace("\\", ""), "completion": "b"}
    assert rows == [json.loads(GOOD), meant, meant, json.loads(GOOD)]
    assert found.repair is not None
    assert found.repair.left_out == 0


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a", "completion":',
        b'{"prompt": "a"}',
        b"nonsense",
        b'{"prompt": "\\ud83d", "completion": "b"}',
        b"{'prompt': '\\ud83d', 'completion': 'b'}",
        b"{'prompt': {1, 2}, 'completion': 'b'}",
        b"{'prompt': 1e999, 'completion': 'b'}",
        b"{'prompt': 'a', 'prompt': 'b', 'completion': 'c'}",
        b"{'prompt': 'it''s', 'completion': 'b'}",
        b"{'prompt': 'a', 'completion': 'b', True: 1}",
        b"{'prompt': 'a', 'completion': 'b', 5: 1}",
        b"{'prompt': 'a', 'completion': 0x10}",
        b"{'prompt': 'a', 'completion': ('b', 'c')}",
        b"{'prompt': 'C:\\/', 'completion': 'b'}",
        b"{'prompt': '\\U0000d83d', 'completion': 'b'}",
        '{"prompt": "こんにちは、世界", "completion": "b"}'.encode("shift-jis"),
        '{"prompt": "Привет, мир", "completion": "b"}'.encode("cp1251"),
        '{"prompt": "да", "completion": "нет"}'.encode("cp1251"),
        '{"prompt": "你好", "completion": "b"}'.encode("gbk"),
        '{"prompt": "안녕", "completion": "b"}'.encode("euc-kr"),
        '{"prompt": "żółw", "completion": "b"}'.encode("cp1250"),
        '{"prompt": "Nas\u0131ls\u0131n?", "completion": "b"}'.encode("cp1254"),
        '{"prompt": "Proszę", "completion": "b"}'.encode("cp1250"),
        '{"prompt": "Dobře", "completion": "b"}'.encode("cp1250"),
        '{"prompt": "Jó szülő", "completion": "b"}'.encode("cp1250"),
        '{"prompt": "Bună ziua", "completion": "b"}'.encode("cp1250"),
        '{"prompt": "Paldies, māsa", "completion": "b"}'.encode("cp1257"),
        '{"prompt": "Œuvre", "completion": "b"}'.encode("iso8859-15"),
        '{"prompt": "Sí, mañana", "completion": "b"}'.encode("cp1252"),  # `n` with háček in cp1250
        '{"prompt": "ｱ", "completion": "b"}'.encode("shift-jis"),
        '{"prompt": "Я и", "completion": "b"}'.encode("cp1251"),
        '{"prompt": "הי", "completion": "b"}'.encode("cp1255"),
        '{"prompt": "Löwe", "completion": "b"}'.encode("cp437"),
        '{"prompt": "Löwe", "completion": "b"}'.encode("mac-roman"),
        b"\x81\x8d\x8f",
        b'{"prompt": "' + b"x" * 3000 + b'", "completion": "b"}',
        b'{"prompt": "a", "prompt": "b", "completion": "c"}',
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_cannot_be_mended_is_left_out_and_shown(line: bytes) -> None:
    found, rows = examine(GOOD + b"\n" + line + b"\n" + GOOD, limits=Limits(line_bytes=2000))
    assert rows == [json.loads(GOOD)] * 2
    assert found.repair is not None
    assert found.repair.left_out == 1
    assert "@@ line 2 @@" in found.repair.diff
    assert len(found.repair.diff) < 3000


def test_lines_that_end_in_cr_alone_are_told_apart() -> None:
    found, rows = examine(GOOD + b"\r" + GOOD + b"\r{'prompt': 'c', 'completion': 'd'}\r")
    assert rows == [json.loads(GOOD)] * 2 + [{"prompt": "c", "completion": "d"}]
    assert found.repair is not None
    assert (found.repair.changed, found.repair.left_out) == (3, 0)


@pytest.mark.parametrize(
    "data",
    [b"{\n" + b"1\n" * 200_000, b'{"a":\n' * 50_000, b"{" * 500_000 + b"\n", b"{\n" + b" {'}\n" * 200_000],
)
def test_lines_that_never_end_an_object_take_linear_time(data: bytes) -> None:
    began = time.process_time()
    found, _ = examine(data)
    assert found.repair is None
    assert time.process_time() - began < 20


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "line",
    [
        b'{"messages": "' + b'\\"' * (MEGABYTE // 2),
        b'{"messages": "' + b"\\" * MEGABYTE,
        b'{"messages": ' + b'"' * (MEGABYTE + 1),
        b"{'messages': '" + b"\\'" * (MEGABYTE // 2),
        b"{'messages': " + b"u'" * (MEGABYTE // 2),
        b'{"messages": 1' + b", " * (MEGABYTE // 2),
        b'{"messages": 1,' + b" " * MEGABYTE,
        b'{"messages": [' + b'{"a": 1}, ' * (MEGABYTE // 10) + b"{}]}",
        b'{"messages": [{' + b", ".join(b'"contx%d": 1' % n for n in range(MEGABYTE // 20)) + b"}]}",
        b'{"messages": "' + b"\xe9a" * (MEGABYTE // 2),
        b'{"a": ' + b"[{" * (MEGABYTE // 2),
        b"\xef\xbb\xbf" * (MEGABYTE // 3) + b"{",
        b"{\r" + b'"a": 1,\r' * (MEGABYTE // 8),
    ],
    ids=lambda line: line[:30].decode("latin-1"),
)
def test_a_hostile_line_takes_linear_time(line: bytes) -> None:
    good = jsonl({"messages": [USER, ASSISTANT]})
    began = time.process_time()
    found, rows = examine(line + b"\n" + good)
    assert time.process_time() - began < 10  # an hour, where each quotation mark begins a search to the end
    assert len(rows) == 1
    assert found.repair is not None
    assert found.repair.left_out >= 1
