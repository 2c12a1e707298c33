"""What the client commands share: their options, a connection to the service, and errors in a line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cli.tokens import say
from core import strict_json
from core.strict_json import JsonError
from graft_client.client import ApiError, Client, UnreachableError

console = Console()
errors = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", envvar="GRAFT_CLIENT_URL", help="Address of the service.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="GRAFT_CLIENT_KEY", help="API key; default: admin.key of the home folder."),
]
Home = Annotated[Path, typer.Option("--home", envvar="GRAFT_HOME", help="Home folder of the service.")]

Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="Of the data set: auto, messages, prompt_completion, text, alpaca, sharegpt or mapping.",
    ),
]
Mapping = Annotated[
    str | None,
    typer.Option(help='JSON, or @FILE: {"messages": [{"role": …, "content": "{column}"}]}'),
]

URL = "http://127.0.0.1:8000"
HOME = Path(".graft")

_LISTED = 10
_USAGE = 2


def accept_any_text() -> None:
    """What the terminal's encoding cannot write is written as an escape, not answered with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def fail(message: str, hint: str | None = None, *, code: int = _USAGE) -> NoReturn:
    """Say in a line what is wrong, and leave."""
    say(errors, message, style="red")
    if hint:
        say(errors, hint)
    raise typer.Exit(code)


@contextmanager
def connected(url: str, key: str | None, home: Path) -> Iterator[Client]:
    """A client; what goes wrong in it is told in a line or two."""
    try:
        with Client(url, key or _kept_key(home)) as client:
            yield client
    except ApiError as error:
        tell(error)
        raise typer.Exit(1) from None
    except UnreachableError as error:
        fail(f"{error} Start it with: graft up", code=1)
    except OSError as error:
        fail(f"{error.filename or 'A file'}: {error.strerror or error}.", code=1)


def tell(error: ApiError) -> None:
    """What the service says is wrong."""
    say(errors, error.message, style="red")
    for item in error.errors[:_LISTED]:
        if item["message"] != error.message:
            say(errors, f"  {item.get('line') or item.get('field')}: {item['message']}")
    if error.hint:
        say(errors, error.hint)


def _kept_key(home: Path) -> str:
    file = home / "admin.key"
    if not file.is_file():
        fail(f"No API key: give --key or GRAFT_CLIENT_KEY, or run where {file} lies.", code=1)
    return file.read_text().strip()


def require_file(path: Path, what: str = "file") -> None:
    """End here unless it is a file that can be read."""
    try:
        if not path.exists():
            fail(f'There is no {what} "{path}".')
        if not path.is_file():
            fail(f'"{path}" is not a file.')
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        fail(f'"{path}" cannot be read: {getattr(error, "strerror", None) or error}.')


def mapping_of(text: str | None) -> dict[str, Any] | None:
    """The value of --mapping: JSON, or the name of a file with it after an @."""
    if text is None:
        return None
    if text.startswith("@"):
        file = Path(text[1:])
        require_file(file)
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            fail(f'--mapping: "{file}" is not UTF-8 (byte {error.start + 1}).')
    try:
        value = strict_json.loads(text, depth=strict_json.DEPTH)
    except JsonError as error:
        fail(f"--mapping: {error.message}", error.hint)
    if not isinstance(value, dict):
        fail('--mapping must be a JSON object, such as {"prompt": "{question}", "completion": "{answer}"}.')
    return value
