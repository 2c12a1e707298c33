"""Adapters' files: what fits is read as peft reads it, what does not is refused, and memory is kept within its budget."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import Conflict
from core.ml.inference.batch.lora import Adapter, linear_layers
from core.ml.inference.store import files
from core.ml.inference.store.adapters import Adapters
from core.ml.inference.store.files import Source
from tests import tiny
from tests.ml.inference import strong


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strong.model(tmp_path_factory.mktemp("base"), strong.CONFIGURATIONS["llama"])


@pytest.fixture(scope="module")
def layers(base: Path) -> dict[str, tuple[int, int]]:
    found = linear_layers(strong.loaded(base))
    return {name: (layer.out_features, layer.in_features) for name, layer in found.items()}


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strong.adapter(tmp_path_factory.mktemp("good"), base, 1)


def copied(folder: Path, source: Path, change: Any = None, **settings: Any) -> Path:
    """The adapter with other settings, or with tensors that `change` has changed."""
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(tensors if change is None else change(tensors), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 5},
        {"use_rslora": True},
        {
            "r": 4,
            "rank_pattern": {"q_proj": 12},
            "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 40},
        },
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
)
def test_its_parts_are_those_that_peft_adds(
    base: Path, layers: dict[str, tuple[int, int]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = strong.adapter(tmp_path / "a", base, 1, **settings)
    source = files.look("a", tiny.NAME, folder, layers)
    assert not source.apart
    read = files.read(source, torch.device("cpu"), torch.float32)
    adapted = strong.loaded(base, folder).get_base_model()
    parts = {
        name: module.get_delta_weight("default")
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(parts) == set(read.pairs)
    for name, part in parts.items():
        a, b = read.pairs[name]
        assert torch.allclose((a @ b).T, part, atol=1e-6), name
    assert source.bytes == sum(t.nbytes for pair in read.pairs.values() for t in pair)


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(part: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor[: len(tensor) // 2].contiguous() for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (renamed("layers.1.", "layers.9."), "no place for its tensor .*layers.9"),
        (renamed("base_model.model.", ""), None),
        (renamed("q_proj", "query"), "no place for its tensor .*query"),
        (renamed("lora_A", "lora_embedding_A"), "no place for its tensor"),
        (
            without("layers.0.mlp.up_proj.lora_B"),
            "one of the two tensors of .*layers.0.mlp.up_proj is missing",
        ),
        (without("lora"), "it has no tensors"),
        (halved, "its tensors are"),
    ],
)
def test_what_has_no_place_is_refused(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path, change: Any, why: str | None
) -> None:
    folder = copied(tmp_path / "bad", good, change)
    if why is None:
        assert not files.look("bad", tiny.NAME, folder, layers).apart
        return
    with pytest.raises(Conflict, match=why) as caught:
        files.look("bad", tiny.NAME, folder, layers)
    assert caught.value.code == "adapter_mismatch"


def test_other_weights_under_the_same_files_are_refused(
    base: Path, layers: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    folder = strong.adapter(tmp_path / "ad", base, 0)
    source = files.look("ad", tiny.NAME, folder, layers)
    files.read(source, torch.device("cpu"), torch.float32)
    strong.adapter(folder, base, 1)  # as many bytes
    with pytest.raises(Conflict, match="not those that were looked at"):
        files.read(source, torch.device("cpu"), torch.float32)


def test_a_broken_file_is_refused(good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    folder = copied(tmp_path / "bad", good)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Conflict, match="cannot be read"):
        files.look("bad", tiny.NAME, folder, layers)


def test_another_base_or_another_kind_is_refused(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    with pytest.raises(Conflict, match="was trained on tests/tiny, not on tests/other"):
        files.look("a", "tests/other", good, layers)
    with pytest.raises(Conflict, match="of the kind LOHA"):
        files.look("a", tiny.NAME, copied(tmp_path / "loha", good, peft_type="LOHA"), layers)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
    ],
)
def test_what_the_batch_cannot_add_is_left_to_peft(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path, setting: dict[str, Any]
) -> None:
    assert files.look("a", tiny.NAME, copied(tmp_path / "a", good, **setting), layers).apart
    assert files.look("a", tiny.NAME, good, {}).apart


@pytest.mark.parametrize(
    "setting",
    [
        {"layer_replication": [[0, 2], [1, 2]]},
        {"kasa_config": {"beta": 0.1}},
        {"use_qalora": True},
        {"bias": "all", "use_dora": True},
        {"bias": "lora_only"},
    ],
)
def test_what_leaves_the_base_changed_or_is_computed_otherwise_is_refused(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path, setting: dict[str, Any]
) -> None:
    folder = copied(tmp_path / "a", good, **setting)
    for known in (layers, {}):
        with pytest.raises(Conflict, match=f"with {next(iter(setting))}, which") as caught:
            files.look("a", tiny.NAME, folder, known)
        assert "Merge" in str(caught.value.hint)


def test_keys_of_other_trainers_mean_nothing(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    assert not files.look("a", tiny.NAME, copied(tmp_path / "a", good, lorap_emb_lr=1e-6), layers).apart


@pytest.mark.parametrize("setting", [{"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"}])
def test_one_that_belongs_to_a_changed_base_is_refused(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path, setting: dict[str, Any]
) -> None:
    folder = copied(tmp_path / "a", good, **setting)
    for known in (layers, {}):
        with pytest.raises(Conflict, match="has changed") as caught:
            files.look("a", tiny.NAME, folder, known)
        assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)


def test_one_without_a_scale_is_refused(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    with pytest.raises(Conflict, match="no lora_alpha"):
        files.look("a", tiny.NAME, copied(tmp_path / "a", good, lora_alpha=None), layers)


def test_the_digest_is_that_of_weights_and_configuration(
    good: Path, layers: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    first = files.look("a", tiny.NAME, good, layers)
    alpha = files.look("a", tiny.NAME, copied(tmp_path / "alpha", good, lora_alpha=99), layers)
    doubled = copied(
        tmp_path / "w", good, lambda tensors: {key: tensor * 2 for key, tensor in tensors.items()}
    )
    weights = files.look("a", tiny.NAME, doubled, layers)
    assert len({first.digest, alpha.digest, weights.digest}) == 3


def source(name: str, size: int = 10) -> Source:
    return Source(name, tiny.NAME, Path(name), f"digest of {name}", apart=False, unfused=False, bytes=size)


class Reading:
    """Reads by name, when it may."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.may = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.may.set()

    def __call__(self, source: Source) -> Adapter:
        assert self.may.wait(10)
        self.read.append(source.name)
        if source.name == "broken":
            raise OSError("the disk is gone")
        return Adapter({})

    def wait(self) -> None:
        assert self.arrived.acquire(timeout=10)


@pytest.fixture
def reading() -> Iterator[Reading]:
    return Reading()


def store(reading: Reading, budget: int = 20) -> Adapters:
    return Adapters(budget, reading, reading.arrived.release)


def taken(kept: Adapters, reading: Reading, name: str, size: int = 10) -> Adapter:
    found = kept.take(source(name, size))
    if found is None:
        reading.wait()
        found = kept.take(source(name, size))
    assert found is not None
    return found


def test_reading_does_not_hold_up_the_caller(reading: Reading) -> None:
    kept = store(reading)
    reading.may.clear()
    assert kept.take(source("a")) is None
    assert kept.take(source("a")) is None
    reading.may.set()
    reading.wait()
    first = kept.take(source("a"))
    assert first is not None
    assert kept.take(source("a")) is first
    assert reading.read == ["a"]


def test_those_in_use_stay_and_the_longest_unused_goes(reading: Reading) -> None:
    kept = store(reading)
    for name in "ab":
        taken(kept, reading, name)
    assert kept.take(source("c")) is None
    assert reading.read == ["a", "b"]
    kept.give_back(source("a"))
    kept.give_back(source("b"))
    taken(kept, reading, "a")
    kept.give_back(source("a"))
    taken(kept, reading, "c")
    assert len(kept) == 2
    taken(kept, reading, "a")
    assert reading.read == ["a", "b", "c"]


def test_nobody_makes_room_that_is_not_enough(reading: Reading) -> None:
    kept = store(reading)
    taken(kept, reading, "used", 12)
    taken(kept, reading, "idle", 8)
    kept.give_back(source("idle"))
    assert kept.take(source("wanted", 10)) is None
    assert len(kept) == 2
    kept.give_back(source("used"))
    taken(kept, reading, "wanted", 10)
    assert reading.read == ["used", "idle", "wanted"]


def test_one_larger_than_all_room_is_served_alone(reading: Reading) -> None:
    kept = store(reading)
    taken(kept, reading, "large", 50)
    assert kept.take(source("b")) is None
    kept.give_back(source("large"))
    taken(kept, reading, "b")
    assert len(kept) == 1


def test_what_could_not_be_read_is_tried_again(reading: Reading) -> None:
    kept = store(reading)
    for _ in range(2):
        assert kept.take(source("broken")) is None
        reading.wait()
        with pytest.raises(OSError, match="the disk is gone"):
            kept.take(source("broken"))
    assert reading.read == ["broken", "broken"]
    assert kept._room == 20
