"""The `graft` command: `up` runs the service, the rest are small clients of its HTTP API."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Column, Table

from cli import control, data, export, show
from cli.connect import (
    HOME,
    URL,
    Format,
    Home,
    Key,
    Mapping,
    Url,
    accept_any_text,
    connected,
    console,
    fail,
    mapping_of,
    tell,
)
from cli.up import up as run_up
from core.errors import GraftError
from graft_client.client import ApiError, Client

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models on your own machines.",
)
app.add_typer(data.app, name="data")
app.add_typer(export.app, name="export")
for command in (control.pause, control.resume, control.cancel, control.retry, control.logs):
    app.command()(command)


@app.callback()
def prepare() -> None:
    accept_any_text()


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of everything [./.graft].")] = None,
) -> None:
    """Run the whole service on this machine until Ctrl-C."""
    try:
        run_up(host, port, home)
    except GraftError as error:
        fail(error.message, code=1)


@app.command()
def train(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="Data set: JSON Lines, a JSON array, CSV or Parquet."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Base model; default: the service's.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published run to start from, such as quick_cpu: see graft presets.")
    ] = None,
    mapping: Mapping = None,
    format_: Format = "auto",
    validation: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Held-back rows, read the same way."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of steps [3].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate [2e-4].")] = None,
    name: Annotated[str | None, typer.Option(help="Name of data set, job and adapter.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to save the adapter's zip.")
    ] = None,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Upload a data set, train an adapter on it, and show how it goes."""
    parts = mapping_of(mapping)
    if steps is not None and epochs is not None:
        fail("Give --steps or --epochs, not both.")
    for option, number in (("--epochs", epochs), ("--learning-rate", learning_rate)):
        if number is not None and not 0 < number < math.inf:
            fail(f"{option} must be a number above 0.")
    if output is not None and not output.parent.is_dir():
        fail(f"{output.parent} is no folder.")
    with connected(url, key, home) as client:
        dataset = client.upload(file, name=name, mapping=parts, format=format_)
        console.print(f"Data set {dataset['id']}: {dataset['rows']} rows, format {dataset['format']}.")
        body: dict[str, Any] = {"dataset_id": dataset["id"], "training": {}}
        if validation is not None:
            body["validation"] = {
                "dataset_id": client.upload(validation, mapping=parts, format=format_)["id"]
            }
        chosen = {"max_steps": steps, "epochs": epochs, "learning_rate": learning_rate}
        body["training"] = {field: value for field, value in chosen.items() if value is not None}
        said = {"model": model, "preset": preset, "name": name}
        body |= {field: value for field, value in said.items() if value is not None}
        job = show.follow(console, client, client.create_job(body)["id"])
        show.outcome(console, job)
        if job["status"] != "succeeded":
            raise typer.Exit(1)
        show.worth(console, job, client.adapter(job["adapter_id"]))
        if output is not None:
            client.download(job["adapter_id"], output)
            console.print(f"Adapter saved to {output}.")


@app.command()
def jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """List the newest jobs."""
    table = Table("name", "status", "step", "loss", Column("job and adapter", no_wrap=True), box=SIMPLE)
    with connected(url, key, home) as client:
        for job in client.jobs(limit):
            loss = job["metrics"].get("train_loss")
            step = f"{job['progress']['step']}/{job['progress']['total_steps'] or '?'}"
            ids = "\n".join(filter(None, (job["id"], job["adapter_id"])))
            table.add_row(
                escape(job["name"]),
                job["phase"] or job["status"],
                step,
                "" if loss is None else f"{loss:.3f}",
                ids,
            )
    console.print(table)


@app.command()
def presets(url: Url = URL, key: Key = None, home: Home = HOME) -> None:
    """List the published runs that `graft train --preset` takes."""
    table = Table(Column("preset", no_wrap=True), "base model", "what it is", box=SIMPLE)
    with connected(url, key, home) as client:
        for preset in client.presets():
            table.add_row(preset["id"], preset["model"] or "any", escape(preset["summary"]))
    console.print(table)


@app.command()
def chat(
    adapter: Annotated[str | None, typer.Option(help="Adapter id; default: the base model alone.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, without an adapter.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Say this one thing and leave.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Talk to a base model or an adapter; an empty line ends it."""
    turns = [{"role": "system", "content": system}] if system else []
    which = {name: value for name, value in {"adapter_id": adapter, "model": model}.items() if value}
    with connected(url, key, home) as client:
        for text in _lines() if message is None else [message]:
            asked = [*turns, {"role": "user", "content": _readable(text)}]
            try:
                answer = _answered(client, messages=asked, max_new_tokens=max_new_tokens, **which)
            except ApiError as error:
                if message is not None:
                    raise
                tell(error)  # the conversation so far stays
            else:
                turns = [*asked, {"role": "assistant", "content": answer}]


def _answered(client: Client, **body: Any) -> str:
    """An answer, written as it comes."""
    answer = ""
    try:
        for event, data in client.stream(**body):
            if event == "token":
                answer += data["text"]
                sys.stdout.write(data["text"])
                sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
    return answer


def _readable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        fail("What you wrote is not UTF-8.")
    return text


def _lines() -> Iterator[str]:
    while True:
        try:
            text = input("you> " if os.isatty(0) else "")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


if __name__ == "__main__":
    app()
