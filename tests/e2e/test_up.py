"""`graft up`: what it prints, what it keeps, and that nothing of it stays."""

import signal
import stat
import subprocess
import time
from pathlib import Path

from tests.e2e.conftest import tiny_environment
from tests.service import GRAFT, Service


def test_key_once_a_clean_end_and_a_second_run(tmp_path: Path, tiny_model: Path) -> None:
    service = Service(tmp_path / "home", tiny_environment(tiny_model)).start()
    try:
        time.sleep(1)
        key = service.key
        assert service.said().count(key) == 1
        assert stat.S_IMODE((service.home / "admin.key").stat().st_mode) == 0o600
        assert service.url in service.said()
        second = subprocess.run(
            [str(GRAFT), "up", "--home", str(service.home), "--port", "8999"],
            capture_output=True,
            text=True,
            env=service.environment,
            timeout=60,
        )
        assert second.returncode != 0
        assert "is running in" in second.stderr
        ends_cleanly(service, signal.SIGINT)
        service.start()
        time.sleep(1)
        assert service.key == key
        assert key not in service.said()
        with service.client() as client:
            assert client.models()
        ends_cleanly(service, signal.SIGTERM)
    finally:
        service.stop()


def ends_cleanly(service: Service, number: int) -> None:
    everything = service.pids()
    assert len(everything) >= 5
    assert service.stop(number) == 0
    assert "Stopped." in service.said()
    assert [pid for pid in everything if Path(f"/proc/{pid}").exists()] == []
    assert service.pids() == []


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
