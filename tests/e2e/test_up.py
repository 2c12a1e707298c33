"""`graft up`: what it prints, what it keeps, and that nothing of it stays."""

import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import tiny_environment
from tests.service import GRAFT, Service


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_key_once_second_start_and_a_clean_end(tmp_path: Path, tiny_model: Path, number: int) -> None:
    service = Service(tmp_path / "home", tiny_environment(tiny_model)).start()
    try:
        time.sleep(1)
        key = service.key
        assert service.said().count(key) == 1
        assert stat.S_IMODE((service.home / "admin.key").stat().st_mode) == 0o600
        assert service.url in service.said()
        everything = service.pids()
        assert len(everything) >= 5
        second = subprocess.run(
            [str(GRAFT), "up", "--home", str(service.home), "--port", "0"],
            capture_output=True,
            text=True,
            env=service.environment,
            timeout=60,
        )
        assert second.returncode != 0
    finally:
        code = service.stop(number)
    assert code == 0
    assert "Stopped." in service.said()
    left = [pid for pid in everything if Path(f"/proc/{pid}").exists()]
    assert left == []
    assert service.pids() == []


def test_a_second_run_keeps_the_key_to_itself(tmp_path: Path, tiny_model: Path) -> None:
    first = Service(tmp_path / "home", tiny_environment(tiny_model)).start()
    key = first.key
    first.stop()
    again = Service(tmp_path / "home", tiny_environment(tiny_model)).start()
    time.sleep(1)
    try:
        assert again.key == key
        assert key not in again.said()
        with again.client() as client:
            assert client.models()
    finally:
        again.stop()


def test_wrong_settings_are_told_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(GRAFT), "up", "--home", str(tmp_path / "home")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "GRAFT_LEASE_SECOND": "5"},
    )
    assert done.returncode == 1
    assert "GRAFT_LEASE_SECOND is not a setting; did you mean GRAFT_LEASE_SECONDS?" in done.stderr
    assert "Traceback" not in done.stderr
