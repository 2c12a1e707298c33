"""What is done otherwise than in Graft, as comments for the top of a script. No torch.

What is said of axolotl is that of 0.19, of LLaMA-Factory 0.9.5.
"""

import json

from core.ml import rendering
from core.ml.export.scripts import configurations
from core.ml.export.scripts.recipe import Data, Plan, Tool

_TOO_LONG = {
    "error": "Graft refuses rows that are too long",
    "drop": "Graft leaves out rows that are too long",
    "truncate": "Graft cuts long rows at the beginning of their prompt, never in the answer",
}
_ROUNDED_UP = "The warmup is a share of the steps: Graft rounds it down to whole steps, this tool up."
_HELD_BACK = (
    "Graft holds back rows with equal prompts together; here other rows are held back, and of rows "
    "with equal prompts some may be trained and others held back."
)


def of(tool: Tool, plan: Plan, data: Data) -> list[str]:
    own = {"trl": _trl, "axolotl": _axolotl, "llamafactory": _llamafactory}[tool]
    return _shared(plan) + own(plan, data)


def _shared(plan: Plan) -> list[str]:
    """What all three tools do otherwise."""
    spec, training = plan.spec, plan.spec.training
    notes = [
        "Graft keeps LoRA weights in float32 while it trains; this tool may not.",
        "Rows are shuffled in another order, so losses are near to Graft's, not equal.",
        "A control token of the model that somebody wrote into a text is a token here; in Graft it stays text.",
    ]
    if "/" not in plan.model:
        notes.append(
            f"Only this Graft knows {json.dumps(plan.model)}: put a folder or a name of the hub in its place."
        )
    if training.max_length == "auto":
        notes.append(f"The job has not been planned yet: {plan.max_length} tokens stand for max_length auto.")
    if spec.evaluation.early_stopping:
        notes.append("Early stopping is left out.")
    if spec.evaluation.every_steps and (plan.fraction or plan.valid_id):
        notes.append(
            "Graft keeps the step of the lowest validation loss, as it evaluates while it trains; here the last step is kept."
        )
    if spec.limits.max_seconds:
        notes.append(f"The limit of {spec.limits.max_seconds} seconds is left out.")
    if spec.continue_from:
        notes.append(
            f"It continues from adapter {json.dumps(spec.continue_from)}: download and unpack it to ./start."
        )
    return notes


def _trl(plan: Plan, _data: Data) -> list[str]:
    return [_ROUNDED_UP] if plan.warmup_steps is None else []


def _axolotl(plan: Plan, data: Data) -> list[str]:
    training = plan.spec.training
    notes = [_HELD_BACK] if plan.fraction else []
    if plan.warmup_steps in (None, 1):
        notes.append("A warmup of one step becomes one of two steps.")
    if data.is_text:
        return [*notes, f"{_TOO_LONG[training.overlength]}; here they are cut into several rows."]
    if training.overlength == "truncate":
        notes.append(f"{_TOO_LONG['truncate']}; here their end is cut off.")
    if training.loss_on == "all":
        notes.append("What the chat template writes between the messages is not trained, in Graft it is.")
    notes.append(
        "The end of an answer is trained where it is the tokenizer's end token: name another one in eot_tokens."
    )
    plain = {"chat_template": "jinja", "chat_template_jinja": rendering.PLAIN}
    notes.append(
        f"Where the tokenizer has no chat template, Graft uses this one: put {json.dumps(plain)} in the place "
        "of chat_template, with {{ bos_token }} before it where the tokenizer begins texts with its start token."
    )
    return notes


def _llamafactory(plan: Plan, data: Data) -> list[str]:
    spec, training = plan.spec, plan.spec.training
    notes = [f"dataset_info.json beside it: {json.dumps(configurations.dataset_info(plan, data))}"]
    if plan.fraction:
        notes.append(_HELD_BACK)
    if plan.warmup_steps is None:
        notes.append(_ROUNDED_UP)
    if spec.lora.init == "gaussian":
        notes.append("A Gaussian start of the LoRA weights cannot be said.")
    if spec.quantization.bits == 16:
        notes.append("The base is not quantized: plain LoRA.")
    if data.is_text:
        cut = "texts are joined and cut into pieces" if plan.packing else "their end is cut off"
        return [*notes, f"{_TOO_LONG[training.overlength]}; here {cut}."]
    if training.loss_on in ("auto", "assistant"):
        notes.append("Answers with weight 0 are trained, too: it knows no weights.")
    return [
        *notes,
        f"{_TOO_LONG[training.overlength]}; here both their prompt and their answer are cut.",
        "No template is named: it is read from the tokenizer's chat template.",
        "Where the tokenizer has none, Graft marks the turns (### User:, ### Assistant:); here the texts "
        "stand without marks.",
        "Where the chat template writes tools, they stand in the data as tools and calls, which are not read: a call "
        "is trained as the text beside it, even an empty one, and tools of unlike fields may not load. Leave such rows "
        "out.",
        "Conversations are skipped that have results of tools, that end with a question, or in which user and "
        "assistant do not take turns.",
    ]
