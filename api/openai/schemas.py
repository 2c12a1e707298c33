"""What OpenAI's clients send. What only has a meaning at OpenAI is passed over; what would change the answer and is not
here is refused."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from api.openai.prompts import Prompt, each
from api.schemas.common import Request
from api.schemas.generate import WHOLE, Message, Sampled, refuse_last_answer
from core.errors import BadRequest

_AtLeastOne = Annotated[int, Field(ge=1), WHOLE]
_UpTo20 = Annotated[int, Field(ge=0, le=20), WHOLE]

# Fields of OpenAI's that Graft does not serve, with the values that ask for nothing or for what is done anyway.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "functions": ([],),
    "function_call": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
# What to send instead of what OpenAI has given up itself.
_NEWER = {"functions": "tools", "function_call": 'tool_choice "auto" or "none"'}


def _instead(name: str) -> str:
    if name in _NEWER:
        return f"Send {_NEWER[name]} instead."
    taken = " or ".join(json.dumps(value) for value in _UNSERVED[name])
    return f"Send {taken}, or leave it out." if taken else "Leave it out."


class StreamOptions(Request):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(Sampled):
    """What chat and completions share."""

    model: str = Field(min_length=1, max_length=200)
    n: Annotated[int, Field(ge=1, le=8), WHOLE] | None = None
    # Before its options, and the prompts of completions: they are checked against it.
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(
        None, description='Of a stream alone: send them with "stream": true, or leave them out.'
    )
    # Of no meaning here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    verbosity: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _served(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, harmless in _UNSERVED.items():
            value = given.get(name)
            if value is not None and value not in harmless:
                raise BadRequest(
                    "unsupported_parameter",
                    f'Graft does not serve "{name}" here.',
                    param=name,
                    hint=_instead(name),
                    status=400,
                )
        return {
            name: value for name, value in given.items() if name not in _UNSERVED or name in cls.model_fields
        }

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options: StreamOptions, others: ValidationInfo) -> StreamOptions:
        if "stream" in others.data and not others.data["stream"]:
            raise ValueError("only a stream has options")
        return options

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "n": self.n or 1}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatMessage(Message):
    """A message as a client keeps it, with what answers carry and prompts have no use for."""

    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None


class ChatRequest(Asked):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = None
    max_completion_tokens: _AtLeastOne | None = None
    max_tokens: _AtLeastOne | None = None
    logprobs: bool | None = None  # before top_logprobs, which are checked against it
    top_logprobs: _UpTo20 | None = None

    @field_validator("messages")
    @classmethod
    def _answerable(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        refuse_last_answer(messages)
        return messages

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, top_logprobs: int, others: ValidationInfo) -> int:
        # One that is wrong itself is not there, and has its own error.
        if top_logprobs and "logprobs" in others.data and not others.data["logprobs"]:
            raise ValueError("top_logprobs need logprobs")
        return top_logprobs

    def turns(self) -> list[dict[str, Any]]:
        unread = {"refusal", "annotations", "audio"}
        return [message.model_dump(exclude_none=True, exclude=unread) for message in self.messages]

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools


class CompletionRequest(Asked):
    prompt: Prompt = Field(
        description="A prompt is a text, a list of texts, a list of token ids, or a list of such lists."
    )
    max_tokens: _AtLeastOne | None = None
    logprobs: _UpTo20 | None = None

    @field_validator("prompt")
    @classmethod
    def _one_stream(cls, prompt: Any, others: ValidationInfo) -> Any:
        if others.data.get("stream") and len(each(prompt)) > 1:
            raise ValueError("a stream has one prompt")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        return each(self.prompt)
