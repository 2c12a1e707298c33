"""Generation on the wire."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from api.schemas.common import Request

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _token_id(key: str) -> str:
    # One way to write each, or two keys could mean the same token.
    if not _TOKEN_ID.fullmatch(key):
        raise ValueError("the key is no token id, which is a whole number of up to 10 digits")
    return key


TokenId = Annotated[str, AfterValidator(_token_id)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON knows one kind of number: 100.0 is what languages write that have no integers.
WHOLE = BeforeValidator(_whole)

_COLDEST = 0.01
_MOST_TARGETS = 16


class Part(Request):
    type: Literal["text"]
    text: str


class Message(Request):
    """As in a data set: the same function reads both."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None


def refuse_last_answer(messages: Sequence[Message]) -> None:
    if messages[-1].role == "assistant":
        raise ValueError("the last message must not be the assistant's: it is what is to be written")


class Sampled(Request):
    """How tokens are chosen. `top_k`, `min_p` and `repetition_penalty` as vLLM names them. A field that is null is not
    given, as clients send those of which they know nothing."""

    model_config = ConfigDict(strict=True)

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=1000), WHOLE] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, asked: Any) -> Any:
        if not isinstance(asked, dict):
            return asked
        return {
            name: value
            for name, value in asked.items()
            if name not in cls.model_fields or not (value is None or (name == "stop" and value == ""))
        }

    def sampling(self) -> dict[str, Any]:
        """As an engine wants it, but for the number of tokens and the tokens that end an answer."""
        temperature = 1.0 if self.temperature is None else self.temperature
        # Clients mean the most probable token when they send a temperature of 1e-5, or a share of nothing.
        greedy = temperature < _COLDEST or self.top_p == 0
        stop = self.stop or []
        return {
            "temperature": 0.0 if greedy else temperature,
            "top_p": self.top_p or 1.0,
            "top_k": max(self.top_k or 0, 0),
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": self.logit_bias or {},
            "stop": [stop] if isinstance(stop, str) else stop,
            "seed": self.seed,
        }


class Prompted(Sampled):
    """A prompt and how to answer it: `messages`, or `prompt` as one user turn (as plain text with `raw`)."""

    messages: list[Message] | None = Field(None, min_length=1, max_length=1000)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    # After messages, and raw after it: each is checked against the one before.
    prompt: str | None = Field(None, validate_default=True)
    raw: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768), WHOLE] = 256
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, Field(ge=0, le=1000), WHOLE] = 0

    @field_validator("temperature")
    @classmethod
    def _warm(cls, temperature: float) -> float:
        if 0 < temperature < _COLDEST:
            raise ValueError(f"temperature must be 0 or at least {_COLDEST}")
        return temperature

    @field_validator("messages")
    @classmethod
    def _answerable(cls, messages: list[Message]) -> list[Message]:
        refuse_last_answer(messages)
        return messages

    @field_validator("tools")
    @classmethod
    def _of_messages(cls, tools: list[dict[str, Any]], others: ValidationInfo) -> list[dict[str, Any]]:
        if tools and _absent("messages", others):
            raise ValueError("tools need messages")
        return tools

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: str | None, others: ValidationInfo) -> str | None:
        if prompt is None and _absent("messages", others):
            raise ValueError("neither messages nor prompt is given; send one of them")
        if prompt is not None and others.data.get("messages") is not None:
            raise ValueError("messages are given too; send one of the two")
        return prompt

    @field_validator("raw")
    @classmethod
    def _of_prompt(cls, raw: bool, others: ValidationInfo) -> bool:
        if raw and _absent("prompt", others):
            raise ValueError("raw needs a prompt")
        return raw

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "max_tokens": self.max_new_tokens}


def _absent(name: str, others: ValidationInfo) -> bool:
    """Whether a field is not given; one that is wrong is not among the `others`, and has its own error."""
    return name in others.data and others.data[name] is None


class GenerateRequest(Prompted):
    """`adapter_id`: an adapter, or a checkpoint as `job_…@latest` or `job_…@step`."""

    adapter_id: str | None = None
    model: str | None = None
    stream: bool = False  # before n, which is checked against it
    n: Annotated[int, Field(ge=1, le=8), WHOLE] = 1

    @field_validator("n")
    @classmethod
    def _one_output(cls, n: int, others: ValidationInfo) -> int:
        if n > 1 and others.data.get("stream"):
            raise ValueError("a stream has one output: n must be 1")
        return n

    @model_validator(mode="after")
    def _one_answerer(self) -> Self:
        if self.adapter_id and self.model:
            raise ValueError("give adapter_id or model: an adapter knows its base model")
        return self


class CompareRequest(Prompted):
    """`targets`: `base`, adapter ids, checkpoints as `job_…@step` or `@latest`, names of base models. `base` is the one
    that the first adapter or checkpoint was trained on, or the default one."""

    targets: list[Annotated[str, StringConstraints(min_length=1, max_length=200)]] = Field(
        min_length=1, max_length=_MOST_TARGETS
    )


class Output(BaseModel):
    text: str
    finish_reason: Literal["stop", "length"]


class Generation(BaseModel):
    """`served_by`: `batch`, together with others; `compat`, alone, by peft; None where another engine does not say."""

    id: str
    object: Literal["generation"] = "generation"
    model: str
    adapter_id: str | None
    served_by: str | None
    outputs: list[Output]
    usage: dict[str, Any]


class Compared(BaseModel):
    """What one target answered; `error` instead where it could not, and the others are there all the same."""

    target: str
    model: str
    adapter_id: str | None
    text: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    served_by: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Comparison(BaseModel):
    """In the order of the targets."""

    id: str
    object: Literal["comparison"] = "comparison"
    outputs: list[Compared]
