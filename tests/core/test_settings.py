import os
import tempfile
from pathlib import Path

import pytest

from core import settings
from core.errors import GraftError
from core.settings import Settings


@pytest.fixture(autouse=True)
def _no_graft_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GRAFT_")]:
        monkeypatch.delenv(name)


def test_defaults_need_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = settings.load()
    home = tmp_path / ".graft"
    assert made.home == home
    assert made.database == f"sqlite:///{home / 'graft.db'}"
    assert made.broker == f"redis+socket://{home / 'run' / 'broker.sock'}"
    assert made.storage == str(home / "storage")
    assert made.models_folder == home / "models"
    assert made.scratch == home / "runs"
    assert made.default_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert made.host == "127.0.0.1"


def test_variables_are_read_with_their_prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    monkeypatch.setenv("GRAFT_PORT", "9000")
    monkeypatch.setenv("GRAFT_MODELS", '{"ours": "/models/ours"}')
    made = settings.load()
    assert (made.home, made.port, made.models) == (tmp_path, 9000, {"ours": "/models/ours"})


def test_an_unknown_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_DATABSE_URL", "sqlite://")
    with pytest.raises(GraftError) as caught:
        settings.load()
    assert caught.value.code == "invalid_settings"
    assert caught.value.message == "GRAFT_DATABSE_URL is not a setting; did you mean GRAFT_DATABASE_URL?"


def test_every_wrong_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_PORT", "70000")
    monkeypatch.setenv("GRAFT_ENGINE_BITS", "8")
    monkeypatch.setenv("GRAFT_ZZZZZZZZ", "1")
    with pytest.raises(GraftError) as caught:
        settings.load()
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert [line.split(":")[0].split(" ")[0] for line in lines] == [
        "GRAFT_ZZZZZZZZ",
        "GRAFT_PORT",
        "GRAFT_ENGINE_BITS",
    ]


@pytest.mark.parametrize(("lease", "heartbeat", "allowed"), [(45, 15, True), (44.9, 15, False), (3, 1, True)])
def test_a_lease_outlasts_three_heartbeats(lease: float, heartbeat: float, allowed: bool) -> None:
    if allowed:
        assert settings.load(lease_seconds=lease, heartbeat_seconds=heartbeat).lease_seconds == lease
        return
    with pytest.raises(GraftError, match="GRAFT_LEASE_SECONDS must be at least three times"):
        settings.load(lease_seconds=lease, heartbeat_seconds=heartbeat)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgres_gets_the_driver(scheme: str) -> None:
    made = Settings(database_url=f"{scheme}://u:p@host:5432/graft?sslmode=require")
    assert made.database == "postgresql+psycopg://u:p@host:5432/graft?sslmode=require"


def test_a_short_home_keeps_the_broker_socket_in_it() -> None:
    home = Path(tempfile.mkdtemp(prefix="g"))
    assert Settings(home=home).broker_socket == home.resolve() / "run" / "broker.sock"
    home.rmdir()


def test_a_long_home_gets_a_short_socket_of_its_own(tmp_path: Path) -> None:
    one, two = (Settings(home=tmp_path / ("x" * 120) / name).broker_socket for name in ("one", "two"))
    assert len(os.fsencode(one)) < 100
    assert one != two
    assert one == Settings(home=tmp_path / ("x" * 120) / "one").broker_socket


@pytest.mark.parametrize(
    "wrong",
    [
        {"broker_url": "amqp://localhost"},
        {"broker_url": "http://localhost:6379"},
        {"admin_key": "gr_short"},
        {"engine_bits": 8},
        {"port": 0},
        {"max_crashes": 0},
        {"line_max_bytes": 0},
        {"unpacked_max_bytes": 0},
        {"rows_max": 0},
        {"columns_max": 0},
        {"nesting_max": 0},
        {"nesting_max": 201},
        {"lease_seconds": 0, "heartbeat_seconds": 0},
    ],
)
def test_unsafe_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(GraftError) as caught:
        settings.load(**wrong)
    assert caught.value.code == "invalid_settings"


@pytest.mark.parametrize("url", ["localhost:8100", "http://", "ftp://x", "http://x:99999", "http://a b", "x"])
def test_an_address_that_cannot_be_asked_is_refused(url: str) -> None:
    with pytest.raises(GraftError, match="GRAFT_ENGINE_URL"):
        settings.load(engine_url=url)


@pytest.mark.parametrize("key", ["a\nb", "ключ"])
def test_a_key_that_cannot_be_sent_is_refused(key: str) -> None:
    with pytest.raises(GraftError, match="GRAFT_ENGINE_KEY") as caught:
        settings.load(engine_key=key)
    assert key not in caught.value.message


def test_settings_cannot_be_changed_and_do_not_show_secrets() -> None:
    made = Settings(broker_url="redis://:hunter2@localhost/0", admin_key="gr_0123456789ab_" + "s" * 24)
    with pytest.raises(ValueError, match="frozen"):
        made.port = 1
    assert "hunter2" not in repr(made)
    assert "ssss" not in repr(made)


def test_an_error_about_a_secret_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_BROKER_URL", "amqp://:hunter2@localhost")
    with pytest.raises(GraftError) as caught:
        settings.load()
    assert "hunter2" not in caught.value.message
