"""A data set as it would be trained, in the form that other tools read."""

import asyncio
import gc
import json
from pathlib import Path
from typing import IO, Any

import pytest
from starlette.requests import ClientDisconnect

from api.routes import conversations
from core.control.projects import Caller
from core.ml.formats.chat import plain
from core.ml.formats.chat.example import Example
from core.storage import Storage
from tests import tiny
from tests.api.conftest import Api, only_sqlite, refused
from tests.corpus.case import answer, chat, user

CHATS = [
    chat(user("q1"), answer("a1"), user("q2"), answer("a2", weight=0), user("q3"), answer("a3")),
    chat(user("q4"), answer("a4")),
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def had(api: Api, dataset_id: str, **query: str) -> list[dict[str, Any]]:
    found = api.client.get(f"/datasets/{dataset_id}/conversations", params=query)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in found.content.splitlines()]


def test_a_mapped_table_is_had_as_conversations(api: Api) -> None:
    mapping = {"messages": [{"role": "user", "content": "{q}?"}, {"role": "assistant", "content": "{a}"}]}
    dataset = api.upload(b"q;a\none;1\n", "my table.csv", mapping=json.dumps(mapping)).json()
    assert had(api, dataset["id"]) == [chat(user("one?"), answer("1"))]
    headers = api.client.get(f"/datasets/{dataset['id']}/conversations").headers
    assert headers["content-disposition"].endswith("my%20table.conversations.jsonl")


@only_sqlite
def test_weights_say_what_loss_on_trains(api: Api) -> None:
    dataset_id = api.upload(CHATS).json()["id"]
    for loss_on, expected in {"auto": [None, 0, None], "completion": [0, 0, None], "all": [None] * 3}.items():
        row = had(api, dataset_id, loss_on=loss_on)[0]
        assert [turn.get("weight") for turn in row["messages"][1::2]] == expected


@only_sqlite
def test_what_a_base_has_no_template_for_stands_as_text(api: Api) -> None:
    dataset_id = api.upload([chat(user("q"), answer("a"), tools=[TOOL])]).json()["id"]
    assert had(api, dataset_id)[0]["tools"] == [TOOL]
    (row,) = had(api, dataset_id, model=tiny.NAME)
    assert set(row) == {"messages"}
    assert row["messages"][0]["role"] == "system"
    assert '{"name": "add", "parameters": {}}' in row["messages"][0]["content"]


@only_sqlite
def test_what_is_had_is_previewed_like_the_data_set_itself(api: Api) -> None:
    dataset_id = api.upload(CHATS).json()["id"]
    content = api.client.get(f"/datasets/{dataset_id}/conversations?loss_on=completion").content
    again = api.upload(content).json()["id"]
    first = api.client.get(f"/datasets/{dataset_id}/preview?loss_on=completion").json()["rows"]
    second = api.client.get(f"/datasets/{again}/preview").json()["rows"]
    assert [row["tokens"] for row in first] == [row["tokens"] for row in second]


@only_sqlite
def test_what_cannot_be_had_is_an_error_with_its_line(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    last = chat(user("q"), answer("a"), user("q"), answer("b", weight=0))
    path = f"/datasets/{api.upload([CHATS[1], last]).json()['id']}/conversations"
    monkeypatch.setattr(conversations, "_CHUNK", 1)  # the first line is on its way before the second is read
    error = refused(api.client.get(path, params={"loss_on": "completion"}), 422, "nothing_trained")
    assert (error["message"][:7], error["param"]) == ("Line 2:", "loss_on")
    texts = f"/datasets/{api.upload([{'text': 'one'}, {'text': 'two'}]).json()['id']}/conversations"
    assert api.client.get(texts).content == b'{"text": "one"}\n{"text": "two"}\n'
    refused(api.client.get(texts, params={"loss_on": "assistant"}), 422, "no_turns")
    refused(api.client.get(path, params={"loss_on": "some"}), 422, "invalid_request")
    refused(api.client.get(path, params={"los_on": "all"}), 422, "invalid_request")
    refused(api.client.get(path, params={"model": "none"}), 404, "model_not_found")
    refused(api.stranger.get(path), 404, "dataset_not_found")
    assert list(Path(api.services.settings.uploads).iterdir()) == []


@only_sqlite
def test_lines_come_as_they_are_read_and_none_when_nobody_listens(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Example] = []
    files: list[IO[bytes]] = []
    row_of, opened = plain.row_of, Storage.open

    def counted(example: Example) -> dict[str, Any]:
        read.append(example)
        return row_of(example)

    def seen(storage: Storage, key: str) -> IO[bytes]:
        files.append(opened(storage, key))
        return files[-1]

    dataset_id = api.upload(CHATS * 50).json()["id"]
    whole = had(api, dataset_id)
    monkeypatch.setattr(conversations, "_CHUNK", 1)
    monkeypatch.setattr(plain, "row_of", counted)
    monkeypatch.setattr(Storage, "open", seen)
    assert had(api, dataset_id) == whole
    assert files[0].closed
    read.clear()
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:  # the head of the answer, a line, and another
            raise OSError("nobody listens")

    async def receive() -> Any:
        await asyncio.sleep(60)

    answer = conversations.conversations(dataset_id, api.services, Caller("key", api.project_id, "admin"))
    with pytest.raises(ClientDisconnect):
        asyncio.run(answer({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
    assert len(read) == 2
    del answer
    gc.collect()
    assert files[1].closed
