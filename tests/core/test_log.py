"""What a process says, by its level."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("level", "told"), [("DEBUG", ["a", "b", "c"]), ("INFO", ["b", "c"]), ("WARNING", ["c"])]
)
def test_a_level_is_what_is_told_from_it_on(level: str, told: list[str]) -> None:
    code = (
        "import logging; from core import log;"
        f"log.setup({level!r}); say = logging.getLogger('mine');"
        "say.debug('a'); say.info('b'); say.warning('c')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in ran.stderr.splitlines()] == told
