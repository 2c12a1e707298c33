"""From data of other forms than question and answer to an adapter that is asked as it was trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.ml import contract as contracts
from core.ml import prompts
from graft_client.client import ApiError
from tests import tiny
from tests.service import Service

# The main job runs on the other kind of servers, too.
pytestmark = pytest.mark.parametrize("service", ["sqlite and a folder"], indirect=True)
TRAINING = {"training": {"max_steps": 3, "effective_batch_size": 4, "learning_rate": 0.02}}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]


def trained(service: Service, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The adapter of a short job on these rows."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with service.client() as client:
        dataset = client.upload(file)
        *_, job = client.watch(client.create_job({"dataset_id": dataset["id"], **TRAINING})["id"])
        assert job["status"] == "succeeded", job["error"]
        return next(row for row in client.adapters() if row["id"] == job["adapter_id"]) | {
            "spec": job["spec"]
        }


def test_an_adapter_of_plain_texts_goes_on_with_a_text(
    service: Service, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"Q: what is {n}?\nA: it is {n}"} for n in range(8)]
    adapter = trained(service, rows, tmp_path)
    assert adapter["spec"]["training"]["loss_on"] == "all"
    contract = contracts.load(tiny_model)
    expected = len(prompts.encode_plain(contract, "Q: what is 3?\nA:"))
    with service.client() as client:
        # The space at the end belongs to the next token.
        answer = client.generate(prompt="Q: what is 3?\nA: ", adapter_id=adapter["id"], max_new_tokens=2)
        assert answer["usage"]["prompt_tokens"] == expected
        with pytest.raises(ApiError) as refused:
            client.generate(messages=[{"role": "user", "content": "3?"}], adapter_id=adapter["id"])
    assert refused.value.code == "no_turns"


def test_tools_are_written_at_generation_as_in_training(
    service: Service, tiny_model: Path, tmp_path: Path
) -> None:
    asked = [{"role": "user", "content": "1 and 2?"}]
    talk = [
        *asked,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "3"},
    ]
    rows = [
        {"messages": [*talk, {"role": "assistant", "content": f"It is {n}."}], "tools": TOOLS} for n in "3456"
    ]
    adapter = trained(service, rows, tmp_path)
    contract = contracts.load(tiny_model)
    assert contract.styles.tools == "text", tiny.NAME
    with service.client() as client:
        for messages in (asked, talk):
            answer = client.generate(
                messages=messages, tools=TOOLS, adapter_id=adapter["id"], max_new_tokens=2
            )
            conversation = json.loads(json.dumps({"messages": messages, "tools": TOOLS}))
            assert answer["usage"]["prompt_tokens"] == len(_prompt(contract, conversation))


def _prompt(contract: prompts.Contract, row: dict[str, Any]) -> list[int]:
    """The tokens before the answer that follows these messages in a data set."""
    from core.ml.formats.chat.messages import conversation

    row["messages"].append({"role": "assistant", "content": "ok"})
    read = conversation(row)
    encoded = prompts.encode(contract, read, loss_on="completion")
    return encoded.ids[: encoded.trained.index(True)]
