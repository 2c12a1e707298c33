"""What the inference server is asked. The names are vLLM's."""

import hashlib
from dataclasses import replace
from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from core.ml.inference.sampling import Sampling

_MOST_OUTPUTS = 8


class Completion(BaseModel):
    """`cache_salt`: prompts are only known again under the same one."""

    model: str
    prompt: list[int] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: list[str] = []
    stop_token_ids: list[int] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=_MOST_OUTPUTS)
    logprobs: int | None = Field(None, ge=0, le=20)
    return_tokens_as_token_ids: bool = False
    cache_salt: str = ""
    stream: bool = False
    stream_options: dict[str, bool] | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.logprobs is not None and not self.return_tokens_as_token_ids:
            raise ValueError(
                "logprobs need return_tokens_as_token_ids: texts of single tokens may be no characters"
            )
        return self

    def sampling(self) -> list[Sampling]:
        """One for each output: each of n has a seed of its own."""
        one = Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            seed=self.seed,
            logprobs=self.logprobs,
        )
        return [replace(one, seed=_seed(self.seed, index)) for index in range(self.n)]


def _seed(asked: int | None, output: int) -> int | None:
    """The first output's is the one asked for; of the others, and of those that are longer, every part is mixed: the
    neighbour of a seed is another request's, and a CPU's generator reads 32 bits only."""
    if asked is None or (output == 0 and 0 <= asked < 2**32):
        return asked
    return int.from_bytes(hashlib.sha256(f"{asked} {output}".encode()).digest()[:8], "big")


class LoadAdapter(BaseModel):
    lora_name: str
    lora_path: str
    base_model_name: str
