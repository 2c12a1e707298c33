"""A training as a script for another tool: its fields, what it says, and the tokens that it trains."""

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers.processors import TemplateProcessing

from core import strict_json
from core.errors import BadRequest
from core.ml import contract, prompts, rendering
from core.ml.catalogue import BaseModel
from core.ml.export.scripts import written as scripts
from core.ml.export.scripts.recipe import Data, Tool
from core.ml.formats.chat import plain, weights
from core.ml.formats.chat.example import Conversation
from core.ml.formats.validate import Reading
from core.ml.prompts import Contract, Encoded, LossOn
from core.ml.training import data
from core.ml.training.config import Spec
from core.ml.training.run import Run, Source
from tests import tiny
from tests.corpus import read
from tests.corpus.case import answer, chat, user
from tests.templates import FAMILIES, tokenizer

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
CHATS = Data("ds_1", "chats.jsonl", False)
TEXTS = Data("ds_1", "texts.jsonl", True)
TOOLS: tuple[Tool, ...] = ("trl", "axolotl", "llamafactory")


def written(tool: Tool, spec: dict[str, Any] = SPEC, data: Data = CHATS) -> str:
    return scripts.write(tool, "job_1", "org/model", spec, data)


def loaded(tool: Tool, spec: dict[str, Any] = SPEC, data: Data = CHATS) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(written(tool, spec, data))
    return read


def head(tool: Tool, spec: dict[str, Any] = SPEC, data: Data = CHATS) -> str:
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
        ({"training": {}}, "not been planned"),
    ],
)
def test_what_a_tool_cannot_say_stands_at_the_top(change: dict[str, Any], words: str) -> None:
    for tool in TOOLS:
        assert words in head(tool, SPEC | change)


@pytest.mark.parametrize("tool", ["trl", "axolotl", "llamafactory"])
def test_a_name_that_no_other_tool_knows_is_told(tool: Tool) -> None:
    words = 'Only this Graft knows "ours"'
    assert words in scripts.write(tool, "job_1", "ours", SPEC, CHATS)
    assert "Only this Graft" not in written(tool)


def test_what_becomes_of_long_rows_is_said_of_each_tool() -> None:
    for overlength in ("error", "drop", "truncate"):
        assert "long" not in head("trl", training(overlength=overlength))
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
        (entry,) = loaded("axolotl", training(loss_on=loss_on))["datasets"]
        assert entry["roles_to_train"] == ["assistant"]
        assert (entry["message_field_training"], entry["train_on_eos"]) == ("weight", "turn")
    (entry,) = loaded("axolotl", training(loss_on="all"))["datasets"]
    assert "message_field_training" not in entry
    assert "between the messages is not trained" in head("axolotl", training(loss_on="all"))


def test_the_step_that_graft_keeps_is_said() -> None:
    spec = SPEC | {"evaluation": {"every_steps": 5}}
    for tool in TOOLS:
        assert "keeps the step of the lowest validation loss" in head(tool, spec)
        assert "lowest validation loss" not in head(tool) + head(tool, spec | {"validation": {}})


def test_what_is_held_back_is_said() -> None:
    for tool in ("axolotl", "llamafactory"):
        assert "of rows with equal prompts some may be trained and others held back" in head(tool)
        assert "held back" not in head(tool, SPEC | {"validation": {}})
    assert "held back" not in head("trl")


def test_the_commands_that_give_the_data_stand_at_the_top() -> None:
    spec = training(loss_on="completion") | {"validation": {"dataset_id": "ds_2"}}
    given = "graft data conversations {} --model org/model --loss-on completion -o {}"
    for tool in TOOLS:
        lines = [line for line in head(tool, spec).splitlines() if "graft data" in line]
        assert lines == [
            f"#   {given.format('ds_1', 'data.jsonl')}",
            f"#   {given.format('ds_2', 'valid.jsonl')}",
        ]
    found = constants(written("trl", spec))
    assert (found["DATA"], found["VALID"]) == ("data.jsonl", "valid.jsonl")
    assert loaded("axolotl", spec)["datasets"][0]["path"] == "data.jsonl"
    assert loaded("axolotl", spec)["test_datasets"][0]["path"] == "valid.jsonl"


def test_no_command_asks_for_rows_that_are_deleted() -> None:
    deleted = Data("ds_1", None, False)
    for tool in TOOLS:
        said = head(tool, data=deleted)
        assert "on a data set that is deleted" in said
        assert "data.jsonl must come from somewhere else" in said
        assert "graft data" not in said
        said = head(tool, SPEC | {"validation": {"dataset_id": "ds_2"}}, deleted)
        (command,) = [line for line in said.splitlines() if "graft data" in line]
        assert command.startswith("#   graft data conversations ds_2 ")


def test_no_name_runs_a_command() -> None:
    text = scripts.write("trl", "job_1", "$(touch pwned)", SPEC, Data("ds_1", "$(touch pwned).jsonl", False))
    (command,) = (line for line in text.splitlines() if line.startswith("#   graft"))
    assert shlex.split(command)[4:8] == ["ds_1", "--model", "$(touch pwned)", "--loss-on"]
    assert "'$(touch pwned)'" in command


def test_what_llamafactory_does_not_read_is_said() -> None:
    found = head("llamafactory")
    assert "Answers with weight 0 are trained" in found
    assert "tools and calls, which are not read" in found
    assert "that end with a question" in found
    for loss_on in ("all", "completion"):  # it can say both
        assert "Answers with weight" not in head("llamafactory", training(loss_on=loss_on))


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
    data = Data("ds_1", evil, False)
    text = scripts.write("trl", "job_1", evil, SPEC, data)
    assert constants(text)["MODEL"] == evil
    assert "\nos.system" not in text
    assert yaml.safe_load(scripts.write("axolotl", "job_1", evil, SPEC, data))["base_model"] == evil


@pytest.fixture(scope="module", params=["chatml", "qwen", "gemma", "llama2", "llama3", "mistral"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Contract:
    """Templates that write tools themselves or not at all, that trim, and tokenizers that put a space first."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    tokenizer(FAMILIES[request.param]).save_pretrained(folder)
    return contract.load(folder)


def rows_for(base: Contract, loss_on: LossOn, file: Path) -> list[Encoded]:
    """Rows of all formats as Graft writes them for this base, and the tokens that it trains of them."""
    expected, lines = [], []
    for _, examples in read.first_examples():
        for example in examples:
            try:
                encoded = prompts.encode(base, example, loss_on=loss_on)
            except BadRequest:
                continue  # this template refuses it
            trained = weights.weighted(example, loss_on)
            if isinstance(trained, Conversation):
                trained = rendering.written(trained, base.styles)
            row = plain.row_of(trained)
            if not base.control.search(strict_json.dumps(row)):  # it is said that these are otherwise
                lines.append(strict_json.dumps(row) + "\n")
                expected.append(encoded)
    file.write_text("".join(lines))
    return expected


@pytest.mark.parametrize("loss_on", ["auto", "completion", "all"])
def test_the_script_trains_the_tokens_that_graft_trains(
    base: Contract, tmp_path: Path, loss_on: LossOn
) -> None:
    file = tmp_path / "data.jsonl"
    expected = rows_for(base, loss_on, file)
    names = space(written("trl", training(loss_on=loss_on)))
    found = [names["encoded"](base.tokenizer, row) for row in names["rows"](file)]
    assert len(found) == len(expected) > 50
    for (ids, labels, prompt), row in zip(found, expected, strict=True):
        assert ids == row.ids
        assert labels == labels_of(row)
        assert prompt == row.prompt


@pytest.mark.parametrize("overlength", ["error", "drop", "truncate"])
def test_the_script_does_with_long_rows_what_graft_does(
    base: Contract, tmp_path: Path, overlength: str
) -> None:
    expected = rows_for(base, "auto", tmp_path / "data.jsonl")
    limit = max(len(row.ids) for row in expected) // 4
    names = space(written("trl", training(overlength=overlength, max_length=limit)))
    for row in expected:
        cut = prompts.truncated(base, row, limit) if overlength == "truncate" else row
        if len(row.ids) > limit and (overlength == "error" or cut is None):
            with pytest.raises(SystemExit, match="tokens"):
                names["fitted"](base.tokenizer, row.ids, labels_of(row))
            continue
        found = names["fitted"](base.tokenizer, row.ids, labels_of(row))
        if len(row.ids) > limit and overlength == "drop":
            assert found is None
        else:
            assert cut is not None
            assert found == (cut.ids, labels_of(cut))


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_the_script_holds_back_the_rows_that_graft_holds_back(
    tiny_model: Path, tmp_path: Path, fraction: float
) -> None:
    file = tmp_path / "data.jsonl"
    talks = [chat(user(f"question {i % 20}?"), answer(f"answer {i}.")) for i in range(40)]
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    spec = training(max_steps=1) | {"validation": {"fraction": fraction}}
    tiny_base = BaseModel(tiny.NAME, "folder", tiny_model, tmp_path, tiny.NAME)
    kept = Spec.model_validate({name: part for name, part in spec.items() if name != "validation"})
    source = Source(file, Reading("jsonl", False, "messages", None))
    run = Run(tiny_base, kept, source, None, fraction, tmp_path)
    expected = data.rows_of(run, contract.load(tiny_model), context=512)
    names = space(written("trl", spec))
    train, held = names["divided"](names["tokenised"](tiny.tokenizer(), file))
    assert [one["input_ids"] for one in train] == [one["input_ids"] for one in expected.train_examples]
    assert [one["labels"] for one in held] == [one["labels"] for one in expected.valid_examples]
    assert held


def labels_of(row: Encoded) -> list[int]:
    return [token if trained else -100 for token, trained in zip(row.ids, row.trained, strict=True)]


LIBRARIES = ("import torch", "from datasets ", "from peft ", "from transformers ", "from trl ")


def space(code: str) -> dict[str, Any]:
    """The script's own names, without its libraries."""
    names: dict[str, Any] = {"__name__": "script"}
    exec("\n".join(line for line in code.splitlines() if not line.startswith(LIBRARIES)), names)
    return names
