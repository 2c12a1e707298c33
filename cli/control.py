"""What may be asked of a job that is there: `graft pause`, `resume`, `cancel`, `retry`, `logs`."""

from typing import Annotated, Any

import typer

from cli.connect import HOME, URL, Home, Key, Url, connected, console, fail
from core import strict_json
from core.strict_json import JsonError

Job = Annotated[str, typer.Argument(help="Id of the job: see graft jobs.")]


def pause(job: Job, url: Url = URL, key: Key = None, home: Home = HOME) -> None:
    """Pause a job: it saves a checkpoint after its step and frees the device."""
    with connected(url, key, home) as client:
        _tell(client.pause(job), "is about to pause")


def resume(job: Job, url: Url = URL, key: Key = None, home: Home = HOME) -> None:
    """Let a paused job go on."""
    with connected(url, key, home) as client:
        _tell(client.resume(job))


def cancel(job: Job, url: Url = URL, key: Key = None, home: Home = HOME) -> None:
    """Cancel a job; a running one stops after its step."""
    with connected(url, key, home) as client:
        _tell(client.cancel(job), "is about to stop")


def retry(
    job: Job,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A change to its spec, such as training.learning_rate=1e-4; as many as you like."
        ),
    ] = None,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Make a new attempt of a failed or cancelled job, from its last checkpoint."""
    body: dict[str, Any] = {}
    for change in changes or []:
        _put(body, change)
    with connected(url, key, home) as client:
        _tell(client.retry(job, body))


def logs(job: Job, url: Url = URL, key: Key = None, home: Home = HOME) -> None:
    """Print what worker and trainer wrote about a job."""
    with connected(url, key, home) as client:
        for line in client.logs(job):
            typer.echo(line)


def _put(body: dict[str, Any], change: str) -> None:
    """Add PART.FIELD=VALUE to a request; the value is JSON, or a plain word."""
    name, given, text = change.partition("=")
    *parts, field = name.strip().split(".")
    if not given or not all([*parts, field]):
        fail(f'--set "{change}" must be FIELD=VALUE, such as training.learning_rate=1e-4.')
    for part in parts:
        body = body.setdefault(part, {})
        if not isinstance(body, dict):
            fail(f'--set "{change}" says something about {part}, which is given as a whole already.')
    try:
        body[field] = strict_json.loads(text, depth=strict_json.DEPTH)
    except JsonError:
        body[field] = text


def _tell(job: dict[str, Any], running: str = "runs") -> None:
    status = running if job["status"] == "running" else f"is {job['status']}"
    console.print(f"Job {job['id']} {status}.", markup=False)
