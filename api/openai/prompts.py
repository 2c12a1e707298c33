"""The forms that the prompts of /v1/completions have."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from api.schemas.generate import WHOLE

_MOST = 32


def _form(prompt: Any) -> str | None:
    """By the first: of all forms at once, the errors of each would be told."""
    if not isinstance(prompt, list):
        return "text" if isinstance(prompt, str) else None
    first = prompt[0] if prompt else ""
    if isinstance(first, str | list):
        return "texts" if isinstance(first, str) else "lists"
    return "tokens" if isinstance(first, int | float) else None


def _few(prompts: list[Any]) -> list[Any]:
    if len(prompts) > _MOST:
        raise ValueError(f"there are {len(prompts)} prompts; one request has at most {_MOST}")
    return prompts


def _alike(kind: type) -> BeforeValidator:
    def check(prompt: Any) -> Any:
        if not isinstance(prompt, kind):
            raise ValueError("prompts are all texts, or all lists of token ids")
        return prompt

    return BeforeValidator(check)


_Tokens = Annotated[list[Annotated[int, WHOLE]], Field(min_length=1)]
_Texts = list[Annotated[str, _alike(str)]]
_Lists = list[Annotated[_Tokens, _alike(list)]]

Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[_Texts, Field(min_length=1), BeforeValidator(_few), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[_Lists, BeforeValidator(_few), Tag("lists")],
    Discriminator(_form, custom_error_type="prompt_type", custom_error_message="this is no prompt"),
]


def each(prompt: Any) -> list[str | list[int]]:
    """One prompt, or several, as a list."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
