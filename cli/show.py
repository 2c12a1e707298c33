"""What the commands print: a job with its live bar and outcome, and what is in a data set."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from cli import tokens
from cli.tokens import say
from graft_client.client import Client

_TRAINED = {
    "assistant": "every answer of the assistant, with its end; weight 0 is left out",
    "completion": "the last answer of each row, with its end",
    "all": "every token",
}
_DIFF_STYLES = {"-": "red", "+": "green", "@": "cyan"}


def follow(console: Console, client: Client, job_id: str) -> dict[str, Any]:
    """Show a job until it has ended; Ctrl-C leaves it running. Returns the finished job."""
    job: dict[str, Any] = {}
    console.print(f"Job {job_id} (Ctrl-C leaves it running).")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task("queued", total=None, facts="")
        said = ""
        for job in client.watch(job_id):
            phase = (job["phase"] or job["status"]).replace("_", " ")
            at = job["progress"]
            progress.update(
                task, description=phase, completed=at["step"], total=at["total_steps"], facts=_facts(job)
            )
            if not console.is_terminal and (part := _part(job, phase)) != said:
                said = part
                console.print(f"{part} {_facts(job)}", markup=False, highlight=False)
    return job


def outcome(console: Console, job: dict[str, Any]) -> None:
    if job["status"] == "succeeded":
        metrics = job["metrics"]
        console.print(f"Succeeded. Adapter {job['adapter_id']}, training loss {metrics['train_loss']:.3f}.")
        if "eval_loss" in metrics:
            console.print(
                f"Loss on the validation rows: base {metrics['base_eval_loss']:.3f}, adapter {metrics['eval_loss']:.3f}."
            )
        console.print(f"Talk to it: graft chat --adapter {job['adapter_id']}")
        return
    error = job["error"] or {}
    console.print(f"Job {job['status']}. {error.get('message', '')}", markup=False)
    if error.get("hint"):
        console.print(error["hint"], markup=False)


def worth(console: Console, job: dict[str, Any], adapter: dict[str, Any]) -> None:
    """The verdict of the adapter's certificate, what does not hold, and where it lies against its preset's band."""
    certificate = adapter["certificate"]
    say(console, certificate["evaluation"]["verdict"]["words"])
    for check in certificate["checks"]:
        if not check["ok"]:
            say(console, f"{check['name']}: {check['detail']}", style="yellow")
    if job["preset"] and job["preset"]["result"]:
        say(console, job["preset"]["result"]["words"])


def report(console: Console, name: str, found: dict[str, Any]) -> None:
    """What a validation found: format, rows, lengths, errors, warnings and the repair."""
    can = "can be trained" if found["valid"] else "cannot be trained as it is"
    say(console, f"{name} {can}.", style="bold green" if found["valid"] else "bold red")
    facts = found["report"]
    if detection := facts.get("detection"):
        layout = f' in the layout "{detection["layout"]}"' if detection["layout"] else ""
        say(console, f"format    {found['format']}{layout}, {detection['confidence']}: {detection['why']}")
        if detection["alternatives"]:
            say(console, f"          It could also be: {', '.join(detection['alternatives'])}.")
    if found["columns"]:
        say(console, f"columns   {', '.join(found['columns'])}")
    if found["rows"]:
        say(console, f"rows      {found['rows']}")
    if any((length := facts.get("length") or {}).values()):
        half, most, longest = length["p50"], length["p95"], length["max"]
        say(
            console,
            f"length    half of the rows up to {half} characters, 95 % up to {most}, the longest {longest}",
        )
    _errors(console, found)
    if warnings := facts.get("warnings"):
        say(console, f"warnings  {facts['warning_count']}", style="yellow")
        for warning in warnings:
            say(console, f"  {warning['message']}{_lines(warning)}")
    if found["repair"]:
        _repair(console, found["repair"])


def preview(console: Console, dataset: dict[str, Any], shown: dict[str, Any]) -> None:
    """The previewed rows of a data set, with what is trained of them."""
    by = dataset["mapping"] or {}
    layout = f' in the layout "{by["layout"]}"' if by.get("layout") else ""
    say(console, f"{dataset['name']}: {dataset['rows']} rows, format {dataset['format']}{layout}")
    say(console, f"model     {shown['model']}")
    if "text" in by and not layout:
        say(console, "template  none: the rows are plain texts\ntrained   the whole text, with its end")
    else:
        own = "the model's own" if shown["template"] == "model" else "plain text, as the model has none"
        say(console, f"template  {own} (sha256 {shown['template_sha256'][:12]})")
        say(console, f"trained   {_TRAINED[shown['loss_on']]}")
    for row in shown["rows"]:
        say(
            console,
            f"\nline {row['line']}: {row['n_tokens']} tokens, {row['n_trained']} trained{_faults(row)}",
            "bold",
        )
        tokens.print_row(console, row)
        if len(row["tokens"]) < row["n_tokens"]:
            say(console, f"… the first {len(row['tokens'])} tokens of it are shown.")
    if shown["stopped"]:
        say(console, "\nFurther rows are not shown: these are long.")
    totals, ends = shown["totals"], sum(row["ends_trained"] for row in shown["rows"])
    say(
        console,
        f"\n{tokens.legend(console)}: {totals['trained']} of {totals['tokens']} tokens in {totals['rows']} rows. "
        f"Too long (over {shown['limit']}): {totals['too_long']}, truncated: {totals['truncated']}. "
        f"The end is trained in {ends} of {totals['rows']} rows.",
    )


def _errors(console: Console, found: dict[str, Any]) -> None:
    if not found["errors"]:
        return
    say(console, f"errors    {found['error_count']}", style="red")
    listed = [
        (f"line {item['line']}" if item["line"] else "file", item["field"], _told(item, found["mapping"]))
        for item in found["errors"]
    ]
    where, what = max(len(item[0]) for item in listed), max(len(item[1]) for item in listed)
    for line, field, told in listed:
        say(console, f"  {line:<{where}}  {field:<{what}}  {told}")
    if (left := found["error_count"] - len(listed)) > 0:
        say(console, f"  and {left} more")


def _told(item: dict[str, Any], mapping: Any) -> str:
    # This hint would be the mapping, which is printed below, ready to be copied.
    said_below = mapping is not None and (item["code"], item["field"]) == ("unknown_format", "mapping")
    return f"{item['message']}  ({item['hint']})" if item["hint"] and not said_below else str(item["message"])


def _lines(warning: dict[str, Any]) -> str:
    if not warning["lines"]:
        return ""
    more = ", …" if warning["count"] > len(warning["lines"]) else ""
    word = "line" if warning["count"] == 1 else "lines"
    return f"  ({word} {', '.join(map(str, warning['lines']))}{more})"


def _repair(console: Console, repair: dict[str, Any]) -> None:
    say(
        console,
        f"repair    {repair['rows']} rows, {repair['changed']} of them changed, {repair['left_out']} left out; the first:",
        style="cyan",
    )
    for line in repair["diff"].splitlines():
        say(console, f"  {line}", style=_DIFF_STYLES.get(line[:1]))


def _faults(row: dict[str, Any]) -> str:
    faults = []
    if row["truncated"]:
        faults.append("truncated")
    elif row["too_long"]:
        faults.append("too long even without its prompt")
    if not row["ends_trained"]:
        faults.append("its end is not trained")
    return "".join(f", {fault}" for fault in faults)


def _facts(job: dict[str, Any]) -> str:
    facts = []
    if (loss := job["metrics"].get("train_loss")) is not None:
        facts.append(f"loss {loss:.3f}")
    at = job["progress"]
    if at["tokens_per_second"] is not None and job["status"] == "running":
        facts.append(f"{at['tokens_per_second']:.0f} tokens/s")
    if at["eta_seconds"] is not None:
        minutes, seconds = divmod(round(at["eta_seconds"]), 60)
        facts.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(facts)


def _part(job: dict[str, Any], phase: str) -> str:
    """What has a line of its own in logs and pipes: each phase, and each tenth of the training."""
    at = job["progress"]
    if phase != "training" or not at["total_steps"]:
        return phase
    return f"{phase} {at['step'] * 10 // at['total_steps'] * 10} %"
