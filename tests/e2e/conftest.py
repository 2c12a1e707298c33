"""Whole services for the end-to-end tests."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from tests import tiny
from tests.conftest import fresh_database
from tests.hub import Hub
from tests.service import QUICK, Service

MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"name {n}"},
            {"role": "assistant", "content": f"SELECT {n % 7}"},
        ]
    }
    for n in range(48)
]


def tiny_environment(tiny_model: Path) -> dict[str, str]:
    return {
        "GRAFT_MODELS": json.dumps({tiny.NAME: str(tiny_model)}),
        "GRAFT_DEFAULT_MODEL": tiny.NAME,
        "GRAFT_ALLOW_HUB": "false",
        **QUICK,
    }


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MESSAGES))
    return file


@pytest.fixture(scope="module", params=["sqlite and a folder", "postgres and s3"])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Service]:
    """`graft up` with the tiny model: as it is out of the box, and on the servers of production. The hub, which the
    settings do not allow, is asked for nothing."""
    home = tmp_path_factory.mktemp("service") / "home"
    hub = Hub()
    environment = tiny_environment(tiny_model) | hub.environment
    s3 = None
    if request.param.startswith("postgres"):
        s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        s3.start()
        address, port = s3.get_host_and_port()
        keys = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        environment |= keys | {
            "GRAFT_DATABASE_URL": fresh_database(request, "postgres", home),
            "GRAFT_STORAGE_URL": "s3://graft/store",
            "GRAFT_S3_ENDPOINT_URL": f"http://{address}:{port}",
        }
        _make_bucket(environment)
    made = Service(home, environment)
    with hub:
        try:
            yield made.start()
        finally:
            made.stop()
            if s3 is not None:
                s3.stop()
    assert hub.asked == [], hub.asked


def _make_bucket(environment: dict[str, str]) -> None:
    import boto3

    boto3.client(
        "s3",
        endpoint_url=environment["GRAFT_S3_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    ).create_bucket(Bucket="graft")
