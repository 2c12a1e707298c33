"""Who hangs up at the API, with all its middleware, ends what the engine writes for him."""

import json
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.e2e.conftest import tiny_environment
from tests.ml.inference import strong
from tests.service import Service, wait_until

# Eight answers, one at a time: written to their ends they take ten seconds.
LONG = {"n": 8, "logit_bias": {"2": -100}, "temperature": 0}
TURNS = [{"role": "user", "content": "name"}]
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"messages": TURNS, "max_new_tokens": 900}),
    ("/v1/chat/completions", {"model": tiny.NAME, "messages": TURNS, "max_tokens": 900}),
    ("/v1/completions", {"model": tiny.NAME, "prompt": "name", "max_tokens": 900}),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("hanging")
    model = strong.model(folder / "base", strong.CONFIGURATIONS["llama"])
    made = Service(folder / "home", tiny_environment(model) | {"GRAFT_ENGINE_RUNNING": "1"})
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {service.key}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        client.post("/generate", json={"messages": TURNS, "max_new_tokens": 1}).raise_for_status()
        yield client


def writes(http: httpx.Client) -> bool:
    engine = http.get("/health/ready").json()["engine"]
    return bool(engine["running"] or engine["waiting"])


def hangs_up(service: Service, http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Asks, sees that the engine writes, and closes the connection before the answer."""
    asking = HTTPConnection(http.base_url.host, http.base_url.port)
    headers = {"authorization": f"Bearer {service.key}", "content-type": "application/json"}
    asking.request("POST", path, json.dumps(body), headers)
    wait_until(lambda: writes(http), "the engine writes", 8)
    asking.close()
    wait_until(lambda: not writes(http), "the engine lays it down", 4)


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_a_whole_answer_ends(service: Service, http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    hangs_up(service, http, path, LONG | body)


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_a_stream_ends(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    one = LONG | body | {"stream": True} | ({"n": 1} if path == "/generate" else {})
    with http.stream("POST", path, json=one) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()  # once this is dropped, the response is closed
        next(lines)
        assert writes(http)
    wait_until(lambda: not writes(http), "the engine lays it down", 4)


def test_a_comparison_ends(service: Service, http: httpx.Client) -> None:
    long = {name: value for name, value in LONG.items() if name != "n"}
    body = {"targets": ["base"] * 8, "messages": TURNS, "max_new_tokens": 900}
    hangs_up(service, http, "/compare", long | body)
    assert http.get("/health/live").json() == {"status": "ok"}


def test_many_who_hang_up_at_any_moment_leave_no_connection(service: Service, http: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {service.key}", "content-type": "application/json"}
    (api,) = service.pids("api.main")

    def files() -> int:
        return len(list(Path(f"/proc/{api}/fd").iterdir()))

    def many_hang_up() -> None:
        for number in range(150):
            path, body = ASKED[number % len(ASKED)]
            one = LONG | body | {"n": 1, "stream": bool(number % 2)}
            asking = HTTPConnection(http.base_url.host, http.base_url.port)
            asking.request("POST", path, json.dumps(one), headers)
            time.sleep(number % 25 / 1000)
            asking.close()
        wait_until(lambda: not writes(http), "the engine lays all of it down", 20)

    many_hang_up()
    before = files()
    many_hang_up()
    wait_until(lambda: files() <= before, f"as few open files as before, {before}", 10)
