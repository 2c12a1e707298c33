"""What an engine's refusals mean to a client."""

import json
from http import HTTPStatus
from typing import Any

from core.errors import Conflict, GraftError

# What the engine says of the request is the client's business; the rest is ours.
_PASSED_ON = (400, 404, 409, 422, 429, 503, 504, 507)
_OF_REQUESTS, _LATER, _KEPT_OUT = (400, 422), (429, 503), (401, 403)
_KEY = "GRAFT_ENGINE_KEY has to be the key that the engine asks for."
# Of what an engine says, so many characters are passed on.
_MOST = 500


def said(body: Any, status: int, otherwise: str, retry_after: int | None = None) -> GraftError:
    """An engine's error; vLLM's codes are the numbers of statuses."""
    error = (body.get("error") or body) if isinstance(body, dict) else None
    told = error if isinstance(error, dict) else {"message": error}
    texts = {name: value[:_MOST] for name, value in told.items() if isinstance(value, str)}
    code = texts.get("code", "")
    return GraftError(
        "engine_error" if not code or code.isdecimal() else code,
        texts.get("message") or otherwise,
        status=status if status in _PASSED_ON else HTTPStatus.BAD_GATEWAY,
        param=texts.get("param"),
        hint=texts.get("hint") or (_KEY if status in _KEPT_OUT else None),
        retry_after=retry_after,
    )


def not_loaded(name: str, status: int, text: str, retry_after: int | None = None) -> GraftError:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    otherwise = f"The inference engine answered {status} when asked to load {name}."
    error = said(body, status, otherwise, retry_after)
    known = error.code != "engine_error"
    if "max_lora_rank" in error.message and not known:
        hint = "Start vLLM with a --max-lora-rank that is large enough, or export the adapter merged."
        return Conflict("rank_not_served", f"The inference engine refuses {name}: {error.message}", hint=hint)
    if status in _LATER or (known and status in _PASSED_ON and status not in _OF_REQUESTS):
        return error
    return GraftError(
        "adapter_not_loaded",
        f"The inference engine did not load {name}: {error.message}",
        status=502,
        hint=error.hint
        or "vLLM needs --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and to see the files under the same path.",
    )


def forgotten(name: str) -> GraftError:
    return GraftError(
        "adapter_not_loaded",
        f"The inference engine took {name}, and then did not know it.",
        status=503,
        hint="If it was just started anew, ask again. Where several engines are behind one address, each needs the adapter.",
    )


def not_served(base_model: str) -> GraftError:
    return GraftError(
        "model_not_served",
        f"The inference engine does not serve {base_model}.",
        status=503,
        hint="The engine behind GRAFT_ENGINE_URL has to serve the base model under this name.",
    )


def inert(name: str) -> GraftError:
    return GraftError(
        "adapter_inert",
        f"The inference engine took {name}, and answers as the base model does.",
        status=502,
        hint="It does not know some layers of this base model for LoRA. Export the adapter merged and serve that.",
    )


def no_json() -> GraftError:
    return GraftError("engine_error", "The inference engine answered no JSON.", status=502)


def no_completion(why: str) -> GraftError:
    return GraftError(
        "engine_error",
        f"The inference engine's answer is no completion: {why}.",
        status=502,
        hint="What GRAFT_ENGINE_URL names has to answer POST /v1/completions as OpenAI's API does.",
    )


def too_late() -> GraftError:
    return GraftError(
        "deadline_exceeded",
        "The inference engine took longer than an answer may take.",
        status=504,
        hint="GRAFT_ENGINE_ANSWER_SECONDS says how long that is.",
    )


def unavailable(message: str = "The inference engine does not answer.") -> GraftError:
    return GraftError(
        "engine_unavailable",
        message,
        status=503,
        hint="It may still be starting; GET /health/ready shows its state.",
    )
