"""Base models by name: what is known, and what is said of the rest."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from core.errors import NotFound
from core.ml import catalogue
from core.ml.catalogue import Catalogue
from core.settings import SMOLLM2

ASKS = """
from pathlib import Path
from core.errors import NotFound
from core.ml import catalogue
try:
    catalogue.check(catalogue.Catalogue(Path("models"), {}), "Qwen/Qwen2.5-0.5B-Instruct")
except NotFound as error:
    print(error.message)
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_asked_is_told(offline: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, env=environment)
    assert "the Hugging Face hub cannot be asked from here" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "on the Hugging Face hub neither"),
        (403, "GatedRepo", "it is gated"),
        (503, "", "the Hugging Face hub cannot be asked from here"),
    ],
)
def test_what_the_hub_says_is_told(status: int, code: str, words: str) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Be silent."""

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        done = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, env=environment)
        server.shutdown()
    assert words in done.stdout, done.stderr


@pytest.mark.parametrize(
    "name", ["/etc", "../x", "a/../b", "a/b/c", "https://x/y", "~/x", "a b/c", "x", "", "a/b\0"]
)
def test_names_never_become_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        catalogue.find(Catalogue(tmp_path, {}), name)


def test_a_name_with_a_typo_is_told_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        catalogue.find(Catalogue(tmp_path, {}, allow_hub=False), "SmolLM2-135M-Instruct")
    assert SMOLLM2 in caught.value.message


def test_a_hub_name_lies_below_the_models_folder(tmp_path: Path) -> None:
    model = catalogue.find(Catalogue(tmp_path, {}), "org/name")
    assert model.source == "hub"
    assert model.path.parent == tmp_path
    assert not model.ready


def test_an_entry_of_the_operator_comes_first(tmp_path: Path) -> None:
    model = catalogue.find(Catalogue(tmp_path, {SMOLLM2: str(tmp_path / "mine")}), SMOLLM2)
    assert model.source == "folder"
    assert model.path == tmp_path / "mine"
