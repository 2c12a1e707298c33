"""A training as one Python file that needs torch, transformers, trl and peft, and nothing of Graft."""

from dataclasses import dataclass
from pprint import pformat
from typing import Any

from core.ml import rendering
from core.ml.export.scripts.recipe import Data


@dataclass(frozen=True)
class Settings:
    """Keyword arguments of BitsAndBytesConfig, LoraConfig and SFTConfig, and what stands around them."""

    model: str
    dtype: str
    quantization: dict[str, Any] | None
    lora: dict[str, Any]
    start: str | None
    fraction: float | None
    loss_on: str
    training: dict[str, Any]


_IMPORTS = """
import argparse
import csv
import gzip
import json
import random
import re

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
"""

_ROWS = '''

def rows(path):
    """Every row of a data file as a dict: JSON Lines, a JSON array, CSV or Parquet, also packed with gzip."""
    if FILE_TYPE == "parquet":
        return Dataset.from_parquet(path).to_list()
    with open(path, "rb") as file:
        packed = file.read(2) == b"\\x1f\\x8b"
    with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        if FILE_TYPE == "csv":
            sample = file.readline()
            file.seek(0)
            return list(csv.DictReader(file, delimiter=max(",;\\t|", key=sample.count)))
        if FILE_TYPE == "json":
            return json.load(file)
        return [json.loads(line) for line in file if line.strip()]
'''

# What turns have beside their role and their text.
_BESIDE = """
BESIDE = ("weight", "name", "tool_calls", "tool_call_id")


def turn_of(turn, role, content, roles):
    beside = {name: turn[name] for name in BESIDE if turn.get(name) is not None}
    return {"role": roles.get(turn[role], turn[role]), "content": turn.get(content), **beside}


def conversation(row, turns):
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return {"messages": system + turns, "tools": row.get("tools")}

"""

_READERS = {
    "messages": """
def example(row):
    return {"messages": row["messages"], "tools": row.get("tools")}
""",
    "sharegpt": _BESIDE
    + """
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def example(row):
    turns = row["conversations"]
    names = ("from", "value") if "from" in turns[0] else ("role", "content")
    return conversation(row, [turn_of(turn, *names, ROLES) for turn in turns])
""",
    "prompt_completion": """
def example(row):
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return {"messages": system + prompt + completion, "tools": row.get("tools")}
""",
    "alpaca": """
def example(row):
    question, extra = row["instruction"], row.get("input") or ""
    if extra.strip().lower() not in ("", "<noinput>"):
        question = f"{question}\\n\\n{extra}" if question.strip() else extra
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for asked, said in row.get("history") or []:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return {"messages": turns}
""",
    "text": """
def example(row):
    return {"text": row["text"]}
""",
}

_FILL = '''
NAME = r"""[^\\s{}"'][^{}\\r\\n]*"""
PLACE = re.compile(r"\\{\\{\\{(?P<braced>%s)\\}\\}\\}|\\{\\{(?P<literal>%s)\\}\\}|\\{(?P<place>%s)\\}" % (NAME, NAME, NAME))


def fill(template, row):
    """{name} is what the column holds, {{name}} the text {name}, {{{name}}} what it holds in braces."""

    def put(found):
        if found["literal"] is not None:
            return "{%s}" % found["literal"]
        value = row.get(found["braced"] or found["place"])
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return "{%s}" % text if found["braced"] else text

    return PLACE.sub(put, template)

'''

_MAPPED = {
    "text": _FILL
    + """
def example(row):
    return {"text": fill(MAPPING["text"], row)}
""",
    "prompt": _FILL
    + """
def example(row):
    turns = [("user", MAPPING["prompt"]), ("assistant", MAPPING["completion"])]
    return {"messages": [{"role": role, "content": fill(text, row)} for role, text in turns]}
""",
    "turns": _FILL
    + """
def example(row):
    turns = [{"role": turn["role"], "content": fill(turn["content"], row)} for turn in MAPPING["messages"]]
    return {"messages": [turn for turn in turns if turn["content"] or turn["role"] != "system"]}
""",
    "column": _BESIDE
    + """
def example(row):
    role, content = MAPPING.get("role", "role"), MAPPING.get("content", "content")
    roles = {"human": "user", "gpt": "assistant"} | MAPPING.get("roles", {})
    turns = row[MAPPING["messages"]]
    if isinstance(turns, str):
        turns = json.loads(turns)
    return conversation(row, [turn_of(turn, role, content, roles) for turn in turns])
""",
}

_TRAIN = '''

def trained(turns):
    """The places of the answers that are trained, where it is not the whole conversation."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    asked = answers[-1:] if LOSS_ON == "completion" else answers
    return [i for i in asked if turns[i].get("weight") != 0]


def marked(row):
    """The row for other tools: its messages with weight 0 at the answers that are not trained, or its text."""
    one = {name: value for name, value in example(row).items() if value}
    if turns := one.get("messages"):
        rest = {i for i, turn in enumerate(turns) if turn["role"] == "assistant"} - {*trained(turns)}
        one["messages"] = [turn | {"weight": 0} if i in rest else turn for i, turn in enumerate(turns)]
    return one


def divided(examples):
    """The rows to train and those held back: whole ones, so that no conversation is on both sides."""
    if not FRACTION:
        return examples, []
    random.Random(TRAINING["seed"]).shuffle(examples)
    count = max(1, round(FRACTION * len(examples)))
    return examples[count:], examples[:count]


def prepared(examples):
    """What SFTTrainer takes: texts, whole conversations, or one row for each answer to train."""
    made = []
    for one in examples:
        tools = {"tools": one["tools"]} if one.get("tools") else {}
        if "text" in one or LOSS_ON == "all":
            made.append({name: value for name, value in one.items() if value})
            continue
        turns = one["messages"]
        for i in trained(turns):
            made.append({"prompt": turns[:i], "completion": [turns[i]], **tools})
    # Otherwise every turn and call would get each field and argument that any other has, as null.
    return Dataset.from_list(made, on_mixed_types="use_json")


def with_template(tokenizer):
    """The tokenizer, with a plain chat template where the model has none."""
    if tokenizer.chat_template is None:
        start = tokenizer.bos_token_id
        begins = start is not None and tokenizer("")["input_ids"][:1] == [start]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN
    return tokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--valid", help="A file of rows to evaluate on, read the same way.")
    parser.add_argument("--model", default=MODEL, help="A name of the hub, or a folder.")
    parser.add_argument("--output", default="output")
    parser.add_argument("--write-messages", metavar="FILE", help="Write the rows as messages, and leave.")
    asked = parser.parse_args()
    if asked.write_messages:
        with open(asked.write_messages, "w", encoding="utf-8") as file:
            for row in rows(asked.data):
                file.write(json.dumps(marked(row), ensure_ascii=False) + "\\n")
        return
    examples = [example(row) for row in rows(asked.data)]
    if asked.valid:
        held = [example(row) for row in rows(asked.valid)]
    else:
        examples, held = divided(examples)
    train, valid = prepared(examples), prepared(held) if held else None
    if valid is None:
        TRAINING.update(eval_strategy="no", eval_steps=None)
    quantization = BitsAndBytesConfig(**QUANTIZATION) if QUANTIZATION else None
    model = AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=getattr(torch, DTYPE), quantization_config=quantization
    )
    if START:
        model = PeftModel.from_pretrained(model, START, is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=asked.output, use_cpu=not torch.cuda.is_available(), **TRAINING),
        train_dataset=train,
        eval_dataset=valid,
        processing_class=with_template(AutoTokenizer.from_pretrained(asked.model)),
        peft_config=None if START else LoraConfig(**LORA),
    )
    trainer.train()
    trainer.save_model(asked.output)


if __name__ == "__main__":
    main()
'''


def text(head: str, settings: Settings, data: Data) -> str:
    constants = {
        "DATA": data.filename,
        "FILE_TYPE": data.file_type.removesuffix(".gz"),
        "MODEL": settings.model,
        "DTYPE": settings.dtype,
        "QUANTIZATION": settings.quantization,
        "LORA": settings.lora,
        "START": settings.start,
        "FRACTION": settings.fraction,
        "LOSS_ON": settings.loss_on,
        "TRAINING": settings.training,
        "PLAIN": rendering.PLAIN,
    }
    if data.mapping is not None:
        constants["MAPPING"] = data.mapping
    written = "".join(
        f"{name} = {pformat(value, width=100, sort_dicts=False)}\n" for name, value in constants.items()
    )
    return f"{head}{_IMPORTS}\n{written}{_ROWS}\n{_reader(data)}{_TRAIN}"


def _reader(data: Data) -> str:
    """The function from a row to its messages or its text."""
    mapping = data.mapping
    if mapping is None:
        return _READERS[data.format]
    if "text" in mapping:
        return _MAPPED["text"]
    if "prompt" in mapping:
        return _MAPPED["prompt"]
    return _MAPPED["column" if isinstance(mapping["messages"], str) else "turns"]
