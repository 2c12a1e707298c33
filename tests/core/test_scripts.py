"""A training as a script for another tool: its fields, and how it reads the data."""

import ast
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.ml.export.scripts import written as scripts
from core.ml.export.scripts.recipe import Data
from core.ml.formats import validate
from core.ml.formats.chat.example import Conversation
from core.ml.formats.validate import Reading

SPEC: dict[str, Any] = {
    "seed": 7,
    "quantization": {"bits": 4, "compute_dtype": "bfloat16"},
    "lora": {"r": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "training": {
        "max_steps": 30,
        "batch_size": 2,
        "effective_batch_size": 8,
        "learning_rate": 1e-05,
        "max_length": 256,
        "packing": False,
        "gradient_checkpointing": True,
        "optimizer": "adamw",
    },
    "validation": {"fraction": 0.1, "dataset_id": None},
}
PAIRS = Data("pairs.jsonl", "jsonl", "prompt_completion", None)


def written(tool: scripts.Tool, spec: dict[str, Any] = SPEC, data: Data = PAIRS) -> str:
    return scripts.write(tool, "job_1", "org/model", spec, data)


def loaded(tool: scripts.Tool, spec: dict[str, Any] = SPEC, data: Data = PAIRS) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(written(tool, spec, data))
    return read


def constants(text: str) -> dict[str, Any]:
    """The settings at the top of the script."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.isupper()
        if node.targets[0].id not in ("NAME", "PLACE")
    }


def test_axolotl_gets_the_same_run() -> None:
    lines = loaded("axolotl")
    assert (lines["base_model"], lines["adapter"], lines["load_in_4bit"]) == ("org/model", "qlora", True)
    assert (lines["lora_r"], lines["lora_target_modules"]) == (8, ["q_proj", "v_proj"])
    assert (lines["micro_batch_size"], lines["gradient_accumulation_steps"]) == (2, 4)
    assert lines["learning_rate"] == 1e-05
    assert (lines["max_steps"], lines["val_set_size"], lines["sequence_len"]) == (30, 0.1, 256)
    assert lines["datasets"][0]["type"] == "chat_template"
    assert lines["datasets"][0]["roles_to_train"] == ["assistant"]
    assert "lora_target_linear" not in lines


def test_llamafactory_gets_the_same_run() -> None:
    lines = loaded("llamafactory")
    assert (lines["stage"], lines["finetuning_type"], lines["quantization_bit"]) == ("sft", "lora", 4)
    assert (lines["lora_rank"], lines["lora_target"]) == (8, "q_proj,v_proj")
    assert (lines["per_device_train_batch_size"], lines["gradient_accumulation_steps"]) == (2, 4)
    assert lines["learning_rate"] == 1e-05
    assert (lines["max_steps"], lines["val_size"], lines["cutoff_len"]) == (30, 0.1, 256)
    assert "template" not in lines


def test_trl_gets_the_same_run() -> None:
    found = constants(written("trl"))
    assert found["MODEL"] == "org/model"
    assert found["QUANTIZATION"]["bnb_4bit_quant_type"] == "nf4"
    assert (found["LORA"]["r"], found["LORA"]["target_modules"]) == (8, ["q_proj", "v_proj"])
    assert found["TRAINING"]["gradient_accumulation_steps"] == 4
    assert (found["TRAINING"]["max_steps"], found["FRACTION"]) == (30, 0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limits": {"max_seconds": 60}}, "limit of 60 seconds"),
        ({"continue_from": "ad_1"}, "ad_1"),
        ({"evaluation": {"every_steps": 5, "early_stopping": {}}}, "Early stopping"),
        ({"training": {"overlength": "truncate"}}, "beginning of their prompt"),
        ({"training": {}}, "not been planned"),
    ],
)
def test_what_a_tool_cannot_say_stands_at_the_top(change: dict[str, Any], words: str) -> None:
    for tool in ("trl", "axolotl", "llamafactory"):
        head = written(tool, SPEC | change).split("\n\n")[0]  # type: ignore[arg-type]
        assert words in head


def test_no_name_ends_a_comment_or_a_string() -> None:
    evil = 'a"\n\nimport os\nos.system("x") #'
    data = Data(evil, "jsonl", "mapping", {"prompt": evil + "{q}", "completion": "{a}"})
    text = scripts.write("trl", "job_1", evil, SPEC, data)
    assert constants(text)["DATA"] == constants(text)["MODEL"] == evil
    assert "import os\n" not in text
    assert yaml.safe_load(scripts.write("axolotl", "job_1", evil, SPEC, data))["base_model"] == evil


FORMATS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "messages": (
        "messages",
        None,
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ),
    "pairs": ("prompt_completion", None, {"prompt": "q", "completion": "a"}),
    "alpaca": ("alpaca", None, {"instruction": "do", "input": "this", "output": "a"}),
    "alpaca without input": ("alpaca", None, {"instruction": "do", "input": "<noinput>", "output": "a"}),
    "sharegpt": (
        "sharegpt",
        None,
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ),
    "turns": (
        "mapping",
        {
            "messages": [
                {"role": "system", "content": "Use {{x}} and {{{t}}}."},
                {"role": "user", "content": "{q}: {t}"},
                {"role": "assistant", "content": "{a}"},
            ]
        },
        {"q": "q", "t": "CREATE TABLE {t}", "a": "a"},
    ),
    "parts": ("mapping", {"prompt": "{q}?", "completion": "{a}"}, {"q": "q", "a": "a"}),
    "column": (
        "mapping",
        {
            "messages": "talk",
            "role": "who",
            "content": "said",
            "roles": {"client": "user", "agent": "assistant"},
        },
        {"talk": [{"who": "client", "said": "q"}, {"who": "agent", "said": "a"}]},
    ),
    "text": ("mapping", {"text": "{body}."}, {"body": "b"}),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_script_reads_rows_as_graft_does(tmp_path: Path, name: str, packed: bool) -> None:
    kind, mapping, row = FORMATS[name]
    line = (json.dumps(row) + "\n").encode()
    file = tmp_path / "rows"
    file.write_bytes(gzip.compress(line) if packed else line)
    with file.open("rb") as source:
        ((_, expected),) = validate.conversations(source, Reading("jsonl", packed, kind, mapping))  # type: ignore[arg-type]
    code = written("trl", data=Data("rows", "jsonl.gz" if packed else "jsonl", kind, mapping))
    found = run_reader(code, file)
    if isinstance(expected, Conversation):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in expected.turns]
        assert found[0]["messages"] == turns
    else:
        assert found == [{"text": expected}]


def test_the_script_reads_tables(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as target:
        csv.writer(target).writerows([["prompt", "completion"], ["q, with a comma", "a\nb"]])
    code = written("trl", data=Data("rows.csv", "csv", "prompt_completion", None))
    assert [turn["content"] for turn in run_reader(code, file)[0]["messages"]] == ["q, with a comma", "a\nb"]


def run_reader(code: str, file: Path) -> list[dict[str, Any]]:
    """The script's own functions up to the examples, without its libraries."""
    kept = [line for line in code.splitlines() if not line.startswith(("import torch", "from "))]
    space: dict[str, Any] = {"__name__": "script"}
    exec("\n".join(kept), space)
    return [space["example"](row) for row in space["rows"](str(file))]
