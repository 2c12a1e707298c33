"""A training as one Python file that needs torch, transformers, trl and peft, and nothing of Graft."""

from dataclasses import dataclass
from pprint import pformat
from typing import Any

from core.ml import rendering
from core.ml.export.scripts.recipe import DATA_FILE, VALID_FILE


@dataclass(frozen=True)
class Settings:
    """Keyword arguments of BitsAndBytesConfig, LoraConfig and SFTConfig, and what stands around them.

    `loss_on_all`: every token is trained, not the answers alone.
    """

    model: str
    dtype: str
    quantization: dict[str, Any] | None
    lora: dict[str, Any]
    start: str | None
    fraction: float | None
    second_set: bool
    loss_on_all: bool
    overlength: str
    training: dict[str, Any]


_IMPORTS = """
import argparse
import hashlib
import json
import os
from array import array

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
"""

_TRAIN = '''

def rows(path):
    """The rows that Graft wrote: {"messages", "tools"}, or {"text"}. Chat templates take a call's arguments as an object."""
    with open(path, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    for row in found:
        for turn in row.get("messages", []):
            for call in turn.get("tool_calls", []):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return found


def pieces(tokenizer, row):
    """(text, whether it is trained): a conversation is cut where an answer begins and where it ends."""
    weights = [turn.pop("weight", 1) for turn in row["messages"]]
    turns = row["messages"]

    def text(turns, answer_next=False):
        return tokenizer.apply_chat_template(
            turns, tools=row.get("tools"), add_generation_prompt=answer_next, tokenize=False
        )

    whole, made, end = text(turns), [], 0
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        # There is no template for no turns: what stands before a first answer is what all of them begin with.
        before = text(turns[:i], True) if i else os.path.commonprefix([text([{**turn, "content": c}]) for c in "01"])
        after = text(turns[: i + 1])
        if not whole.startswith(after):  # some templates write the end token after the last turn only
            after = after.removesuffix(tokenizer.eos_token or "")
        if whole.startswith(after) and after.startswith(before) and len(before) >= end:
            made += [(whole[end : len(before)], False), (whole[len(before) : len(after)], weights[i] != 0)]
            end = len(after)
        elif weights[i] != 0 and not LOSS_ON_ALL:
            raise SystemExit(f"The chat template writes messages[{i}] differently when it is the last turn.")
    return [*made, (whole[end:], False)]


def continued(tokenizer, text):
    """Token ids of a text that goes on after another: without the space that some tokenizers put first."""
    for guard in ("\\n", "x"):
        known = tokenizer(guard, add_special_tokens=False)["input_ids"]
        ids = tokenizer(guard + text, add_special_tokens=False)["input_ids"]
        if ids[: len(known)] == known:
            return ids[len(known) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encoded(tokenizer, row):
    """Token ids, labels, and how many tokens stand before the first answer."""
    if "text" in row:
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids = [start] if begins(tokenizer) else []
        ids = ids + tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        return ids, ids, len(ids)
    (first, _), *rest = pieces(tokenizer, row)
    ids = tokenizer(first, add_special_tokens=False)["input_ids"]
    prompt = len(ids)
    labels = list(ids) if LOSS_ON_ALL else [-100] * prompt
    for text, trained in rest:
        more = continued(tokenizer, text)
        ids = ids + more
        labels += more if trained or LOSS_ON_ALL else [-100] * len(more)
    return ids, labels, prompt


def fitted(tokenizer, ids, labels):
    """What is kept of a row that may be too long: an answer is never cut."""
    cut = len(ids) - TRAINING["max_length"]
    if cut <= 0:
        return ids, labels
    if OVERLENGTH == "drop":
        return None
    head = int(ids[0] == tokenizer.bos_token_id)
    if OVERLENGTH == "error" or {*labels[: cut + 1]} != {-100} or head + cut >= len(ids):
        raise SystemExit(f"A row has {len(ids)} tokens; max_length is {TRAINING['max_length']}.")
    return ids[:head] + ids[head + cut :], labels[:head] + labels[head + cut :]


def tokenised(tokenizer, path):
    """What SFTTrainer takes, one example a row; `prompt` is the same for rows with the same prompt."""
    made = []
    for row in rows(path):
        ids, labels, prompt = encoded(tokenizer, row)
        if kept := fitted(tokenizer, ids, labels):
            made.append({"input_ids": kept[0], "labels": kept[1], "prompt": digest(array("i", ids[:prompt]).tobytes())})
    return made


def digest(content):
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def divided(examples):
    """The examples to train and those held back, the same as in Graft: equal prompts stay together."""
    shares = {one["prompt"]: digest(f"{TRAINING['seed']} {one['prompt']}".encode()) / 2**64 for one in examples}
    held = {prompt for prompt, share in shares.items() if share < FRACTION}
    if not held:
        held = {min(shares, key=shares.get)}
    elif len(held) == len(shares):
        held.remove(max(shares, key=shares.get))
    return [one for one in examples if one["prompt"] not in held], [one for one in examples if one["prompt"] in held]


def begins(tokenizer):
    """Whether the tokenizer itself begins a text with the start token."""
    start = tokenizer.bos_token_id
    return start is not None and tokenizer("")["input_ids"][:1] == [start]


def with_template(tokenizer):
    """The tokenizer, with a plain chat template where the model has none."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ("{{ bos_token }}" if begins(tokenizer) else "") + PLAIN
    return tokenizer


def dataset(examples):
    return Dataset.from_list([{name: one[name] for name in ("input_ids", "labels")} for one in examples])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--valid", default=VALID, help="A file of rows to evaluate on.")
    parser.add_argument("--model", default=MODEL, help="A name of the hub, or a folder.")
    parser.add_argument("--output", default="output")
    asked = parser.parse_args()
    tokenizer = with_template(AutoTokenizer.from_pretrained(asked.model))
    train, held = tokenised(tokenizer, asked.data), []
    if asked.valid:
        held = tokenised(tokenizer, asked.valid)
    elif FRACTION:
        train, held = divided(train)
    quantization = BitsAndBytesConfig(**QUANTIZATION) if QUANTIZATION else None
    model = AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=getattr(torch, DTYPE), quantization_config=quantization
    )
    if START:
        model = PeftModel.from_pretrained(model, START, is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=asked.output, use_cpu=not torch.cuda.is_available(), **TRAINING),
        train_dataset=dataset(train),
        eval_dataset=dataset(held) if held else None,
        processing_class=tokenizer,
        peft_config=None if START else LoraConfig(**LORA),
    )
    trainer.train()
    trainer.save_model(asked.output)


if __name__ == "__main__":
    main()
'''


def text(head: str, settings: Settings) -> str:
    constants = {
        "DATA": DATA_FILE,
        "VALID": VALID_FILE if settings.second_set else None,
        "MODEL": settings.model,
        "DTYPE": settings.dtype,
        "QUANTIZATION": settings.quantization,
        "LORA": settings.lora,
        "START": settings.start,
        "FRACTION": settings.fraction,
        "LOSS_ON_ALL": settings.loss_on_all,
        "OVERLENGTH": settings.overlength,
        "TRAINING": settings.training,
        "PLAIN": rendering.PLAIN,
    }
    written = "".join(
        f"{name} = {pformat(value, width=100, sort_dicts=False)}\n" for name, value in constants.items()
    )
    return f"{head}{_IMPORTS}\n{written}{_TRAIN}"
