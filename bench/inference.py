"""How fast are answers? Graft's engine beside plain transformers and peft, and llama.cpp where it is installed, in one run.

    python -m bench.inference [--requests 8] [--tokens 48] [--context 1500] [--rounds 3] [--bits 16] [--llama PYTHON]

Every figure is new tokens in a second of all requests together, from asking to the last token. All write the same number
of tokens to the same prompts, the most likely token each time, on SmolLM2 in the same precision; what is compared takes
turns within each round, and the medians of the rounds are told. Adapters are random, rank 16 on all linear layers.
`--llama` is an interpreter that has llama-cpp-python: it reads SmolLM2's 4-bit GGUF file on as many threads, one request after
the other, for it batches no different adapters.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig

from core import settings
from core.ml import base_model, catalogue, prompts
from core.ml import contract as contracts
from core.ml.catalogue import BaseModel, Catalogue
from core.ml.inference.answering import Finish, Told
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Limits
from core.ml.prompts import Contract
from core.ml.quantization import Quantization

LLAMA = """
import json, sys, time
from llama_cpp import Llama
file, threads, count, prompts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
llama = Llama(file, n_ctx=2048, n_threads=threads, verbose=False)
for _ in sys.stdin:
    started = time.monotonic()
    for prompt in prompts:
        llama.reset()
        for made, _ in enumerate(llama.generate(prompt, temp=0.0), 1):
            if made == count:
                break
    print(time.monotonic() - started, flush=True)
"""
ASK = "Tell me about the number {} and where one meets it, in a few sentences."
Measure = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, choices=[4, 16], default=16)
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python")
    options = parser.parse_args()
    found = settings.load()
    models = Catalogue(found.models_folder, found.models, found.allow_hub)
    model = catalogue.find(models, found.default_model)
    base_model.prepare(model)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(models, model, Path(folder), options)
        try:
            bench.run()
        finally:
            bench.engine.close()
            if bench.llama is not None:
                bench.llama.communicate()


class Bench:
    """The models in memory, and what all of them are asked."""

    def __init__(
        self, models: Catalogue, model: BaseModel, folder: Path, options: argparse.Namespace
    ) -> None:
        self.options, self.name = options, model.name
        precision = base_model.settle(Quantization(bits=options.bits))
        self.contract = contracts.load(model.path)
        self.asked = [asked_of(self.contract, number) for number in range(options.requests)]
        self.long = [asked_of(self.contract, number, options.context) for number in range(options.requests)]
        self.plain = base_model.load(model, precision).eval()
        self.plain.generation_config = GenerationConfig()
        self.adapters = [
            adapter_of(folder / str(n), model.name, self.plain, n) for n in range(options.requests)
        ]
        self.peft: Any = PeftModel.from_pretrained(
            base_model.load(model, precision), str(self.adapters[0]), adapter_name="0"
        ).eval()
        for number, adapter in enumerate(self.adapters[1:], 1):
            self.peft.load_adapter(str(adapter), adapter_name=str(number))
        self.peft.get_base_model().generation_config = GenerationConfig()
        self.llama = None
        if options.llama:
            file = str(catalogue.packaged_file(model))
            asked = [str(torch.get_num_threads()), str(options.tokens), json.dumps(self.asked)]
            self.llama = subprocess.Popen(
                [options.llama, "-c", LLAMA, file, *asked],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self.engine = Engine(models, precision, Limits(prefix_bytes=0))
        self.names = [f"ad_{number}" for number in range(options.requests)]
        for name, adapter in zip(self.names, self.adapters, strict=True):
            self.engine.register(name, model.name, adapter)

    def run(self) -> None:
        bases = [self.name] * self.options.requests
        one = [self.name]
        compared: dict[str, Measure] = {
            "generate, base, one after the other": lambda: self.sequential(None),
            "generate, 8 adapters, one after the other": lambda: self.sequential(self.names),
            "generate, base, one static batch": lambda: self.static(self.asked),
            "peft mixed batch, 8 adapters": self.mixed,
            "engine, base": lambda: self.served(bases, self.asked),
            "engine, 8 adapters": lambda: self.served(self.names, self.asked),
            "generate, one request": self.single,
            "engine, one request": lambda: self.served(one, self.asked[:1]),
            f"static batch, {self.options.context} tokens before": self.static_late,
            f"engine, {self.options.context} tokens before": lambda: self.served_late(bases),
        }
        if self.llama is not None:
            compared["llama.cpp, one after the other"] = self.llama_rate
        for measure in compared.values():
            measure()
        rates: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(self.options.rounds):
            for name, measure in compared.items():
                rates[name].append(measure())
                print(f"{name}: {rates[name][-1]:.1f} tokens/s", flush=True)
        self.told({name: statistics.median(values) for name, values in rates.items()})

    def told(self, rates: dict[str, float]) -> None:
        print()
        for name, rate in rates.items():
            print(f"{rate:8.1f} tokens/s  {name}")
        pairs = [
            ("engine, base", "generate, base, one after the other"),
            ("engine, 8 adapters", "generate, base, one after the other"),
            ("engine, 8 adapters", "generate, 8 adapters, one after the other"),
            ("engine, 8 adapters", "peft mixed batch, 8 adapters"),
            ("engine, base", "generate, base, one static batch"),
            ("engine, one request", "generate, one request"),
            (
                f"engine, {self.options.context} tokens before",
                f"static batch, {self.options.context} tokens before",
            ),
        ]
        if self.llama is not None:
            pairs += [
                (one, "llama.cpp, one after the other")
                for one in ("engine, 8 adapters", "engine, one request")
            ]
        for one, other in pairs:
            print(f"{rates[one] / rates[other]:6.2f} x  {one} : {other}")

    def generated(self, model: Any, asked: list[list[int]], count: int, **settings: Any) -> float:
        """Seconds. Padded on the left; the end token is suppressed."""
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in asked], device=self.plain.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in asked], device=ids.device)
        started = _now()
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0),
                **settings,
            )
        seconds = _now() - started
        assert made.shape[1] == longest + count
        return seconds

    def sequential(self, names: list[str] | None) -> float:
        count, seconds = self.options.tokens, 0.0
        for number, asked in enumerate(self.asked):
            if names is not None:
                self.peft.set_adapter(str(number))
            seconds += self.generated(self.plain if names is None else self.peft, [asked], count)
        return len(self.asked) * count / seconds

    def llama_rate(self) -> float:
        assert self.llama is not None
        assert self.llama.stdin is not None
        assert self.llama.stdout is not None
        self.llama.stdin.write("\n")
        self.llama.stdin.flush()
        return len(self.asked) * self.options.tokens / float(self.llama.stdout.readline())

    def single(self) -> float:
        return self.options.tokens / self.generated(self.plain, self.asked[:1], self.options.tokens)

    def static(self, asked: list[list[int]]) -> float:
        return len(asked) * self.options.tokens / self.generated(self.plain, asked, self.options.tokens)

    def static_late(self) -> float:
        """Without the reading of the prompts."""
        count = self.options.tokens
        seconds = self.generated(self.plain, self.long, count + 1) - self.generated(self.plain, self.long, 1)
        return len(self.long) * count / seconds

    def mixed(self) -> float:
        numbers = [str(number) for number in range(len(self.asked))]
        seconds = self.generated(self.peft, self.asked, self.options.tokens, adapter_names=numbers)
        return len(self.asked) * self.options.tokens / seconds

    def asked_engine(self, names: list[str], asked: list[list[int]], count: int) -> tuple[float, float]:
        """When the last first token and when the last token came, in seconds after asking."""
        left, over, firsts = [len(names)], threading.Event(), [0.0] * len(names)
        started = _now()

        def tell(place: int, told: Told) -> None:
            if isinstance(told, Finish):
                assert told.tokens == count
                left[0] -= 1
                if not left[0]:
                    over.set()
            elif isinstance(told, Exception):
                raise told
            elif not firsts[place]:
                firsts[place] = _now() - started

        never = dict.fromkeys(self.contract.stop_token_ids, -10000.0)
        for place, (name, prompt) in enumerate(zip(names, asked, strict=True)):
            sampling = Sampling(count, logit_bias=never)
            self.engine.submit(
                name, prompt, [sampling], lambda _, told, place=place: tell(place, told), lambda: False
            )
        over.wait()
        return max(firsts), _now() - started

    def served(self, names: list[str], asked: list[list[int]]) -> float:
        return len(names) * self.options.tokens / self.asked_engine(names, asked, self.options.tokens)[1]

    def served_late(self, names: list[str]) -> float:
        count = self.options.tokens
        late = self.asked_engine(names, self.long, count + 1)[1] - self.asked_engine(names, self.long, 1)[1]
        return len(names) * count / late


def asked_of(contract: Contract, number: int, tokens: int = 0) -> list[int]:
    """A question, with at least so many tokens before it."""
    text = ASK.format(number + 11)
    filler = " ".join(f"{place * 7 % 101}" for place in range(tokens))
    turns = [{"role": "user", "content": f"{filler}\n{text}" if tokens else text}]
    ids = prompts.encode_prompt(contract, turns)
    return ids if not tokens else ids[:4] + ids[-(tokens - 4) :]


def adapter_of(folder: Path, base: str, model: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    made = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear")
    )
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    made.save_pretrained(folder)
    made.unload()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    main()
