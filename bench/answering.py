"""The sides that bench/inference.py compares: transformers and peft, Graft's engine, llama.cpp."""

import argparse
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig

from core import settings
from core.ml import base_model, catalogue, prompts
from core.ml import contract as contracts
from core.ml.catalogue import Catalogue
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
LLAMA_NAME = "llama.cpp, one after the other"
ASK = "Tell me about the number {} and where one meets it, in a few sentences."
Measure = Callable[[], float]


class Side(Protocol):
    """Its measurements by their names, in tokens per second."""

    measures: Mapping[str, Measure]

    def close(self) -> None: ...


class Asked:
    """The base model, and what all sides are asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        found = settings.load()
        self.models = Catalogue(found.models_folder, found.models, found.allow_hub)
        self.model = catalogue.find(self.models, found.default_model)
        base_model.prepare(self.model)
        self.precision = base_model.settle(Quantization(bits=options.bits))
        self.contract = contracts.load(self.model.path)
        self.short = [asked_of(self.contract, number) for number in range(options.requests)]
        self.long = [asked_of(self.contract, number, options.context) for number in range(options.requests)]
        self.adapters = [options.folder / str(number) for number in range(options.requests)]


class Peers:
    """transformers and peft alone. Writes the adapters."""

    def __init__(self, options: argparse.Namespace) -> None:
        asked = Asked(options)
        self.options, self.asked, self.long = options, asked.short, asked.long
        self.plain = base_model.load(asked.model, asked.precision).eval()
        self.plain.generation_config = GenerationConfig()
        for number, folder in enumerate(asked.adapters):
            adapter_of(folder, asked.model.name, self.plain, number)
        self.peft: Any = PeftModel.from_pretrained(
            base_model.load(asked.model, asked.precision), str(asked.adapters[0]), adapter_name="0"
        ).eval()
        for number, adapter in enumerate(asked.adapters[1:], 1):
            self.peft.load_adapter(str(adapter), adapter_name=str(number))
        self.peft.get_base_model().generation_config = GenerationConfig()
        self.measures: dict[str, Measure] = {
            "generate, base, one after the other": lambda: self.sequential(adapted=False),
            "generate, 8 adapters, one after the other": lambda: self.sequential(adapted=True),
            "generate, base, one static batch": lambda: self.static(self.asked),
            "peft mixed batch, 8 adapters": self.mixed,
            "generate, one request": self.single,
            f"static batch, {options.context} tokens before": self.static_late,
        }

    def close(self) -> None:
        """Nothing goes on."""

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

    def sequential(self, *, adapted: bool) -> float:
        count, seconds = self.options.tokens, 0.0
        for number, asked in enumerate(self.asked):
            if adapted:
                self.peft.set_adapter(str(number))
            seconds += self.generated(self.peft if adapted else self.plain, [asked], count)
        return len(self.asked) * count / seconds

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


class Ours:
    def __init__(self, options: argparse.Namespace) -> None:
        asked = Asked(options)
        self.options, self.asked, self.long = options, asked.short, asked.long
        # The end token is suppressed.
        self.never = dict.fromkeys(asked.contract.stop_token_ids, -10000.0)
        self.engine = Engine(asked.models, asked.precision, Limits(prefix_bytes=0))
        names = [f"ad_{number}" for number in range(options.requests)]
        for name, adapter in zip(names, asked.adapters, strict=True):
            self.engine.register(name, asked.model.name, adapter)
        bases = [asked.model.name] * options.requests
        self.measures: dict[str, Measure] = {
            "engine, base": lambda: self.served(bases, self.asked),
            "engine, 8 adapters": lambda: self.served(names, self.asked),
            "engine, one request": lambda: self.served(bases[:1], self.asked[:1]),
            f"engine, {options.context} tokens before": lambda: self.served_late(bases),
        }

    def close(self) -> None:
        self.engine.close()

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

        for place, (name, prompt) in enumerate(zip(names, asked, strict=True)):
            sampling = Sampling(count, logit_bias=self.never)
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


class Llama:
    """Answers in the interpreter that has it."""

    def __init__(self, options: argparse.Namespace) -> None:
        asked = Asked(options)
        self.options = options
        file = str(catalogue.packaged_file(asked.model))
        words = [str(torch.get_num_threads()), str(options.tokens), json.dumps(asked.short)]
        self.process = subprocess.Popen(
            [options.llama, "-c", LLAMA, file, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.measures: dict[str, Measure] = {LLAMA_NAME: self.rate}

    def rate(self) -> float:
        return self.options.requests * self.options.tokens / float(line_of(self.process, ""))

    def close(self) -> None:
        self.process.communicate()


SIDES: dict[str, Callable[[argparse.Namespace], Side]] = {"peers": Peers, "ours": Ours, "llama": Llama}


def line_of(process: "subprocess.Popen[str]", asked: str | None = None) -> str:
    """What it answers to a line, or says by itself."""
    assert process.stdin is not None
    assert process.stdout is not None
    if asked is not None:
        process.stdin.write(f"{asked}\n")
        process.stdin.flush()
    return process.stdout.readline()


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
