"""How soon does an answer begin, and what does HTTP take of it?

    python -m bench.latency [--requests 8] [--tokens 48] [--context 1500] [--rounds 3]

Four figures on SmolLM2 in 16 bits: the first token of a long prompt, unknown and known but for its last question; an adapter
of rank 16 from its files into memory; the rate of requests at once through a whole service (client, API, engine's server) beside
the same requests to an engine in this process, in turns.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

from bench.answering import adapter_of, asked_of
from bench.service import running
from core import settings
from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.catalogue import Catalogue
from core.ml.inference.answering import Finish, Told
from core.ml.inference.batch.lora import linear_layers
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from core.ml.inference.store import files
from core.ml.quantization import Quantization


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = settings.load()
    models = Catalogue(found.models_folder, found.models, found.allow_hub)
    model = catalogue.find(models, found.default_model)
    base_model.prepare(model)
    precision = base_model.settle(Quantization(bits=16))
    contract = contracts.load(model.path)
    engine = Engine(models, precision)
    try:
        first_tokens(engine, model.name, contract, options)
        # Before anything is computed in this thread: its pool of threads would slow the engine's down.
        over_http(engine, model.name, contract, options)
        with tempfile.TemporaryDirectory() as folder:
            plain = base_model.load(model, precision)
            adapter_loads(adapter_of(Path(folder) / "ad", model.name, plain, 0), model.name, plain)
    finally:
        engine.close()


def first_tokens(
    engine: Engine, name: str, contract: contracts.Contract, options: argparse.Namespace
) -> None:
    first_token(engine, name, asked_of(contract, 99))
    cold, warm = [], []
    for number in range(options.rounds):
        prompt = asked_of(contract, number, options.context)
        prompt[10] += number + 1  # unknown from here on
        cold.append(first_token(engine, name, prompt))
        warm.append(first_token(engine, name, [*prompt[:-8], *asked_of(contract, 50 + number)[-8:]]))
    one, other = statistics.median(cold), statistics.median(warm)
    print(
        f"first token after {options.context} tokens: {one * 1e3:.0f} ms, known before: {other * 1e3:.0f} ms"
    )
    print(f"{one / other:6.2f} x  sooner")


def first_token(engine: Engine, name: str, prompt: list[int]) -> float:
    """Seconds."""
    over = threading.Event()
    started = time.monotonic()
    engine.submit(
        name, prompt, [Sampling(1)], lambda _, told: over.set() if _ended(told) else None, lambda: False
    )
    over.wait()
    return time.monotonic() - started


def adapter_loads(folder: Path, name: str, plain: object) -> None:
    layers = {name: (layer.out_features, layer.in_features) for name, layer in linear_layers(plain).items()}
    taken = []
    for _ in range(7):
        started = time.monotonic()
        source = files.look("ad", name, folder, layers)
        files.read(source, base_model.device(), base_model.settle(Quantization(bits=16)).torch_dtype)
        taken.append(time.monotonic() - started)
    size = (folder / "adapter_model.safetensors").stat().st_size / 1e6
    print(
        f"an adapter of {size:.0f} MB into memory, hashed and checked: {statistics.median(taken) * 1e3:.0f} ms"
    )


def over_http(engine: Engine, name: str, contract: contracts.Contract, options: argparse.Namespace) -> None:
    asked = [asked_of(contract, number) for number in range(options.requests)]
    never = dict.fromkeys(contract.stop_token_ids, -100.0)
    with running(GRAFT_ENGINE_BITS="16") as service, ThreadPoolExecutor(options.requests) as together:
        headers = {"authorization": f"Bearer {service.key}", "content-type": "application/json"}
        address = service.url.removeprefix("http://")

        def post(prompt: list[int]) -> None:
            """With the lightest of clients: what a client takes is not the service's."""
            http = HTTPConnection(address, timeout=600)  # the last one may have been closed in the meantime
            body = {"model": name, "prompt": prompt, "max_tokens": options.tokens, "temperature": 0}
            http.request("POST", "/v1/completions", json.dumps({**body, "logit_bias": never}), headers)
            answer = json.loads(http.getresponse().read())
            assert "usage" in answer, answer
            assert answer["usage"]["completion_tokens"] == options.tokens

        def served() -> float:
            started = time.monotonic()
            list(together.map(post, asked))
            return time.monotonic() - started

        def direct() -> float:
            started, left = time.monotonic(), threading.Semaphore(0)
            for prompt in asked:
                sampling = Sampling(options.tokens, logit_bias=never)
                engine.submit(
                    name,
                    prompt,
                    [sampling],
                    lambda _, told: left.release() if _ended(told) else None,
                    lambda: False,
                )
            for _ in asked:
                left.acquire()
            return time.monotonic() - started

        served(), direct()
        taken = [(served(), direct()) for _ in range(2 * options.rounds)]
    one, other = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    print(
        f"{options.requests} requests of {options.tokens} tokens: {one:.3f} s over HTTP, {other:.3f} s in the process"
    )
    print(f"{100 * (one / other - 1):6.1f} %  longer over HTTP")


def _ended(told: Told) -> bool:
    if isinstance(told, Exception):
        raise told
    return isinstance(told, Finish)


if __name__ == "__main__":
    main()
