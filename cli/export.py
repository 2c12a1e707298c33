"""`graft export`: an adapter in another form, or a job's training for another tool."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli import show
from cli.connect import HOME, URL, Home, Key, Url, connected, console, fail
from cli.tokens import say

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take an adapter or a job to other tools.",
)


class Form(StrEnum):
    MERGED = "merged"
    GGUF = "gguf"


class Tool(StrEnum):
    TRL = "trl"
    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"


@app.command()
def job(
    job_id: Annotated[str, typer.Argument(metavar="JOB_ID")],
    tool: Annotated[Tool, typer.Option("--as", help="The tool to write it for.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; default: standard output.")
    ] = None,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Write a job's training as a TRL script, or as YAML for axolotl or LLaMA-Factory."""
    _check(output)
    with connected(url, key, home) as client:
        text = client.script(job_id, tool)
    if output is None:
        sys.stdout.write(text)
        return
    output.write_text(text, encoding="utf-8")
    say(console, f"Written to {output}. The top of the file says how to get its data.")


@app.command()
def adapter(
    adapter_id: Annotated[str, typer.Argument(metavar="ADAPTER_ID")],
    format_: Annotated[
        Form, typer.Option("--format", help="merged: 16-bit safetensors; gguf: for llama.cpp and Ollama.")
    ] = Form.MERGED,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to save the zip.")] = None,
    url: Url = URL,
    key: Key = None,
    home: Home = HOME,
) -> None:
    """Merge an adapter into its base model, and show how near the result is to it."""
    _check(output)
    with connected(url, key, home) as client:
        done = show.follow(console, client, client.export(adapter_id, format_)["id"])
        if done["status"] != "succeeded":
            show.outcome(console, done)
            raise typer.Exit(1)
        made = client.made_export(adapter_id, done["spec"]["export"]["export_id"])
        found = made["report"]["merged"]
        console.print(
            f"Export {made['id']}: mean KL {found['mean_kl']} to base and adapter, "
            f"same first choice {found['top1_agreement']:.1%}."
        )
        for reason in made["report"]["reasons"]:
            console.print(reason, style="bold")
        if output is not None:
            client.download_export(adapter_id, made["id"], output)
            console.print(f"Saved to {output}.")


def _check(output: Path | None) -> None:
    if output is not None and not output.parent.is_dir():
        fail(f"{output.parent} is no folder.")
