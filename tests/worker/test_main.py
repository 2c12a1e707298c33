"""What a worker does beside its jobs when it starts. The child is played: what it says is the test's."""

from typing import Any

import pytest

from core.settings import Settings
from tests import tiny
from tests.worker.test_supervise import Played
from worker import main
from worker.child import spawn
from worker.context import Context

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class ClosedOnce(Played):
    closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> ClosedOnce:
    """A child that ends before anybody hears it."""
    device = {"name": "CPU", "free_bytes": 1}
    played = ClosedOnce([("device", device), ("alive", {}), ("error", {"code": "model_not_found"})])

    def start(*_: Any, **__: Any) -> ClosedOnce:
        return played

    monkeypatch.setattr(spawn, "start", start)
    monkeypatch.setattr(main, "config", Settings(default_model=tiny.NAME))
    return played


def test_the_last_words_of_a_child_that_prepares_are_heard(
    context: Context, child: ClosedOnce, caplog: pytest.LogCaptureFixture
) -> None:
    main._prepare(context)
    assert context.device == {"name": "CPU", "free_bytes": 1}
    assert [record.message for record in caplog.records] == ["the default base model is not ready"]
    assert child.closed == 1


def test_a_default_model_that_nobody_knows_is_said(
    context: Context, child: ClosedOnce, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(main, "config", Settings(default_model="nobody's", allow_hub=False))
    main._prepare(context)
    assert "GRAFT_DEFAULT_MODEL" in caplog.records[0].message
    assert child.closed == 0
