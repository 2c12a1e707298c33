"""What memory is free, by what the kernel tells of the container."""

from pathlib import Path

import psutil
import pytest

from core.ml import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group that has taken 10 MiB, 4 of them for files that were read."""
    (tmp_path / "memory.current").write_text(f"{10 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {4 * 2**20}\nactive_file 2\n")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    return tmp_path


def test_a_container_has_what_its_limit_leaves(group: Path) -> None:
    (group / "memory.max").write_text(f"{16 * 2**20}\n")
    assert memory.free_bytes() == 10 * 2**20
    (group / "memory.max").write_text(f"{5 * 2**20}\n")
    assert memory.free_bytes() == 0


def test_without_a_limit_the_memory_of_the_machine_counts(group: Path) -> None:
    (group / "memory.max").write_text("max\n")
    assert 10 * 2**20 < memory.free_bytes() <= psutil.virtual_memory().total
    for file in group.iterdir():
        file.unlink()
    assert 10 * 2**20 < memory.free_bytes() <= psutil.virtual_memory().total
