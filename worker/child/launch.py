"""One training in several processes: `accelerate launch` starts the ranks, and this trainer process speaks for them.

Each rank gets its run over a Unix socket that only those can use who know its key. The first rank's reports go on to
the worker, and the worker's "stop" goes to every rank. The ranks end when this process does, or with any one of them.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any

import torch

from core.errors import GraftError
from core.ml.training.loop.reporter import Report
from core.ml.training.run import Run
from worker.child.parent import end_with_parent

logger = logging.getLogger(__name__)

ADDRESS, KEY = "TRAINING_RANKS_ADDRESS", "TRAINING_RANKS_KEY"
# How a rank's work ends; after its last word it waits to be let go.
ENDS = ("done", "stopped", "again", "error")

_TICK_SECONDS = 0.2
# A rank that broke takes others with it, which then report errors of their own: its end is seen by now.
_GRACE_SECONDS = 1.0
_PATIENCE_SECONDS = 10.0

Ending = tuple[str, dict[str, Any]]


def train(run: Run, job_id: str, report: Report, stop: Callable[[], bool]) -> None:
    """Train with `run.processes` ranks. A rank that the system kills takes this process with it: what the worker makes
    of that, short of memory or not, is as for a training in one process.

    Raises:
        GraftError: `too_few_devices`, `sharding_needs_gpus`.
    """
    _check(run)
    key = secrets.token_bytes(32)
    ranks: list[Connection] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-")))
        with socket.socket(socket.AF_UNIX) as server:
            address = str(folder / "ranks")
            server.bind(address)
            server.listen(run.processes)
            launcher = _launch(run, address, key)
            stack.callback(_let_go, ranks, launcher)
            _meet(ranks, run, job_id, server, key, launcher)
        ending = _ending(ranks, report, stop)
        if ending is None and (broken := _faults(folder)):
            logger.error("A training process broke: %s", broken)
            raise SystemExit(1)
    if ending is None:
        # Every error would have been told, and every fault written down.
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        report(ending[0], **ending[1])


def fault_file(address: str, index: int) -> Path:
    """Where a rank writes the signal that ends it, if it is one that a process can be told of."""
    return Path(address).with_name(f"fault-{index}")


def _faults(folder: Path) -> str:
    """What the ranks' fault files say, given the moment that a dying process needs."""
    time.sleep(_GRACE_SECONDS)
    return "\n".join(text for file in sorted(folder.glob("fault-*")) if (text := file.read_text().strip()))


def _check(run: Run) -> None:
    if not torch.cuda.is_available():
        if run.sharded:
            raise GraftError(
                "sharding_needs_gpus",
                "This worker is set to share each model among its GPUs, and it has none.",
                hint="Run it with GRAFT_TRAINER_SHARDING=ddp.",
            )
    elif torch.cuda.device_count() < run.processes:
        raise GraftError(
            "too_few_devices",
            f"This worker is set to train with {run.processes} processes, and it has {torch.cuda.device_count()} GPUs.",
            hint="Run it with no more GRAFT_TRAINER_PROCESSES than GPUs.",
        )


def _launch(run: Run, address: str, key: bytes) -> subprocess.Popen[bytes]:
    cpu = not torch.cuda.is_available()
    threads = os.environ.get("OMP_NUM_THREADS") or max(torch.get_num_threads() // run.processes, 1)
    how = ["--multi_gpu"]  # what it calls every training in several processes of one machine
    if run.sharded:
        how = ["--use_fsdp", "--fsdp_version=2", "--fsdp_state_dict_type=FULL_STATE_DICT"]
        how += ["--fsdp_cpu_ram_efficient_loading=false"]
    return subprocess.Popen(  # noqa: S603
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *how),
            *(
                f"--num_processes={run.processes}",
                "--num_machines=1",
                "--machine_rank=0",
                "--main_process_port=0",
            ),
            *("--mixed_precision=no", "--dynamo_backend=no", f"--num_cpu_threads_per_process={threads}"),
            *("--module", "worker.child.rank"),
        ],
        # On one machine, so that the loopback serves; nobody else has to hear it.
        env={"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        | os.environ
        | {ADDRESS: address, KEY: key.hex(), "ACCELERATE_USE_CPU": str(cpu).lower()},
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - async-signal-safe: one system call
    )


def _meet(
    ranks: list[Connection],
    run: Run,
    job_id: str,
    server: socket.socket,
    key: bytes,
    launcher: subprocess.Popen[bytes],
) -> None:
    """Accept the ranks and tell them their run."""
    server.settimeout(_TICK_SECONDS)
    while len(ranks) < run.processes:
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            if (code := launcher.poll()) is not None:
                raise SystemExit(f"accelerate launch ended with exit code {code}") from None
            continue
        accepted.setblocking(True)
        rank = Connection(accepted.detach())
        deliver_challenge(rank, key)
        answer_challenge(rank, key)
        rank.send((run, job_id))
        ranks.append(rank)


def _ending(ranks: list[Connection], report: Report, stop: Callable[[], bool]) -> Ending | None:
    """Relay until all is said: the end that the first rank tells, or what went wrong in any; None if one broke."""
    wrong: Ending | None = None
    until, told = float("inf"), False
    while time.monotonic() < until:
        if not told and stop():
            told = True
            for rank in ranks:
                with contextlib.suppress(OSError):
                    rank.send("stop")
        ready = wait(ranks, _TICK_SECONDS)
        for rank in [rank for rank in ranks if rank in ready]:
            try:
                index, kind, data = rank.recv()
            except (EOFError, OSError):
                return None
            if kind in ("again", "error"):
                wrong = wrong or (kind, data)
                until = min(until, time.monotonic() + _GRACE_SECONDS)
            elif kind not in ENDS:
                report(kind, **data)
            elif index == 0:
                return kind, data
    return wrong


def _let_go(ranks: list[Connection], launcher: subprocess.Popen[bytes]) -> None:
    """See the ranks gone, and what they held of the devices with them: they end when their line is closed."""
    for rank in ranks:
        rank.close()
    if not ranks:
        launcher.terminate()
    try:
        launcher.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()  # the ranks with it
        launcher.wait()
