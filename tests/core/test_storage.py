import io
import os
from pathlib import Path

import pytest

from core.errors import NotFound, StorageFull
from core.storage import Storage


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A fresh storage; every test that asks for one runs on a directory and on an S3 server."""
    if request.param == "folder":
        return Storage(str(tmp_path / "storage"))
    endpoint = request.getfixturevalue("s3")
    return Storage(f"s3://graft/{os.urandom(6).hex()}", s3_endpoint_url=endpoint)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_bytes(bytes(range(256)) * 300)
    return file


def keys(storage: Storage) -> list[str]:
    """Every file in the storage, hidden and unfinished ones too."""
    root = storage.path("").rstrip("/")
    return sorted(path.removeprefix(root).lstrip("/") for path in storage.fs.find(root))


def test_what_is_put_comes_back_whole(storage: Storage, source: Path, tmp_path: Path) -> None:
    storage.put(source, "a/b/data")
    target = tmp_path / "not" / "yet" / "there"
    storage.get("a/b/data", target)
    assert target.read_bytes() == source.read_bytes()
    assert storage.size("a/b/data") == source.stat().st_size
    assert keys(storage) == ["a/b/data"]


def test_a_second_put_replaces_the_first(storage: Storage, source: Path, tmp_path: Path) -> None:
    storage.put(source, "data")
    other = tmp_path / "other"
    other.write_bytes(b"new")
    storage.put(other, "data")
    assert storage.size("data") == 3
    with storage.open("data") as file:
        assert file.read() == b"new"


def test_the_same_file_can_be_put_again(storage: Storage, source: Path) -> None:
    storage.put(source, "data")
    storage.put(source, "data")
    assert keys(storage) == ["data"]
    assert storage.size("data") == source.stat().st_size


def test_a_part_left_over_is_not_written_into(tmp_path: Path, source: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    other = tmp_path / "other"
    other.write_bytes(b"somebody else's")
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "data.part").hardlink_to(other)
    storage.put(source, "data")
    assert other.read_bytes() == b"somebody else's"
    assert keys(storage) == ["data"]


def test_a_folder_on_another_disk_gets_a_copy(small_disk: Path, source: Path) -> None:
    storage = Storage(str(small_disk / "storage"))
    storage.put(source, "data")
    source.unlink()
    assert storage.size("data") == 256 * 300


def test_an_open_file_can_be_read_from_anywhere(storage: Storage, source: Path) -> None:
    storage.put(source, "data")
    whole = source.read_bytes()
    with storage.open("data") as file:
        assert file.read(10) == whole[:10]
        file.seek(70_000)
        assert file.read(50) == whole[70_000:70_050]
        file.seek(-3, io.SEEK_END)
        assert file.read() == whole[-3:]


def test_what_is_not_there_is_not_found(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        storage.size("nothing")
    with pytest.raises(NotFound):
        storage.open("nothing").read()
    with pytest.raises(NotFound):
        storage.get("nothing", tmp_path / "target")


def test_delete_takes_a_file_or_a_folder_and_is_repeatable(storage: Storage, source: Path) -> None:
    for key in ("one", "folder/x", "folder/deep/y", "folder-2/z"):
        storage.put(source, key)
    storage.delete("one")
    storage.delete("folder")
    storage.delete("folder")
    assert keys(storage) == ["folder-2/z"]


def test_folders_are_listed_by_name(storage: Storage, source: Path) -> None:
    assert storage.folders("jobs") == []
    for key in ("jobs/file", "jobs/job_1/x", "jobs/job_1/deep/y", "jobs/job_2/z", "jobs-2/job_3/x"):
        storage.put(source, key)
    assert sorted(storage.folders("jobs")) == ["job_1", "job_2"]
    assert storage.folders("jobs/job_1") == ["deep"]
    storage.delete("jobs/job_1")
    assert storage.folders("jobs") == ["job_2"]


def test_a_folder_is_put_with_the_named_files_only(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b", "secret"):
        (folder / name).write_text(name)
    storage.put_folder(folder, "adapters/1", ["a", "sub/b"])
    assert keys(storage) == ["adapters/1/a", "adapters/1/sub/b"]


def test_a_folder_that_fails_half_way_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "a").write_text("a")
    storage.put(folder / "a", "adapters/10/a")
    with pytest.raises(FileNotFoundError):
        storage.put_folder(folder, "adapters/1", ["a", "not there"])
    assert keys(storage) == ["adapters/10/a"]


def test_check_passes_where_the_storage_answers(storage: Storage) -> None:
    storage.check()


def test_only_a_folder_has_local_paths(tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).local("a/b") == tmp_path / "a/b"
    assert Storage("s3://graft/x").local("a/b") is None


def test_a_full_disk_is_said_and_earlier_files_stay_whole(small_disk: Path, tmp_path: Path) -> None:
    storage = Storage(str(small_disk / "storage"))
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"s" * 200_000)
    large.write_bytes(b"l" * 2_000_000)
    storage.put(small, "data")
    with pytest.raises(StorageFull) as caught:
        storage.put(large, "data")
    assert (caught.value.code, caught.value.status) == ("storage_full", 507)
    assert keys(storage) == ["data"]
    with storage.open("data") as file:
        assert file.read() == small.read_bytes()


def test_a_folder_that_fills_the_disk_leaves_room_again(small_disk: Path, tmp_path: Path) -> None:
    storage = Storage(str(small_disk / "storage"))
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"x" * 400_000)
    with pytest.raises(StorageFull):
        storage.put_folder(tmp_path, "folder", ["a", "b", "c"])
    assert keys(storage) == []
    storage.put_folder(tmp_path, "folder", ["a", "b"])
    assert keys(storage) == ["folder/a", "folder/b"]
