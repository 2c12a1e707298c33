"""The client, with the API in this process as its server."""

from contextlib import closing

import pytest

from core.control.running import events
from graft_client.client import Client
from tests.api.conftest import Api, only_sqlite
from tests.control import rows

pytestmark = only_sqlite


@pytest.fixture
def client(api: Api) -> Client:
    client = Client("http://here", "")
    with closing(client._http):
        client._http = api.client
    return client


def test_checkpoints_are_all_listed_where_they_fill_more_than_a_page(api: Api, client: Client) -> None:
    job = rows.job(api.sessions, api.project_id)
    with api.sessions.begin() as session:
        for step in range(1, 102):  # as many as are kept, and the best besides
            events.add_checkpoint(session, job.id, step, f"jobs/{job.id}/checkpoints/1-{step}", [], {})
    assert [row["step"] for row in client.checkpoints(job.id)] == list(range(101, 0, -1))


def test_a_list_in_pages_is_the_whole_list(client: Client) -> None:
    presets = client.presets()
    assert len(presets) > 1
    assert list(client._pages("/presets", 1)) == presets
    assert list(client._pages("/presets", len(presets))) == presets


def test_an_empty_list_is_one_page(api: Api, client: Client) -> None:
    assert client.checkpoints(rows.job(api.sessions, api.project_id).id) == []
