"""What peft serves, one request at a time: it answers as peft alone, and nothing of it reaches the next request."""

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig

from core.errors import GraftError
from core.ml import base_model
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Limits
from tests import tiny
from tests.ml.inference import strong
from tests.ml.inference.asking import ask, reason
from tests.ml.inference.conftest import MakeEngine
from tests.ml.inference.strong import NEVER, PROMPT, greedy

# One that the batch does not read.
NEOX = GPTNeoXConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)


def test_an_adapter_that_peft_refuses_costs_nobody_the_model(
    engine: Engine, base: Path, tmp_path: Path
) -> None:
    folder = strong.adapter(tmp_path / "ad", base, 3, use_dora=True)
    file = folder / "adapter_model.safetensors"
    save_file({key: one for key, one in load_file(file).items() if "layers.1" not in key}, file)
    engine.register("half", tiny.NAME, folder)
    ask(engine, tiny.NAME, PROMPT, Sampling(2)).wait()
    model = engine._model
    with pytest.raises(GraftError, match="does not fit"):
        ask(engine, "half", PROMPT, Sampling(2)).wait()
    assert engine._model is model
    assert ask(engine, tiny.NAME, PROMPT, Sampling(12)).wait().tokens == greedy(base)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["dora", "modules_to_save", "head", "embedding"],
)
def test_other_adapters_are_served_one_at_a_time(
    engine: Engine, base: Path, adapters: list[Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = strong.adapter(tmp_path / "ad", base, 3, **settings)
    engine.register("other", tiny.NAME, folder)
    engine.register("ad", tiny.NAME, adapters[0])
    names = [tiny.NAME, "other", "ad", "other", tiny.NAME]
    wanted = {tiny.NAME: greedy(base), "ad": greedy(base, adapters[0]), "other": greedy(base, folder)}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    heard = [ask(engine, name, PROMPT, Sampling(12)) for name in names]
    assert [one.wait().tokens for one in heard] == [wanted[name] for name in names]
    paths = [one.finish.path for one in heard if one.finish]
    assert paths == ["batch", "compat", "batch", "compat", "batch"]


def test_only_what_dora_asks_of_is_kept_from_the_fused_kernel(
    make_engine: MakeEngine,
    models: Catalogue,
    base: Path,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not every processor has that kernel: here every model says that it has, until it is kept from it."""
    load, loaded = base_model.load, []

    def fused(*asked: Any) -> Any:
        model = load(*asked)
        model.fused = True
        loaded.append(model)
        return model

    monkeypatch.setattr(base_model, "load", fused)
    monkeypatch.setattr(base_model, "is_fused", lambda model: model.fused)
    monkeypatch.setattr(base_model, "unfuse", lambda model: setattr(model, "fused", False))
    neox = strong.model(tmp_path / "neox", NEOX)
    own = {**models.own, "tests/neox": str(neox)}
    engine = make_engine(catalogue=Catalogue(models.folder, own, allow_hub=False))
    engine.register("ad", tiny.NAME, adapters[0])
    engine.register("dora", tiny.NAME, strong.adapter(tmp_path / "dora", base, 3, use_dora=True))
    engine.register(
        "whole", tiny.NAME, strong.adapter(tmp_path / "whole", base, 3, modules_to_save=["lm_head"])
    )
    plain = strong.adapter(tmp_path / "ad", neox, 1, "tests/neox", target_modules=["query_key_value"])
    engine.register("neox-ad", "tests/neox", plain)
    seen = []
    for name in ("ad", "whole", "dora", "dora", tiny.NAME, "whole", "tests/neox", "neox-ad"):
        assert ask(engine, name, PROMPT, Sampling(2)).wait().finish is not None
        seen.append((len(loaded), loaded[-1].fused))
    assert seen == [(1, True), (1, True), (2, False), (2, False), (3, True), (3, True), (4, True), (4, True)]


def test_who_waits_for_one_alone_may_hang_up(make_engine: MakeEngine, base: Path, tmp_path: Path) -> None:
    engine = make_engine(Limits(waiting=8))
    engine.register("dora", tiny.NAME, strong.adapter(tmp_path / "ad", base, 3, use_dora=True))
    stop, gone = threading.Event(), threading.Event()
    long = ask(engine, "dora", PROMPT, Sampling(900, logit_bias=NEVER), stop.is_set)
    assert long.first.wait(60)
    assert engine.state()["running"] == 1
    ghosts = [ask(engine, tiny.NAME, PROMPT, Sampling(4), gone.is_set) for _ in range(8)]
    with pytest.raises(GraftError) as caught:
        ask(engine, tiny.NAME, PROMPT, Sampling(4))
    assert caught.value.code == "engine_full"
    gone.set()
    for ghost in ghosts:
        assert ghost.over.wait(10)
        assert ghost.finish is not None
        assert ghost.finish.reason == "cancelled"
    assert not long.over.is_set()
    stop.set()
    assert long.over.wait(10)


def test_an_architecture_that_is_not_allowed_is_served_one_at_a_time(
    make_engine: MakeEngine, models: Catalogue, tmp_path: Path
) -> None:
    base = strong.model(tmp_path / "neox", NEOX)
    folder = strong.adapter(tmp_path / "ad", base, 1, "tests/neox", target_modules=["query_key_value"])
    engine = make_engine(catalogue=Catalogue(models.folder, {"tests/neox": str(base)}, allow_hub=False))
    engine.register("ad", "tests/neox", folder)
    gone = threading.Event()
    heard = [ask(engine, "tests/neox", PROMPT, Sampling(12)), ask(engine, "ad", PROMPT, Sampling(12))]
    assert [one.wait().tokens for one in heard] == [greedy(base), greedy(base, folder)]
    assert all(one.finish.path == "compat" for one in heard if one.finish)
    long = ask(engine, "ad", PROMPT, Sampling(400, logit_bias=NEVER), cancelled=gone.is_set)
    assert long.first.wait(30)
    gone.set()
    assert reason(long) == "cancelled"
    assert len(long.tokens) < 400


def changed(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: change(key, one) for key, one in load_file(file).items()}, file)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_layers_that_an_adapter_brings_along_do_not_stay(
    make_engine: MakeEngine, tmp_path: Path, target: str, tied: bool
) -> None:
    config = copy.deepcopy(strong.CONFIGURATIONS["llama"])
    config.tie_word_embeddings = tied
    base = strong.model(tmp_path / "base", config)
    engine = make_engine(catalogue=Catalogue(tmp_path / "models", {tiny.NAME: str(base)}, allow_hub=False))
    folder = strong.adapter(tmp_path / "ad", base, 3, target_modules=[target, "q_proj"])
    noise = torch.Generator().manual_seed(0)
    changed(
        folder,
        lambda key, one: one + torch.randn(one.shape, generator=noise) * ("base_layer" in key),
    )
    engine.register("other", tiny.NAME, folder)

    def logits() -> list[dict[int, float]]:
        return [one.top for one in ask(engine, tiny.NAME, PROMPT, Sampling(12, logprobs=20)).wait().choices]

    before = logits()
    assert ask(engine, "other", PROMPT, Sampling(12)).wait().tokens == greedy(base, folder)
    assert logits() == before


def test_one_that_changes_nothing_is_refused(engine: Engine, base: Path, tmp_path: Path) -> None:
    folder = strong.adapter(tmp_path / "ad", base, 3, use_dora=True)
    changed(folder, lambda key, one: one * ("lora_B" not in key))
    engine.register("inert", tiny.NAME, folder)
    with pytest.raises(GraftError) as caught:
        ask(engine, "inert", PROMPT, Sampling(2)).wait()
    assert caught.value.code == "adapter_inert"


def test_other_weights_under_the_same_files_are_refused(engine: Engine, base: Path, tmp_path: Path) -> None:
    folder = strong.adapter(tmp_path / "ad", base, 3, use_dora=True)
    engine.register("dora", tiny.NAME, folder)
    assert ask(engine, "dora", PROMPT, Sampling(2)).wait().tokens
    changed(folder, lambda _key, one: one + 1)
    with pytest.raises(GraftError, match="not those that were looked at"):
        ask(engine, "dora", PROMPT, Sampling(2)).wait()


def test_no_hub_is_asked(engine: Engine, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not answer, every neighbour would wait for it."""
    asked = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *names: asked.append(names))
    engine.register("dora", tiny.NAME, strong.adapter(tmp_path / "ad", base, 3, use_dora=True))
    assert ask(engine, "dora", PROMPT, Sampling(2)).wait().tokens
    assert asked == []


def test_who_is_written_for_by_peft_is_told_when_the_engine_is_closed(
    engine: Engine, base: Path, tmp_path: Path
) -> None:
    engine.register("dora", tiny.NAME, strong.adapter(tmp_path / "ad", base, 3, use_dora=True))
    writing = ask(engine, "dora", PROMPT, Sampling(900, logit_bias=NEVER))
    assert writing.first.wait(30)
    waiting = ask(engine, tiny.NAME, PROMPT, Sampling(3))
    began = time.monotonic()
    engine.close(wait=False)
    for heard in (waiting, writing):
        with pytest.raises(GraftError, match="it is closed"):
            heard.wait()
    assert time.monotonic() - began < 2
    assert len(writing.tokens) < 900
    with pytest.raises(GraftError, match="it is closed"):
        ask(engine, tiny.NAME, PROMPT, Sampling(3))
