"""Jobs on a terminal: a live bar with loss and time left, and the outcome."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from graft_client.client import Client


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
