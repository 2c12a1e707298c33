"""What holds for the whole source, and what no import rule says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.settings import Settings
from tests.conftest import ROOT

SOURCES = sorted(
    file
    for folder in ("api", "worker", "core", "cli", "graft_client")
    for file in (ROOT / folder).rglob("*.py")
)
HEAVY = ("torch", "peft", "trl", "datasets", "bitsandbytes")
IMPORT_API = f"""
import sys
import api.main
loaded = sorted(set(sys.modules) & set({HEAVY!r}))
status = open("/proc/self/status").read()
print(",".join(loaded), status.split("VmRSS:")[1].split()[0], status.split("VmHWM:")[1].split()[0])
"""


def named(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_the_sources_are_where_these_tests_look() -> None:
    assert {
        "api/main.py",
        "worker/main.py",
        "core/settings.py",
        "cli/main.py",
        "graft_client/client.py",
    } <= set(map(named, SOURCES))


@pytest.mark.parametrize("file", SOURCES, ids=named)
def test_a_file_fits_in_a_head(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 300


@pytest.mark.parametrize("file", SOURCES, ids=named)
def test_a_transaction_is_a_visible_block(file: Path) -> None:
    assert ".commit(" not in file.read_text()


def test_packages_hold_no_code_of_their_own() -> None:
    assert [named(file) for file in SOURCES if file.name == "__init__.py" and file.read_text().strip()] == []


def test_the_api_is_small_and_knows_no_training_library() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_API], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded, resident, most = ran.stdout.rstrip("\n").split(" ")
    assert loaded == ""
    assert int(resident) < 250 * 1024
    assert int(most) < 250 * 1024


def test_the_documentation_names_every_setting_and_no_other() -> None:
    documented = set(re.findall(r"GRAFT_[A-Z0-9_]+", (ROOT / "docs" / "settings.md").read_text()))
    assert documented == {f"GRAFT_{name.upper()}" for name in Settings.model_fields}
