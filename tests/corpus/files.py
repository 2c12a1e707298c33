"""Files that are no data set at all, packed ones, and those of the wrong encoding."""

import bz2
import datetime
import gzip
import io
import lzma
import pickle
import random
import struct
import tarfile
import zipfile

from tests.corpus.case import Bad, Case, Good, bad, good, line, pair

_ROWS = b"".join(line(pair(n)) for n in range(1, 4))
_LISTED = [pair(1), pair(2)]


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, _ROWS)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(_ROWS)
        archive.addfile(info, io.BytesIO(_ROWS))
    return buffer.getvalue()


def _safetensors() -> bytes:
    header = b'{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return struct.pack("<Q", len(header)) + header + bytes(8)


def _bomb(mebibyte: bytes) -> bytes:
    """A gzip file of some 300 kB that unpacks to 300 MB."""
    return gzip.compress(mebibyte * 10) * 30


def _damaged() -> bytes:
    packed = bytearray(gzip.compress(_ROWS))
    packed[-6] ^= 0xFF  # the check sum
    return bytes(packed)


def _not_rows(name: str, content: bytes, word: str, filename: str = "rows.jsonl") -> Case:
    return bad(name, content, "unsupported_file", None, word, filename=filename)


_NOTHING = [
    bad("empty file", b"", "empty_file", None, "no rows"),
    bad("white space only", b" \n\t\r\n  \n", "empty_file", None, "no rows"),
    bad("20 kB of white space", b" \n" * 10_000, "empty_file", None, "no rows"),
    bad("byte order mark only", b"\xef\xbb\xbf", "empty_file", None, "no rows"),
    bad("byte order mark and blank lines", b"\xef\xbb\xbf\n\n", "empty_file", None, "no rows"),
    bad("gzip of nothing", gzip.compress(b""), "empty_file", None, "no rows"),
]

_PACKED = [
    good("gzip", gzip.compress(_ROWS), 3, "prompt_completion", filename="rows.jsonl.gz"),
    good(
        "gzip of two members",
        gzip.compress(_ROWS) + gzip.compress(line(pair(9))),
        4,
        "prompt_completion",
        filename="rows.jsonl.gz",
    ),
    good("gzip under another name", gzip.compress(_ROWS), 3, "prompt_completion", "name_mismatch"),
    bad("gzip cut short", gzip.compress(_ROWS)[:-15], "damaged_file", None, "cut short"),
    bad("gzip's first two bytes", b"\x1f\x8b", "damaged_file", None, "cut short"),
    bad("gzip with a wrong check sum", _damaged(), "damaged_file", None, "damaged"),
    bad("gzip followed by other bytes", gzip.compress(_ROWS) + b"garbage!", "damaged_file", None, "damaged"),
    _not_rows("gzip in gzip", gzip.compress(gzip.compress(_ROWS)), "gzip file inside a gzip"),
    bad("gzip of broken rows", gzip.compress(_ROWS + b"{\n"), "invalid_json", 4, "Not valid JSON"),
    Case(
        "gzip bomb of one word",
        lambda: _bomb(b"x" * 1024**2),
        Bad("unsupported_file", None, "unpacks to more than"),
    ),
    Case(
        "gzip bomb of one string",
        lambda: gzip.compress(b'{"prompt": "') + _bomb(b"x" * 1024**2),
        Bad("unsupported_file", None, "unpacks to more than"),
    ),
    Case(
        "gzip bomb of good rows",
        lambda: _bomb(line({"prompt": "x" * 262_000, "completion": "an answer"}) * 4),
        Bad("unsupported_file", None, "unpacks to more than"),
    ),
    Case(
        "gzip bomb of blank lines",
        lambda: _bomb(b"\n" * 1024**2),
        Bad("unsupported_file", None, "unpacks to more than"),
    ),
    Case(
        "gzip bomb of one array",
        lambda: gzip.compress(b"[") + _bomb(b" " * 1024**2),
        Bad("unsupported_file", None, "unpacks to more than"),
    ),
    Case("gzip bomb of zeros", lambda: _bomb(bytes(1024**2)), Bad("unsupported_file", None, "binary")),
]

_OTHERS = [
    *(
        _not_rows(f"pickle of protocol {n}", pickle.dumps(_LISTED, n), "pickle" if n != 1 else "")
        for n in range(6)
    ),
    _not_rows("pickle that runs a command", b"cos\nsystem\n(S'touch /tmp/owned'\ntR.", "pickle"),
    _not_rows("pickle of a date", pickle.dumps(datetime.date(2024, 1, 1), 0), "pickle"),
    _not_rows("table of one column with a space", b"Customer review\nGood food\n", "name without spaces"),
    _not_rows("gzip of a pickle", gzip.compress(pickle.dumps(_LISTED)), "pickle", "rows.jsonl.gz"),
    _not_rows("zip", _zip("rows.jsonl"), "zip archive"),
    _not_rows("empty zip", _zip(), "zip archive"),
    _not_rows("spreadsheet", _zip("[Content_Types].xml", "xl/workbook.xml"), "spreadsheet", "rows.csv"),
    _not_rows("tar", _tar(), "tar archive"),
    _not_rows("gzip of a tar", gzip.compress(_tar()), "tar archive", "rows.tar.gz"),
    _not_rows("bzip2", bz2.compress(_ROWS), "bzip2"),
    _not_rows("xz", lzma.compress(_ROWS), "xz"),
    _not_rows("zstd", b"\x28\xb5\x2f\xfd\x04\x58" + _ROWS, "Zstandard"),
    _not_rows("safetensors", _safetensors(), "safetensors"),
    _not_rows("GGUF", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "GGUF"),
    _not_rows("PNG", b"\x89PNG\r\n\x1a\n" + bytes(20), "picture", "rows.json"),
    _not_rows("WebP", b"RIFF\x24\0\0\0WEBPVP8 " + bytes(20), "picture"),
    _not_rows("ORC", b"ORC\n\x0b\0\0\x03", "ORC"),
    _not_rows("Feather", b"FEA1" + bytes(20), "Feather"),
    _not_rows("PDF", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "PDF"),
    _not_rows("ELF", b"\x7fELF\x02\x01\x01" + bytes(60), "program"),
    _not_rows("NumPy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}", "NumPy"),
    _not_rows("SQLite", b"SQLite format 3\x00" + bytes(80), "SQLite"),
    _not_rows("HTML", b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML"),
    _not_rows("HTML after blank lines", b"\n\n  <HTML><head></head></HTML>", "HTML"),
    _not_rows("HTML named CSV", b'<html lang="en">\n<a href="x,y">\n', "HTML", "rows.csv"),
    _not_rows("XML", b'<?xml version="1.0"?>\n<rows/>', "XML"),
    _not_rows("storage's error page", b"<Error><Code>AccessDenied</Code></Error>", "XML"),
    _not_rows("prose", b"Dear all\nhere are the rows, as you asked.\n", "plain text"),
    _not_rows("Markdown", b"# Rows\n\n* one\n* two\n", "plain text"),
    _not_rows("YAML", b"prompt: a question\ncompletion: an answer\n", "plain text"),
    _not_rows("Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ""),
    _not_rows("random bytes", random.Random(7).randbytes(5000), ""),
    _not_rows("NUL bytes", bytes(1000), "binary"),
]

_TEXT = _ROWS.decode()
_ENCODINGS = [
    *(
        _not_rows(f"{name} with its mark", mark + _TEXT.encode(name), "UTF-16")
        for name, mark in {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.items()
    ),
    _not_rows("utf-16-le without mark", _TEXT.encode("utf-16-le"), "UTF-16"),
    _not_rows("utf-16-be without mark", _TEXT.encode("utf-16-be"), "UTF-16"),
    _not_rows("utf-16 table without mark", "prompt,completion\na,b\n".encode("utf-16-le"), "UTF-16", "a.csv"),
    _not_rows("utf-32", _TEXT.encode("utf-32"), "UTF-32"),
    bad("latin-1", _ROWS + line(pair(4, prompt="café")).decode().encode("latin-1"), "not_utf8", 4, "UTF-8"),
    bad(
        "latin-1 table",
        "prompt,completion\na,b c\ncafé,crème brûlée\nd,e f\n".encode("latin-1"),
        "not_utf8",
        3,
        "UTF-8",
        filename="rows.csv",
    ),
    bad(
        "latin-1 array",
        b"[\n" + _ROWS.strip().replace(b"\n", b",\n") + b',\n{"prompt": "caf\xe9"}\n]',
        "not_utf8",
        5,
        "UTF-8",
        filename="rows.json",
    ),
    *(
        bad(
            f"{name} among UTF-8",
            _ROWS + line(pair(4, prompt=text)).decode().encode(name),
            "not_utf8",
            4,
            "UTF-8",
        )
        for name, text in {"cp1254": "Türkiye'ye hoş geldiniz", "cp1250": "Proszę", "cp1257": "māsa"}.items()
    ),
    bad("surrogate in bytes", _ROWS + b'{"prompt": "\xed\xa0\x80"}\n', "not_utf8", 4, "UTF-8"),
    bad("overlong UTF-8", _ROWS + b'{"prompt": "\xc0\xaf"}\n', "not_utf8", 4, "UTF-8"),
    bad("character cut in two", _ROWS + '{"prompt": "é'.encode()[:-1], "not_utf8", 4, "UTF-8"),
    good("byte order mark", b"\xef\xbb\xbf" + _ROWS, 3, "prompt_completion"),
    good(
        "byte order mark in gzip",
        gzip.compress(b"\xef\xbb\xbf" + _ROWS),
        3,
        "prompt_completion",
        "name_mismatch",
    ),
    Case(
        "as many rows as are read",
        lambda: b"".join(line(pair(n)) for n in range(5000)),
        Good(5000, "prompt_completion"),
    ),
    Case(
        "one row too many",
        lambda: b"".join(line(pair(n)) for n in range(5001)),
        Bad("too_many_rows", None, "5000", status=413),
    ),
]

CASES = _NOTHING + _PACKED + _OTHERS + _ENCODINGS
