"""What the preview shows is what the trainer feeds, token for token, for every format."""

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from api.routes import preview
from core.ml import base_model, catalogue
from core.ml import contract as contracts
from core.ml.catalogue import Catalogue
from core.ml.formats import validate
from core.ml.prompts import LossOn
from core.ml.training import assembly, config, plan
from core.ml.training.data import rows_of
from core.ml.training.run import Run, Source
from tests import templates, tiny

CALL = {"id": "a1", "type": "function", "function": {"name": "area", "arguments": '{"town": "Genève"}'}}
TOOLS = [{"type": "function", "function": {"name": "area", "description": "How big", "parameters": {}}}]
TOOLED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How big is it? <|im_end|>"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1", "content": "16 km²"},
    {"role": "assistant", "content": "Sixteen."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Hm", "weight": 0},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "\nAu revoir 😀 "},
]
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHATML = "<|im_start|>user\nHi{}<|im_end|>\n<|im_start|>assistant\nHello{}<|im_end|>\n"
FORMATS: dict[str, tuple[str, Any, list[dict[str, Any]]]] = {
    "messages": ("messages", None, [{"messages": TOOLED, "tools": TOOLS}, {"messages": PLAIN}]),
    "prompt_completion": (
        "prompt_completion",
        None,
        [{"prompt": f"Q {i}: ", "completion": " A"} for i in "12"],
    ),
    "conversational": (
        "prompt_completion",
        None,
        [{"prompt": TOOLED[:6], "completion": TOOLED[8:], "tools": TOOLS}],
    ),
    "text": ("text", {"text": "{text}"}, [{"text": "Say it."}, {"text": "<|im_start|>user\nHi<|im_end|>"}]),
    "layout": ("auto", None, [{"text": CHATML.format(i, i)} for i in range(3)]),
    "alpaca": (
        "alpaca",
        None,
        [
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": "Name", "input": "", "output": "Ada"},
        ],
    ),
    "sharegpt": (
        "sharegpt",
        None,
        [
            {
                "conversations": [
                    {"from": "human", "value": "How big?"},
                    {"from": "function_call", "value": '{"name": "area", "arguments": {"town": "Bern"}}'},
                    {"from": "observation", "value": "52 km²"},
                    {"from": "gpt", "value": "Fifty-two."},
                ],
                "system": "Be brief.",
                "tools": json.dumps(TOOLS),
            }
        ],
    ),
    "mapping": (
        "mapping",
        {"messages": [{"role": "user", "content": "{q}?"}, {"role": "assistant", "content": "{a}"}]},
        [{"q": f"What {i}", "a": f"It {i}"} for i in range(3)],
    ),
}


def read(folder: Path, name: str) -> Source:
    kind, mapping, rows = FORMATS[name]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with file.open("rb") as opened:
        report = validate.inspect(opened, kind=kind, mapping=mapping)
    assert report.errors == []
    assert report.detection is not None
    found = report.detection
    return Source(file, validate.Reading(report.file_type, report.packed, found.format, found.mapping))


@pytest.mark.parametrize(
    ("family", "loss_on"),
    [*product(["tiny", "qwen"], ["auto", "completion", "all"])]
    + [(family, "auto") for family in templates.FAMILIES if family != "qwen"],
)
@pytest.mark.parametrize("name", FORMATS)
def test_the_preview_shows_the_batches_of_the_trainer(
    tiny_model: Path, tmp_path: Path, name: str, family: str, loss_on: LossOn
) -> None:
    if name == "text" and loss_on == "completion":
        pytest.skip("a text has no completion")
    model = catalogue.find(Catalogue(tmp_path / "models", {tiny.NAME: str(tiny_model)}), tiny.NAME)
    folder = tiny_model if family == "tiny" else templates.save(templates.FAMILIES[family], tmp_path)
    contract = contracts.load(folder)
    source = read(tmp_path, name)
    spec = config.settle(
        config.Spec.model_validate(
            {"training": {"batch_size": 2, "effective_batch_size": 2, "epochs": 1, "loss_on": loss_on}}
        )
    )
    rows = rows_of(Run(model, spec, source, None, None, tmp_path), contract, context=2048)
    precision = base_model.settle(spec.quantization)
    planned = plan.made(spec, rows, assembly.device(precision), None)
    loaded = assembly.loaded(model, precision, planned)
    trainer = assembly.trainer_of(loaded, planned, precision, contract, rows, tmp_path / "out")
    fed = []
    for batch in trainer.get_train_dataloader():
        for first, last in pairwise(batch["cu_seq_lens_q"].tolist()):
            fed.append([batch[name][0, first:last].tolist() for name in ("input_ids", "labels")])
    shown = []
    with source.path.open("rb") as file:
        for line, example in validate.conversations(file, source.reading):
            row = preview._preview_row(contract, line, example, loss_on, 10_000, cut=False)
            # Nothing stands before the first token that it could be learned from.
            labels = [-100] + [token.id if token.trained else -100 for token in row.tokens[1:]]
            shown.append([[token.id for token in row.tokens], labels])
            assert row.n_trained
            assert row.text == contract.tokenizer.decode([token.id for token in row.tokens])
    assert sorted(fed) == sorted(shown)
