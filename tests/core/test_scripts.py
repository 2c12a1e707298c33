"""A training as a script for another tool: its fields, and how it reads the data."""

import ast
import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from core.ml import contract, rendering
from core.ml.export.scripts import written as scripts
from core.ml.export.scripts.recipe import Data, Tool
from core.ml.formats import validate
from core.ml.formats.chat.example import Conversation
from core.ml.formats.validate import Reading
from tests import tiny

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
CHATS = Data("chats.jsonl", "jsonl", "messages", None)
TEXTS = Data("texts.jsonl", "jsonl", "text", None)
TOOLS: tuple[Tool, ...] = ("trl", "axolotl", "llamafactory")


def written(tool: Tool, spec: dict[str, Any] = SPEC, data: Data = PAIRS) -> str:
    return scripts.write(tool, "job_1", "org/model", spec, data)


def loaded(tool: Tool, spec: dict[str, Any] = SPEC, data: Data = PAIRS) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(written(tool, spec, data))
    return read


def head(tool: Tool, spec: dict[str, Any] = SPEC, data: Data = PAIRS) -> str:
    """The comment at the top."""
    return written(tool, spec, data).split("\n\n")[0]


def training(**fields: Any) -> dict[str, Any]:
    """The spec with other fields of its training; None takes one out."""
    return SPEC | {
        "training": {name: value for name, value in (SPEC["training"] | fields).items() if value is not None}
    }


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
    for tool in TOOLS:
        assert words in head(tool, SPEC | change)


def test_what_becomes_of_long_rows_is_said_of_each_tool() -> None:
    assert "their end is cut off" in head("trl", training(overlength="drop"))
    assert "their prompt and their answer are cut" in head("llamafactory", training(overlength="drop"))
    for strategy, overlength in (("raise", "error"), ("drop", "drop")):
        spec = training(overlength=overlength)
        assert loaded("axolotl", spec)["excess_length_strategy"] == strategy
        assert "too long" not in head("axolotl", spec)
    assert "their end is cut off" in head("axolotl", training(overlength="truncate"))
    assert "cut into several rows" in head("axolotl", data=TEXTS)


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.03, 0), (0.05, 1), (0.1, 3)])
def test_a_warmup_has_as_many_whole_steps_as_in_graft(ratio: float, steps: int) -> None:
    spec = training(warmup_ratio=ratio)  # of 30 steps
    assert constants(written("trl", spec))["TRAINING"]["warmup_steps"] == steps
    assert loaded("llamafactory", spec)["warmup_steps"] == steps
    lines = loaded("axolotl", spec)
    assert lines["warmup_steps"] == steps
    assert "warmup_ratio" not in lines
    assert ("warmup" in head("axolotl", spec)) is (steps == 1)
    assert "warmup" not in head("trl", spec) + head("llamafactory", spec)


def test_a_warmup_of_unknown_steps_is_a_share_and_its_rounding_is_said() -> None:
    spec = training(max_steps=None, epochs=2.0, warmup_ratio=0.1)
    assert constants(written("trl", spec))["TRAINING"]["warmup_steps"] == 0.1
    assert loaded("llamafactory", spec)["warmup_steps"] == loaded("axolotl", spec)["warmup_ratio"] == 0.1
    for tool in ("trl", "llamafactory"):
        assert "Graft rounds it down to whole steps, this tool up" in head(tool, spec)
    assert "rounds" not in head("axolotl", spec)


def test_axolotl_reads_which_answers_are_trained() -> None:
    for loss_on in ("assistant", "completion"):
        (entry,) = loaded("axolotl", training(loss_on=loss_on), CHATS)["datasets"]
        assert entry["roles_to_train"] == ["assistant"]
        assert (entry["message_field_training"], entry["train_on_eos"]) == ("weight", "turn")
    (entry,) = loaded("axolotl", training(loss_on="all"), CHATS)["datasets"]
    assert "message_field_training" not in entry
    assert "between the messages is not trained" in head("axolotl", training(loss_on="all"), CHATS)


TALK = {
    "messages": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2", "weight": 0},
        {"role": "user", "content": "q3"},
        {"role": "assistant", "content": "a3", "weight": 1},
    ]
}


@pytest.mark.parametrize(
    ("loss_on", "weights"), [("assistant", [None, 0, 1]), ("completion", [0, 0, 1]), ("all", [None, 0, 1])]
)
def test_rows_for_other_tools_have_weight_0_at_answers_that_are_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_on: str, weights: list[int | None]
) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "data.jsonl"
    source.write_text(json.dumps(TALK) + "\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(source), "--write-messages", str(target)])
    space(written("trl", training(loss_on=loss_on), CHATS))["main"]()
    (row,) = map(json.loads, target.read_text().splitlines())
    assert [turn.get("weight") for turn in row["messages"][1::2]] == weights
    assert [turn["content"] for turn in row["messages"]] == ["q1", "a1", "q2", "a2", "q3", "a3"]


@pytest.mark.parametrize(
    ("data", "row"),
    [
        (
            Data("rows", "jsonl", "sharegpt", None),
            {
                "conversations": [
                    {"from": "human", "value": "q1"},
                    {"from": "gpt", "value": "a1", "weight": 0},
                    {"from": "human", "value": "q2"},
                    {"from": "gpt", "value": "a2"},
                ]
            },
        ),
        (
            Data("rows", "jsonl", "mapping", {"messages": "talk", "role": "who", "content": "said"}),
            {
                "talk": [
                    {"who": "user", "said": "q1"},
                    {"who": "assistant", "said": "a1", "weight": 0},
                    {"who": "user", "said": "q2"},
                    {"who": "assistant", "said": "a2"},
                ]
            },
        ),
        (
            PAIRS,
            {
                "prompt": [
                    {"role": "user", "content": "q1"},
                    {"role": "assistant", "content": "a1"},
                    {"role": "user", "content": "q2"},
                ],
                "completion": [{"role": "assistant", "content": "a2"}],
            },
        ),
    ],
)
def test_the_script_trains_the_answers_that_graft_trains(data: Data, row: dict[str, Any]) -> None:
    names = space(written("trl", data=data))
    turns = names["example"](row)["messages"]
    assert [turns[i]["content"] for i in names["trained"](turns)] == ["a2"]


def test_no_turn_or_call_gets_what_only_others_have() -> None:
    def called(name: str) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "f", "arguments": {name: 1}}}
        return [TALK["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]

    names = space(written("trl", data=CHATS))
    names["Dataset"] = Dataset
    rows = names["prepared"]([{"messages": called(name)} for name in "ab"] + [TALK]).to_list()
    assert [row["prompt"] + row["completion"] for row in rows[:2]] == [called("a"), called("b")]


def test_the_script_holds_back_whole_conversations() -> None:
    names = space(written("trl", data=CHATS))
    names["Dataset"] = Dataset
    rows = [
        {"messages": [turn | {"content": f"{i} {turn['content']}"} for turn in TALK["messages"]]}
        for i in range(20)
    ]
    train, held = map(names["prepared"], names["divided"]([names["example"](row) for row in rows]))
    assert (len(train), len(held)) == (36, 4)  # two answers of each are trained
    of = [{row["completion"][0]["content"].split()[0] for row in part} for part in (train, held)]
    assert not of[0] & of[1]


def test_what_is_held_back_is_said() -> None:
    for tool in TOOLS:
        assert "of rows with equal prompts some may be trained and others held back" in head(tool)
        assert "held back" not in head(tool, SPEC | {"validation": {}})
    assert "--valid" in head("trl", SPEC | {"validation": {"dataset_id": "ds_1"}})


def test_what_llamafactory_does_not_read_is_said() -> None:
    found = head("llamafactory", data=CHATS)
    assert "Answers with weight 0 are trained" in found
    assert "Tools and calls are not read" in found
    assert "Answers with weight" not in head("llamafactory", training(loss_on="all"), CHATS)
    alpaca = Data("rows.jsonl", "jsonl", "alpaca", None)  # a form that has neither
    assert "Answers with weight" not in head("llamafactory", data=alpaca)
    assert "Tools and calls" not in head("llamafactory", data=alpaca)


def test_llamafactory_is_asked_for_texts_as_it_takes_them() -> None:
    spec = training(loss_on="all", packing=True)
    lines = loaded("llamafactory", spec, TEXTS)
    assert lines["stage"] == "pt"
    refused = ("train_on_prompt", "mask_history", "neat_packing")
    assert not any(lines[name] for name in refused)
    (info,) = (line for line in head("llamafactory", spec, TEXTS).splitlines() if "dataset_info.json" in line)
    entries = json.loads(info.split("beside it: ")[1])
    assert entries == {"data": {"file_name": "data.jsonl", "columns": {"prompt": "text"}}}


@pytest.mark.parametrize("begins", [False, True])
def test_the_script_gives_a_base_without_template_that_of_graft(tmp_path: Path, begins: bool) -> None:
    tokenizer = tiny.tokenizer(None)
    if begins:
        start = ("<|im_start|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [start])
    tokenizer.save_pretrained(tmp_path)
    expected = contract.load(tmp_path).tokenizer.chat_template
    with_template = space(written("trl"))["with_template"]
    assert with_template(tokenizer).chat_template == expected
    assert expected.startswith("{{ bos_token }}") is begins
    assert with_template(tiny.tokenizer()).chat_template == tiny.TEMPLATE


def test_what_tools_of_yaml_do_without_a_template_is_said() -> None:
    assert json.dumps(rendering.PLAIN) in head("axolotl")
    assert "here the texts stand without marks" in head("llamafactory")
    assert "no chat template" not in head("axolotl", data=TEXTS) + head("llamafactory", data=TEXTS)


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
    names = space(code)
    return [names["example"](row) for row in names["rows"](str(file))]


def space(code: str) -> dict[str, Any]:
    """The script's own names, without its libraries."""
    kept = [line for line in code.splitlines() if not line.startswith(("import torch", "from "))]
    names: dict[str, Any] = {"__name__": "script"}
    exec("\n".join(kept), names)
    return names
