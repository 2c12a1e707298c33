"""The inference server on its wire, over real sockets."""

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from core.errors import GraftError, StorageFull
from core.ml.inference.answering import Piece
from core.storage import Storage
from tests import tiny
from tests.ml.inference import strong
from worker.inference import copies, main

KEY = "engine-key"
PROMPT = strong.prompt(20)
NEVER = {"2": -100}


class Server:
    def __init__(self, url: str, app: Any, storage: Path) -> None:
        self.url, self.engine, self.storage = url, app.state.server.engine, storage
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def complete(self, **body: Any) -> httpx.Response:
        return self.http.post(
            "/v1/completions", json={"model": tiny.NAME, "prompt": PROMPT, "temperature": 0, **body}
        )

    def answer(self, **body: Any) -> dict[str, Any]:
        response = self.complete(**body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        response = self.complete(stream=True, **body)
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def load(self, name: str, folder: Path) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(folder), "base_model_name": tiny.NAME}
        return self.http.post("/v1/load_lora_adapter", json=body)

    def idle(self) -> bool:
        for _ in range(300):
            state = self.http.get("/health").json()
            if not state["running"] and not state["waiting"]:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("engine")
    base = strong.model(folder / "base", strong.CONFIGURATIONS["llama"])
    for seed in range(2):
        strong.adapter(folder / "storage" / "adapters" / str(seed), base, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_HOME", str(folder / "home"))
        patch.setenv("GRAFT_STORAGE_URL", str(folder / "storage"))
        patch.setenv("GRAFT_MODELS", json.dumps({tiny.NAME: str(base)}))
        patch.setenv("GRAFT_ENGINE_KEY", KEY)
        patch.setenv("GRAFT_ENGINE_BITS", "16")
        patch.setenv("GRAFT_ENGINE_RUNNING", "4")
        patch.setenv("GRAFT_ENGINE_WAITING", "8")
        app = main.create_app()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.started:
        time.sleep(0.01)
    yield Server(f"http://127.0.0.1:{port}", app, folder / "storage" / "adapters")
    served.should_exit = True
    thread.join(10)
    app.state.server.engine.close()


def test_only_those_who_know_the_key_are_answered(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": tiny.NAME, "prompt": PROMPT})
    assert answer.status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_whole_answer_and_its_stream_are_the_same(server: Server) -> None:
    whole = server.answer(max_tokens=12)
    chunks = server.stream(max_tokens=12, stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]
    assert chunks[-1]["served_by"] == whole["served_by"] == "batch"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_several_outputs_have_seeds_of_their_own(server: Server) -> None:
    hot = {"temperature": 1.5, "seed": 4, "max_tokens": 10}
    choices = server.answer(**hot, n=3)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    texts = [choice["text"] for choice in choices]
    assert len(set(texts)) == 3
    for seed in (5, 4 + 2**32, -4):
        other = server.answer(**{**hot, "seed": seed}, n=2)["choices"]
        assert not {choice["text"] for choice in other} & set(texts)
    assert [choice["text"] for choice in server.answer(**hot, n=2)["choices"]] == texts[:2]
    streamed = ["", "", ""]
    for chunk in server.stream(**hot, n=3):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == texts


def test_log_probabilities_name_tokens_by_their_ids(server: Server) -> None:
    body = {"max_tokens": 5, "logprobs": 2, "return_tokens_as_token_ids": True}
    found = server.answer(**body)["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"])
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert max(top, key=top.get) == token
        assert top[token] == pytest.approx(logprob)
    streamed = [
        token for chunk in server.stream(**body) for token in chunk["choices"][0]["logprobs"]["tokens"]
    ]
    assert streamed == found["tokens"]
    assert server.complete(logprobs=2).status_code == 422


def test_adapters_are_loaded_by_name(server: Server) -> None:
    assert server.complete(model="ad_0@x").status_code == 404
    for seed in range(2):
        assert server.load(f"ad_{seed}@x", server.storage / str(seed)).status_code == 200
    asked = {"max_tokens": 12, "logprobs": 0, "return_tokens_as_token_ids": True}
    told = {
        tuple(server.answer(model=name, **asked)["choices"][0]["logprobs"]["tokens"])
        for name in (tiny.NAME, "ad_0@x", "ad_1@x")
    }
    assert len(told) == 3


@pytest.mark.parametrize("path", ["/etc", "../../etc", "{storage}/../../../etc"])
def test_only_what_lies_in_the_storage_is_loaded(server: Server, path: str) -> None:
    answer = server.load("ad_bad", Path(path.format(storage=server.storage)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_lora_path")
    missing = server.load("ad_bad", server.storage / "none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "adapter_missing")
    assert "backup" in missing.json()["error"]["hint"]


def test_copies_from_a_bucket_are_those_asked_for_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"memory://{tmp_path.name}")
    (tmp_path / "file").write_bytes(b"weights")
    storage.put(tmp_path / "file", "ad/weights")

    def get(name: str) -> None:
        folder = copies.get(storage, "ad", ["weights"], tmp_path / "cache" / name, 3, 60)
        assert (folder / "weights").read_bytes() == b"weights"

    def age() -> None:
        for used, name in enumerate(names()):
            os.utime(tmp_path / "cache" / name, (used, used))

    def names() -> list[str]:
        return sorted(one.name for one in (tmp_path / "cache").iterdir())

    for name in "abc":
        get(name)
    age()
    assert copies.use(tmp_path / "cache" / "a")
    for name in "de":
        get(name)
    assert names() == ["a", "d", "e"]
    assert not copies.use(tmp_path / "cache" / "b")
    # An answer may be reading those of the last minute.
    get("f")
    assert names() == ["a", "d", "e", "f"]
    # What others bring at the moment is no copy.
    (tmp_path / "cache" / "0.part").mkdir()
    age()
    get("g")
    assert names() == ["0.part", "e", "f", "g"]
    shutil.rmtree(tmp_path / "cache" / "0.part")

    def full(*_asked: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "get", full)
    with pytest.raises(StorageFull):
        get("h")
    assert names() == ["e", "f", "g"]


def test_a_copy_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"memory://{tmp_path.name}")
    (tmp_path / "file").write_bytes(b"weights")
    storage.put(tmp_path / "file", "ad/weights")
    cache = tmp_path / "cache"
    rmtree, removed = shutil.rmtree, []

    def removes(folder: Path, **how: Any) -> None:
        removed.extend(name for name in "ab" if folder.name.startswith(name) and folder.is_dir())
        assert folder.suffix == ".part"
        rmtree(folder, **how)

    monkeypatch.setattr(copies.shutil, "rmtree", removes)

    def get(names: str) -> None:
        for name in names * 20:  # each in turn makes room for itself by the other
            copies.get(storage, "ad", ["weights"], cache / name, 1, 0)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(get, ["ab", "ba", "ab", "ba"]))
    assert set(removed) == {"a", "b"}
    assert not list(cache.glob("*.part"))


def test_an_adapter_whose_copy_made_room_is_loaded_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "local", lambda *_: None)  # as of a bucket
    assert server.load("ad_0@copy", server.storage / "0").status_code == 200
    (copy,) = (server.storage.parents[1] / "home" / "cache" / "adapters").iterdir()
    os.utime(copy, (0, 0))
    told = server.answer(model="ad_0@copy", max_tokens=2)["choices"]
    assert copy.stat().st_mtime > 0
    copy.rename(tmp_path / "gone")
    assert server.complete(model="ad_0@copy").json()["error"]["code"] == "model_not_found"
    assert server.load("ad_0@copy", server.storage / "0").status_code == 200
    assert server.answer(model="ad_0@copy", max_tokens=2)["choices"] == told


def test_a_prompt_is_known_again_under_its_salt(server: Server) -> None:
    body = {"prompt": strong.prompt(100, seed=7), "max_tokens": 2}

    def cached(salt: str) -> int:
        details = server.answer(**body, cache_salt=salt)["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"])

    assert [cached(salt) for salt in ("a", "a", "b", "a")] == [0, 96, 0, 96]


def test_a_wrong_request_fails_before_its_stream_begins(server: Server) -> None:
    answer = server.complete(stream=True, prompt=[999_999])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_prompt", "prompt")


# Of eight, four at a time: written to their ends they take ten seconds.
LONG = {
    "n": 8,
    "model": tiny.NAME,
    "prompt": PROMPT,
    "max_tokens": 1000,
    "logit_bias": NEVER,
    "temperature": 0,
}


def test_an_error_says_whose_it_is_also_in_a_stream(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = server.complete(logit_bias={"999999": 1}).json()["error"]
    assert (wrong["type"], wrong["param"]) == ("invalid_request_error", "logit_bias")

    async def told(*_asked: Any) -> AsyncIterator[tuple[int, Piece]]:
        yield 0, Piece("a", [])
        raise GraftError("device_full", "No memory.", status=503, hint="Wait.")

    monkeypatch.setattr(main, "_told", told)
    said = {
        "message": "No memory.",
        "type": "server_error",
        "param": None,
        "code": "device_full",
        "hint": "Wait.",
    }
    assert server.stream()[-1] == {"error": said}
    assert server.complete().json() == {"error": said}


def test_hanging_up_ends_a_stream(server: Server) -> None:
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()  # once this is dropped, the response is closed
        next(lines)
        assert server.http.get("/health").json()["running"] > 0
    assert server.idle()


def test_hanging_up_ends_a_whole_answer(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=LONG, timeout=0.3)
    assert server.idle()


def test_when_it_is_full_it_says_so(server: Server) -> None:
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()  # once this is dropped, the response is closed
        next(lines)
        refused = server.complete(n=5)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "engine_full")
        assert int(refused.headers["retry-after"]) > 0
    assert server.idle()
