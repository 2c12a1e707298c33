"""`graft data`: what is in a data set file, what of it would be trained, and the same for other tools."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import show
from cli.connect import (
    HOME,
    URL,
    Format,
    Home,
    Key,
    Mapping,
    Url,
    connected,
    console,
    fail,
    mapping_of,
    require_file,
)
from cli.tokens import say
from graft_client.client import Client, Json

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Check a data set file, see what of it would be trained, and have that as plain conversations.",
)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON Lines, a JSON array, CSV or Parquet; plain or gzip.")],
    format_: Format = "auto",
    mapping: Mapping = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="DATASET_ID", help="Data set that must not share rows with the file."),
    ] = None,
    repair: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write the repaired file there, as JSON Lines.")
    ] = None,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Say what is in a file and what is wrong with it; nothing is kept. Ends with 1 if it cannot be trained."""
    parts = mapping_of(mapping)
    require_file(file)
    if repair is not None and repair.exists():
        what = "is the file itself" if repair.samefile(file) else "is there already and is not overwritten"
        fail(f'--repair: "{repair}" {what}; give another name.')
    if repair is not None and not repair.parent.is_dir():
        fail(f'--repair: there is no folder "{repair.parent}".')
    with connected(url, key, home) as client:
        found = client.validate(file, format=format_, mapping=parts, compare_with=against)
        show.report(console, str(file), found)
        if not found["valid"] and found["mapping"] not in (None, parts):
            say(console, f"\nThe mapping to use:\n  {_option(found['mapping'])}", style="bold")
        if repair is not None:
            _write_repaired(client, found, file, repair, format_, parts)
    if not found["valid"]:
        raise typer.Exit(1)


@app.command(name="show")
def show_(
    data: Annotated[
        str, typer.Argument(metavar="FILE|DATASET_ID", help="A file, or the id of a data set of the service.")
    ],
    n: Annotated[int, typer.Option("-n", min=1, max=100, help="So many rows.")] = 3,
    model: Annotated[str | None, typer.Option(help="Base model; default: the service's.")] = None,
    loss_on: Annotated[str, typer.Option(help="auto, assistant, completion or all.")] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(min=8, help="Cut longer rows to so many tokens, as overlength truncate does."),
    ] = None,
    format_: Format = "auto",
    mapping: Mapping = None,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Show the first rows token by token, and which tokens are trained. A file is not kept."""
    parts = mapping_of(mapping)
    file = Path(data)
    is_file = not data.startswith("ds_") or file.exists()
    if is_file:
        require_file(file, "file or data set")
    elif parts is not None or format_ != "auto":
        fail(f"--format and --mapping are for files; data set {data} has its own.")
    asked = {"n": n, "model": model, "loss_on": loss_on, "max_length": max_length}
    asked = {name: value for name, value in asked.items() if value is not None}
    with connected(url, key, home) as client:
        if is_file:
            with _for_a_moment(client, file, format_, parts) as dataset:
                preview = client.preview(dataset["id"], **asked)
        else:
            dataset = client.dataset(data)
            preview = client.preview(data, **asked)
        show.preview(console, dataset, preview)


@app.command()
def conversations(
    dataset_id: Annotated[str, typer.Argument(metavar="DATASET_ID")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")],
    loss_on: Annotated[str, typer.Option(help="auto, assistant, completion or all.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Base model: what its chat template does not write becomes text.")
    ] = None,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Write a data set for other tools, as it would be trained: one conversation in OpenAI's form a line."""
    if output.exists():
        fail(f'"{output}" is there already and is not overwritten; give another name.')
    if not output.parent.is_dir():
        fail(f'There is no folder "{output.parent}".')
    asked = {"loss_on": loss_on} | ({"model": model} if model is not None else {})
    with connected(url, key, home) as client:
        client.conversations(dataset_id, output, **asked)
    say(console, f"Written to {output}.")


@contextmanager
def _for_a_moment(client: Client, file: Path, kind: str, mapping: Json | None) -> Iterator[Json]:
    """The file as a data set, deleted again however this ends."""
    dataset = client.upload(file, format=kind, mapping=mapping)
    try:
        yield dataset
    finally:
        client.delete_dataset(dataset["id"])


def _write_repaired(
    client: Client, found: Json, file: Path, target: Path, kind: str, mapping: Json | None
) -> None:
    if found["repair"] is None:
        why = "The file is right as it is" if found["valid"] else "There is nothing that a repair could mend"
        say(console, f"\n{why}; {target} is not written.")
        return
    client.repaired(file, target, format=kind, mapping=mapping)
    kept = found["repair"]["rows"]
    say(
        console,
        f"\n{target} has the {kept} rows of the repaired file. Look at it before you train on it:",
        style="bold",
    )
    options = [] if kind == "auto" else ["--format", shlex.quote(kind)]
    if found["mapping"] is not None:
        options = [_option(found["mapping"])]
    say(console, "  " + " ".join(["graft data check", shlex.quote(str(target)), *options]))


def _option(mapping: Any) -> str:
    return f"--mapping {shlex.quote(json.dumps(mapping, ensure_ascii=False))}"
