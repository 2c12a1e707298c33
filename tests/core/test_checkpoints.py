from pathlib import Path
from typing import Any

import pytest

from core.errors import GraftError
from core.ml.training.files import checkpoints

REQUIRED = sorted(checkpoints.required())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint-5"
    made.mkdir()
    for name in REQUIRED:
        (made / name).write_bytes(name.encode() * 100)
    (made / "adapter_config.json").write_text("{}")
    return made


def sealed(folder: Path) -> list[dict[str, Any]]:
    return [dict(info) for info in checkpoints.seal(folder)]


def test_a_sealed_checkpoint_is_whole_and_lists_every_file(folder: Path) -> None:
    files = sealed(folder)
    assert {info["path"] for info in files} == {*REQUIRED, "adapter_config.json"}
    assert {info["path"]: info["bytes"] for info in files}["optimizer.pt"] == len("optimizer.pt") * 100
    assert checkpoints.is_whole(folder, files)


@pytest.mark.parametrize("name", REQUIRED)
def test_one_flipped_bit_is_seen(folder: Path, name: str) -> None:
    files = sealed(folder)
    content = bytearray((folder / name).read_bytes())
    content[50] ^= 1
    (folder / name).write_bytes(content)
    assert not checkpoints.is_whole(folder, files)


def test_a_cut_file_is_seen(folder: Path) -> None:
    files = sealed(folder)
    with (folder / "optimizer.pt").open("r+b") as file:
        file.truncate(10)
    assert not checkpoints.is_whole(folder, files)


def test_a_missing_file_is_seen(folder: Path) -> None:
    files = sealed(folder)
    (folder / "rng_state.pth").unlink()
    assert not checkpoints.is_whole(folder, files)


@pytest.mark.parametrize("name", ["extra.bin", "deeper/extra.bin"])
def test_an_added_file_is_seen(folder: Path, name: str) -> None:
    files = sealed(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    assert not checkpoints.is_whole(folder, files)


def test_a_renamed_file_is_seen(folder: Path) -> None:
    files = sealed(folder)
    (folder / "scheduler.pt").rename(folder / "scheduler2.pt")
    assert not checkpoints.is_whole(folder, files)


def test_sealing_again_changes_nothing(folder: Path) -> None:
    assert sealed(folder) == sealed(folder)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_checkpoint_that_could_not_be_resumed_is_not_sealed(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RuntimeError, match=name):
        checkpoints.seal(folder)


def test_pickles_and_what_is_not_needed_are_left_out(folder: Path) -> None:
    for name in ("training_args.bin", "README.md"):
        (folder / name).write_bytes(b"x")
    assert not {"training_args.bin", "README.md"} & {info["path"] for info in sealed(folder)}
    assert not (folder / "training_args.bin").exists()


def test_only_the_kind_of_processes_that_made_a_checkpoint_matters(tmp_path: Path) -> None:
    for name in REQUIRED:
        (tmp_path / name).write_bytes(b"x")
    checkpoints.check(
        tmp_path, sharded=False
    )  # of one process; several take it, too, with other random states
    with pytest.raises(GraftError) as caught:
        checkpoints.check(tmp_path, sharded=True)
    assert caught.value.code == "checkpoint_of_other_sharding"
