"""Which kind of file this is, by its content; its name is only compared."""

import codecs
import json
import re

from core.errors import BadRequest
from core.ml.formats.files.rows import FileType, unsupported, without_marks
from core.ml.formats.files.tables import first_record, separators

HEAD = 4096
GZIP = b"\x1f\x8b"

_OTHERS = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet or PyTorch file, which are zip archives)",
    b"PK\x05\x06": "an empty zip archive",
    GZIP: "a gzip file inside a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"ARROW1": "an Arrow IPC file",
    b"SQLite format 3": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"Obj\x01": "an Avro file",
    b"{\\rtf": "an RTF document",
    b"\xff\xfe\0\0": "text in UTF-32",
    b"\0\0\xfe\xff": "text in UTF-32",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
# Letters that a table may begin with, too, if no NUL follows.
_OTHERS_WITH_NUL = {
    b"ORC": "an ORC file",
    b"FEA1": "a Feather file",
    b"RIFF": "a picture, a film or a sound",
}
_PICKLE = re.compile(rb"\x80[\x02-\x05]|[}\])]q\x00|\((?:dp|lp)\d")
# One in text that begins with a class, what is done with it, and the full stop at its end.
_CLASS = rb"c[\w.]+\n[\w.]+\n"
_PICKLED_CLASS = re.compile(
    _CLASS + rb"(?:p\d+\n)?(?:\.|\(+(?:" + _CLASS + rb"|S['\"]|[FIL][\d.-]+L?\n|V[^\n]*\np\d|[dlt](?:R|p\d)))"
)
_MARKUP = re.compile(
    rb"<(?:!doctype|html|head|body|title|meta|script|div|h\d|p|pre|center|svg|error|\?xml|!--)[\s>-]|<!doctype",
    re.IGNORECASE,
)
# A JSON object that holds the rows in a list, and perhaps says something else before.
_DOCUMENT = re.compile(
    rb'\{\s*(?:"\w+"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,\s*)*'
    rb'"(rows|data|dataset|examples|samples|records|items|train|instances)"\s*:\s*\['
)
# The beginning of a row in JSON or Python, and the end of one.
_OBJECT = re.compile(r"\s*\{\s*[\"']")
_FRAGMENT = re.compile(r"""["']\s*:.*\},?\s*$""")
# Several names, as nobody would write a sentence.
_NAMES_OF_COLUMNS = re.compile(r'"?[^\W\d][\w .-]*"?(?:[,;\t|]"?[^\W\d][\w .-]*"?)+')
_NAMES = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "csv",
    "parquet": "parquet",
}
_SAFETENSORS_HEADER = 8


def file_type(head: bytes) -> FileType:
    """The type of a file that begins with these bytes (up to HEAD of them, unpacked).

    Raises:
        BadRequest: `unsupported_file`, saying what it looks like, or `empty_file`.
    """
    _refuse_others(head)
    if head.startswith(b"PAR1"):
        return "parquet"
    start = without_marks(head).lstrip(b" \t\r\n")
    if not start:
        raise BadRequest("empty_file", "The file has no rows.", param="file")
    if start[:4].count(0) == 3:
        raise unsupported("The file is text in UTF-32.", "Save it as UTF-8.")
    if b"\0" in start[:2] and _only_nul(head[::2]) != _only_nul(head[1::2]):
        raise unsupported("The file is text in UTF-16.", "Save it as UTF-8.")
    if b"\0" in start[:2] or (b"\0" in head and not _is_utf8(head)):
        raise unsupported("The file holds binary data, not text.")
    if start.startswith(b"["):
        return "json"
    if start.startswith(b"{"):
        _refuse_document(start)
        return "jsonl"
    if _MARKUP.match(start):
        raise unsupported(
            "The file is an HTML or XML page, perhaps a login or error page saved in its place."
        )
    return "csv" if _is_table(start, cut=len(head) >= HEAD) else "jsonl"


def _refuse_others(head: bytes) -> None:
    for magic, what in (_OTHERS | _OTHERS_WITH_NUL if b"\0" in head else _OTHERS).items():
        if head.startswith(magic):
            hint = "Save it as UTF-8." if "UTF-" in what else None
            raise unsupported(f"The file is {what}, not JSON Lines, a JSON array, CSV or Parquet.", hint)
    if _PICKLE.match(head) or (_PICKLED_CLASS.match(head) and (len(head) >= HEAD or head.endswith(b"."))):
        raise unsupported("The file is a Python pickle, which can run code when it is read, so it never is.")
    if head[_SAFETENSORS_HEADER:].startswith(b'{"') and b"\0" in head[:_SAFETENSORS_HEADER]:
        raise unsupported("The file is a safetensors file: weights, not rows.")
    if head[257:262] == b"ustar":
        raise unsupported("The file is a tar archive.")


def _only_nul(every_other: bytes) -> bool:
    return not every_other[:32].strip(b"\0")


def _is_utf8(head: bytes) -> bool:
    """Whether this is UTF-8, but for a last character that may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _refuse_document(start: bytes) -> None:
    """A JSON object over several lines that holds the rows in a list; of its lines, each would be an error."""
    first, _, rest = start.partition(b"\n")
    found = _DOCUMENT.match(start)
    if found is None or not rest or _is_object(first) or b"\n" + found[0] in start:
        return
    name = found[1].decode()
    raise unsupported(
        f'The file is one JSON object over several lines, with its rows in the list "{name}".',
        f'Upload that list alone, for example made with: jq -c ".{name}[]" FILE',
    )


def _is_table(start: bytes, *, cut: bool) -> bool:
    """Several names, or a single one; else it is most likely JSON Lines with a broken first line."""
    lines = start.decode("utf-8", "replace").splitlines()
    header = "\n".join(first_record(iter(lines)))
    following = [line for line in lines[header.count("\n") + 1 :] if line.strip()]
    if any(map(_is_object, following)) or _FRAGMENT.search(lines[0]):
        return False
    header = header.strip()
    if following and _OBJECT.match(following[0]):
        last = cut and len(following) == 1
        if (last or _FRAGMENT.search(following[0])) and not _is_cell(following[0], header, cut=last):
            return False
    if separators(header):
        return True
    if not re.fullmatch(r'"?[^\W\d]\w*"?|\'[^\']*\'', header) or header in ("null", "true", "false"):
        if re.match(r"[^\W\d]|[#*]", header) and header[:4] not in ("null", "true", "fals"):
            raise unsupported(
                "The file is plain text, not rows.",
                "If it is CSV with a single column, give that a name without spaces, such as text, in the first line; "
                "or upload JSON Lines (one JSON object a line).",
            )
        return False
    return b"\n" in start


def _is_cell(row: str, header: str, *, cut: bool) -> bool:
    """Whether a row that begins like an object is one of a table, whose separator stands behind that object."""
    if not _NAMES_OF_COLUMNS.fullmatch(header):
        return False
    if (mark := separators(header)[0]) == ",":
        return cut or _is_object(row[: row.find("},") + 1])
    return cut or mark in row


def _is_object(line: str | bytes) -> bool:
    """Whether a line holds a row: in a table, its quotes would be written twice."""
    try:
        value = json.loads(line.rstrip()[:-1] if line.rstrip()[-1:] in (",", b",") else line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


def name_mismatch(filename: str, kind: FileType, packed: bool) -> str | None:
    """What the name says wrongly about the content, in words."""
    parts = filename.lower().split(".")[1:]
    says_packed = bool(parts) and parts[-1] in ("gz", "gzip")
    named = _NAMES.get(parts[-2] if says_packed and len(parts) > 1 else parts[-1] if parts else "")
    if (named and named != kind) or (parts and (says_packed != packed)):
        return f'The name "{filename}" does not say what is in the file: {label(kind, packed)}.'
    return None


def label(kind: FileType, packed: bool) -> str:
    names = {"jsonl": "JSON Lines", "json": "a JSON array", "csv": "CSV", "parquet": "Parquet"}
    return names[kind] + (", packed with gzip" if packed else "")
