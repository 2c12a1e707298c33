"""The engine: one base model in memory, adapters beside it, one generation at a time.

Knows no HTTP. A caller gives token ids and gets text through a callback; `cancelled` is asked after
every token.
"""

import contextlib
import gc
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from core.errors import BadRequest, Conflict, NotFound
from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.catalogue import Catalogue
from core.ml.inference.text import TextStream
from core.ml.quantization import Quantization

FinishReason = Literal["stop", "length", "cancelled"]
# Resident adapters; the one that was not used for longest makes room.
MAX_ADAPTERS = 8


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token each time."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    seed: int | None = None


@dataclass(frozen=True)
class Finish:
    reason: FinishReason
    tokens: int


class Engine:
    """Thread-safe: requests wait for each other."""

    def __init__(self, models: Catalogue, bits: Literal[4, 16]) -> None:
        self._catalogue = models
        self._bits = bits
        self._lock = threading.Lock()
        self._base: str | None = None
        self._model: Any = None
        self._tokenizer: Any = None
        self._end_ids: set[int] = set()
        self._context = 0
        # engine name -> (base model, folder); registered adapters survive a change of the base.
        self._known: dict[str, tuple[str, Path]] = {}
        self._resident: OrderedDict[str, None] = OrderedDict()

    def register(self, name: str, base: str, folder: Path) -> None:
        """Make an adapter known by a name that is never used for another content, and load it.

        Raises:
            Conflict: `adapter_mismatch`, its tensors or its base model do not fit.
        """
        with self._lock:
            self._hold(base)
            self._load_adapter(name, base, folder)
            self._known[name] = (base, folder)

    def knows(self, name: str) -> bool:
        """Whether a completion can name this: a registered adapter, or a base model that is here."""
        if name in self._known:
            return True
        try:
            return catalogue.find(self._catalogue, name).ready
        except NotFound:
            return False

    def generate(
        self,
        name: str,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Finish:
        """Write on after `prompt`; text goes to `emit` in pieces.

        Raises:
            BadRequest: token ids outside the vocabulary, or more than the model reads.
        """
        with self._lock:
            if cancelled():
                return Finish("cancelled", 0)
            base, folder = self._known.get(name, (name, None))
            self._hold(base)
            self._check(prompt, sampling)
            if folder is None:
                off = (
                    self._model.disable_adapter()
                    if isinstance(self._model, PeftModel)
                    else contextlib.nullcontext()
                )
                with off:
                    return self._generate(prompt, sampling, emit, cancelled)
            self._load_adapter(name, base, folder)
            self._model.set_adapter(name)
            return self._generate(prompt, sampling, emit, cancelled)

    def _generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Finish:
        sampled = sampling.temperature > 0
        ends = self._end_ids | set(sampling.stop_token_ids)
        follower = _Follower(TextStream(self._tokenizer, sampling.stop), ends, emit, cancelled)
        if sampled:
            torch.manual_seed(sampling.seed if sampling.seed is not None else torch.seed() % 2**31)
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=sampled,
            temperature=sampling.temperature if sampled else 1.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
        )
        ids = torch.tensor([prompt], device=self._model.device)
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=follower,
                stopping_criteria=StoppingCriteriaList([_Leave(follower)]),
            )
        return follower.finish()

    def _check(self, prompt: list[int], sampling: Sampling) -> None:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        if not prompt or min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadRequest(
                "invalid_prompt",
                f"The prompt must be token ids from 0 to {vocabulary - 1}.",
                status=400,
            )
        context = self._context
        if len(prompt) + sampling.max_tokens > context:
            raise BadRequest(
                "prompt_too_long",
                f"{len(prompt)} prompt tokens and {sampling.max_tokens} new ones are more "
                f"than the {context} the model reads.",
                status=400,
            )

    def _hold(self, base: str) -> None:
        """Have this base model in memory, alone."""
        if self._base == base:
            return
        model = catalogue.find(self._catalogue, base)
        self._base = self._model = None
        self._resident.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        loaded = base_model.load(model, base_model.settle(Quantization(bits=self._bits))).eval()
        for module in loaded.modules():
            # The fused CPU kernel needs rows in blocks of 32 and fails on others.
            if isinstance(module, Linear4bit) and module.out_features % 32:
                module.support_avx512bf16_for_cpu = False
        contract = contracts.load(model.path)
        self._end_ids = set(contract.stop_token_ids)
        self._tokenizer = contract.tokenizer
        self._context = catalogue.context(model)
        # What the model's makers preset (penalties, temperatures) must not mix with the request.
        loaded.generation_config = GenerationConfig()
        self._model, self._base = loaded, base

    def _load_adapter(self, name: str, base: str, folder: Path) -> None:
        if name in self._resident:
            self._resident.move_to_end(name)
            return
        trained_on = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if trained_on != base:
            raise Conflict("adapter_mismatch", f"Adapter {name} was trained on {trained_on}, not on {base}.")
        try:
            self._place(name, folder)
        except Exception:
            # The model may hold half of it now, and would answer with that: begin anew.
            self._base = self._model = None
            self._resident.clear()
            raise
        self._resident[name] = None
        while len(self._resident) > MAX_ADAPTERS:
            self._drop(next(iter(self._resident)))

    def _place(self, name: str, folder: Path) -> None:
        try:
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(folder), adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=name)
        except (RuntimeError, ValueError) as error:
            raise Conflict(
                "adapter_mismatch", f"Adapter {name} does not fit {self._base}: {error}"
            ) from error
        self._model.eval()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        placed = set(get_peft_model_state_dict(self._model, adapter_name=name))
        if stored != placed:
            raise Conflict(
                "adapter_mismatch",
                f"Adapter {name} does not fit {self._base}: {len(stored ^ placed)} of its tensors "
                "have no place, or places have no tensor.",
            )

    def _drop(self, name: str) -> None:
        del self._resident[name]
        self._model.delete_adapter(name)


class _Follower:
    """Takes tokens as `generate` makes them; transformers' streamer by its two methods."""

    def __init__(
        self,
        text: TextStream,
        ends: set[int],
        emit: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.text, self.ends, self.emit, self.cancelled = text, ends, emit, cancelled
        self.tokens = -1  # the first call brings the prompt
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens == 0:
            return
        if self.ended or self.text.stopped:
            self.tokens -= 1  # generate asks whether to stop one token late
            return
        token = int(value.view(-1)[-1])
        if token in self.ends:
            self.ended = True
        elif piece := self.text.push(token):
            self.emit(piece)

    def end(self) -> None:
        if rest := self.text.end():
            self.emit(rest)

    def leave(self) -> bool:
        return self.text.stopped or self.cancelled()

    def finish(self) -> Finish:
        tokens = max(self.tokens, 0)
        if self.ended or self.text.stopped:
            return Finish("stop", tokens)
        return Finish("cancelled" if self.cancelled() else "length", tokens)


class _Leave(StoppingCriteria):
    def __init__(self, follower: _Follower) -> None:
        self.follower = follower

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        return torch.full((input_ids.shape[0],), self.follower.leave(), device=input_ids.device)
