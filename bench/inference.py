"""How fast are answers? Graft's engine beside plain transformers and peft, and llama.cpp where it is installed, in one run.

    python -m bench.inference [--requests 8] [--tokens 48] [--context 1500] [--rounds 3] [--bits 16] [--llama PYTHON]

Every figure is new tokens in a second of all requests together, from asking to the last token. All write the same number
of tokens to the same prompts, the most likely token each time, on SmolLM2 in the same precision. What is compared takes
turns within each round, each side in a process of its own, for two pools of threads in one process slow each other down;
the medians of the rounds are told. Adapters are random, rank 16 on all linear layers. `--llama` is an interpreter that has
llama-cpp-python: it reads SmolLM2's 4-bit GGUF file on as many threads, one request after the other, for it batches no
different adapters.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.answering import LLAMA_NAME, SIDES, Side, line_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, choices=[4, 16], default=16)
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(SIDES[options.side](options))
        return
    with tempfile.TemporaryDirectory() as folder:
        rates = compared(options, folder)
    show(options, rates)


def serve(side: Side) -> None:
    """One measurement for every line that names it."""
    print(json.dumps(list(side.measures)), flush=True)
    for line in sys.stdin:
        print(side.measures[line.strip()](), flush=True)
    side.close()


def compared(options: argparse.Namespace, folder: str) -> dict[str, float]:
    """Tokens in a second of everything that there is to compare."""
    sides: dict[str, subprocess.Popen[str]] = {}
    processes = []
    try:
        for side in ["peers", "ours"] + ["llama"] * bool(options.llama):
            command = [
                sys.executable,
                "-m",
                "bench.inference",
                *sys.argv[1:],
                "--side",
                side,
                "--folder",
                folder,
            ]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            sides |= dict.fromkeys(json.loads(line_of(process)), process)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, process in sides.items():
                rate = float(line_of(process, name))
                if number:  # the first round warms up
                    rates[name].append(rate)
                    print(f"{name}: {rate:.1f} tokens/s", flush=True)
    finally:
        for process in processes:
            process.communicate()
    return {name: statistics.median(values) for name, values in rates.items()}


def show(options: argparse.Namespace, rates: dict[str, float]) -> None:
    print()
    for name, rate in rates.items():
        print(f"{rate:8.1f} tokens/s  {name}")
    late = f"{options.context} tokens before"
    pairs = [
        ("engine, base", "generate, base, one after the other"),
        ("engine, 8 adapters", "generate, base, one after the other"),
        ("engine, 8 adapters", "generate, 8 adapters, one after the other"),
        ("engine, 8 adapters", "peft mixed batch, 8 adapters"),
        ("engine, base", "generate, base, one static batch"),
        ("engine, one request", "generate, one request"),
        (f"engine, {late}", f"static batch, {late}"),
    ]
    if options.llama:
        pairs += [(one, LLAMA_NAME) for one in ("engine, 8 adapters", "engine, one request")]
    for one, other in pairs:
        print(f"{rates[one] / rates[other]:6.2f} x  {one} : {other}")


if __name__ == "__main__":
    main()
