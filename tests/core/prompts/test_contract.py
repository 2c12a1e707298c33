"""The prompt contract: what it is made of, and what lies beside an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import BadRequest, GraftError
from core.ml import contract as contracts
from core.ml import prompts
from core.ml.formats.chat.example import Conversation, Turn
from core.ml.prompts import Contract
from tests import templates, tiny
from tests.core.prompts.conftest import with_template

TALK = [
    Turn(role="system", content="Be brief."),
    Turn(role="user", content="How are you?"),
    Turn(role="assistant", content="Fine."),
    Turn(role="user", content="Bye, été 東京 😀"),
    Turn(role="assistant", content="Au revoir, été."),
]
WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "code"),
    [(WITHOUT_END, "eos_not_trained"), ("{{ bos_token }}" + tiny.TEMPLATE, "double_bos")],
)
def test_a_tokenizer_that_cannot_carry_a_chat_is_refused(tmp_path: Path, template: str, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        contracts.load(with_template(tmp_path, template))
    assert caught.value.code == code


def test_a_base_model_without_a_template_gets_plain_marks_and_its_own_end(tmp_path: Path) -> None:
    contract = contracts.load(with_template(tmp_path, None))
    assert contract.template == "plain"
    text = prompts.text_of(contract, prompts.encode(contract, Conversation(TALK)).ids)
    assert text == (
        "Be brief.\n\n### User:\nHow are you?\n\n### Assistant:\nFine.<|im_end|>\n\n"
        "### User:\nBye, été 東京 😀\n\n### Assistant:\nAu revoir, été.<|im_end|>"
    )
    assert contract.stop_token_ids == (contract.tokenizer.eos_token_id,)


def test_a_base_model_without_template_and_end_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadRequest) as caught:
        contracts.load(tmp_path)
    assert caught.value.code == "eos_not_trained"


@pytest.mark.parametrize("template", ["{{ messages[99].content }}", "{% if %}", "{{ messages.pop(0) }}"])
def test_a_broken_template_is_an_error_of_the_model(tmp_path: Path, template: str) -> None:
    with pytest.raises(BadRequest) as caught:
        contracts.load(with_template(tmp_path, template))
    assert caught.value.code == "template_error"


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}" + tiny.TEMPLATE
    with pytest.raises(BadRequest) as caught:
        contracts.load(with_template(tmp_path, escape))
    assert caught.value.code == "template_error"


def test_a_saved_contract_comes_back_the_same(contract: Contract, tmp_path: Path) -> None:
    contracts.save(contract, tmp_path)
    again = contracts.load(tmp_path)
    assert again.stop_token_ids == contract.stop_token_ids
    assert again.template_sha256 == contract.template_sha256
    for loss_on in ("auto", "assistant", "completion", "all"):
        talk = Conversation(TALK)
        assert prompts.encode(again, talk, loss_on=loss_on) == prompts.encode(contract, talk, loss_on=loss_on)


def saved(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "prompt_contract.json").read_text())
    return facts


def test_a_saved_contract_carries_a_sample_to_check_it_by(contract: Contract, tmp_path: Path) -> None:
    contracts.save(contract, tmp_path)
    facts = saved(tmp_path)
    sample = facts["sample"]
    encoded = prompts.encode(contract, Conversation([Turn(**turn) for turn in sample["messages"]]))
    assert (sample["ids"], sample["trained"]) == (encoded.ids, encoded.trained)
    assert sample["text"] == prompts.text_of(contract, encoded.ids)
    assert facts["stop_token_ids"] == list(contract.stop_token_ids)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("chatml", "You are a helpful AI assistant."),
        ("qwen", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("zephyr", None),
        ("gemma", None),
    ],
)
def test_a_saved_contract_says_the_templates_own_system_message(
    tmp_path: Path, name: str, default: str | None
) -> None:
    templates.save(templates.FAMILIES[name], tmp_path)
    contracts.save(contracts.load(tmp_path), tmp_path)
    assert saved(tmp_path)["system_default"] == default


def test_a_contract_of_the_first_version_is_still_read(contract: Contract, tmp_path: Path) -> None:
    contracts.save(contract, tmp_path)
    facts = {
        name: value
        for name, value in saved(tmp_path).items()
        if name in ("template_sha256", "stop_token_ids", "bos_token_id", "sample")
    }
    facts["sample"].pop("text")
    (tmp_path / "prompt_contract.json").write_text(json.dumps(facts | {"version": 1}))
    assert contracts.load(tmp_path).stop_token_ids == contract.stop_token_ids


@pytest.mark.parametrize("change", ["{# later #}", "{{ '' if messages[0].role == 'user' else 'x' }}"])
def test_a_template_changed_after_training_is_refused(
    contract: Contract, tmp_path: Path, change: str
) -> None:
    contracts.save(contract, tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(file.read_text() + change)
    with pytest.raises(GraftError) as caught:
        contracts.load(tmp_path)
    assert caught.value.code == "contract_broken"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"stop_token_ids": 3}', '{"stop_token_ids": [2]}', "\x00"]
)
def test_a_contract_that_cannot_be_read_is_refused(contract: Contract, tmp_path: Path, content: str) -> None:
    contracts.save(contract, tmp_path)
    (tmp_path / "prompt_contract.json").write_text(content)
    with pytest.raises(GraftError) as caught:
        contracts.load(tmp_path)
    assert caught.value.code == "contract_broken"


def test_the_stop_tokens_are_the_turn_end_and_the_makers_own(tmp_path: Path) -> None:
    with_template(tmp_path, tiny.TEMPLATE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert set(contracts.load(tmp_path).stop_token_ids) == {0, 2}


def test_adapters_of_one_base_share_its_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "base")
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder in folders:
        folder.mkdir()
        contracts.save(contracts.load(made), folder)
    config = json.loads((folders[2] / "tokenizer_config.json").read_text())
    (folders[2] / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    one, two, other = (contracts.load_cached(folder) for folder in folders)
    assert one.tokenizer is two.tokenizer
    assert other.tokenizer is not one.tokenizer
    assert contracts.load_cached(folders[0]) is one
    again = contracts.load_shared(folders[0])
    assert again is not one
    assert again.tokenizer is one.tokenizer
