"""The engine: what it answers equals plain generate, and a bad adapter leaves no trace."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import BadRequest, Conflict
from core.ml import base_model
from core.ml import contract as contracts
from core.ml.catalogue import Catalogue, find
from core.ml.inference.engine import MAX_ADAPTERS, Engine, Finish, Sampling
from core.ml.quantization import Quantization
from tests import tiny

PROMPT = [1, 40, 41, 42, 43, 44]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    other = tiny.make(tmp_path_factory.mktemp("other"), seed=1)
    return Catalogue(
        tmp_path_factory.mktemp("models"), {tiny.NAME: str(tiny_model), "tests/other": str(other)}
    )


@pytest.fixture
def engine(models: Catalogue) -> Engine:
    return Engine(models, 4)


def adapter(folder: Path, seed: int, base: Path, name: str = tiny.NAME, r: int = 8) -> Path:
    """A strong random adapter: what another one or the base would answer shows at once."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=r, target_modules="all-linear"),
    )
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def answer(engine: Engine, name: str, **sampling: object) -> str:
    pieces: list[str] = []
    engine.generate(name, PROMPT, Sampling(**{"max_tokens": 12, **sampling}), pieces.append, lambda: False)
    return "".join(pieces)


def plain(models: Catalogue, folder: Path | None = None) -> str:
    """What transformers and peft say by themselves, one request, the same precision."""

    base = find(models, tiny.NAME)
    model = base_model.load(base, base_model.settle(Quantization())).eval()
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    contract = contracts.load(base.path)
    ids = torch.tensor([PROMPT])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=list(contract.stop_token_ids),
        pad_token_id=2,
    )
    return str(contract.tokenizer.decode(out[0, len(PROMPT) :], skip_special_tokens=True))


def test_base_and_adapters_in_turn_answer_as_they_do_alone(
    engine: Engine, models: Catalogue, tiny_model: Path, tmp_path: Path
) -> None:
    folders = {f"ad_{seed}@x": adapter(tmp_path / str(seed), seed, tiny_model) for seed in (1, 2)}
    for name, folder in folders.items():
        engine.register(name, tiny.NAME, folder)
    wanted = {tiny.NAME: plain(models), **{name: plain(models, folder) for name, folder in folders.items()}}
    assert len(set(wanted.values())) == 3
    for name in [*wanted, *reversed(wanted), tiny.NAME]:
        assert answer(engine, name) == wanted[name]


def test_more_adapters_than_room(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    names = [f"ad_{n}@x" for n in range(MAX_ADAPTERS + 2)]
    first = {}
    for n, name in enumerate(names):
        engine.register(name, tiny.NAME, adapter(tmp_path / str(n), n, tiny_model))
        first[name] = answer(engine, name)
    assert {name: answer(engine, name) for name in names} == first
    assert len(engine._resident) == MAX_ADAPTERS


def damage(folder: Path, how: str) -> None:
    file = folder / "adapter_model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
        return
    tensors = load_file(file)
    name = next(iter(tensors))
    if how == "missing":
        del tensors[name]
    elif how == "foreign":
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = tensors[name].clone()
    elif how == "shape":
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, file)


@pytest.mark.parametrize("how", ["cut", "missing", "foreign", "shape"])
@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(
    engine: Engine, tiny_model: Path, tmp_path: Path, how: str, beside: bool
) -> None:
    base = answer(engine, tiny.NAME)
    good = adapter(tmp_path / "good", 1, tiny_model)
    if beside:
        engine.register("good@x", tiny.NAME, good)
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    damage(bad, how)
    with pytest.raises((Conflict, SafetensorError)):
        engine.register("bad@x", tiny.NAME, bad)
    assert not engine.knows("bad@x")
    assert answer(engine, tiny.NAME) == base
    engine.register("good@x", tiny.NAME, good)
    assert answer(engine, "good@x") != base
    assert answer(engine, tiny.NAME) == base


def test_an_adapter_of_another_base_is_refused(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "ad", 1, tiny_model)
    with pytest.raises(Conflict) as caught:
        engine.register("ad@x", "tests/other", folder)
    assert caught.value.code == "adapter_mismatch"


def test_bases_take_turns(engine: Engine, models: Catalogue, tiny_model: Path, tmp_path: Path) -> None:
    engine.register("ad@x", tiny.NAME, adapter(tmp_path / "ad", 1, tiny_model))
    before = answer(engine, "ad@x")
    other = adapter(tmp_path / "other", 2, Path(models.own["tests/other"]), "tests/other")
    engine.register("other@x", "tests/other", other)
    assert answer(engine, "other@x") != before
    assert answer(engine, "ad@x") == before


def test_it_leaves_when_asked(engine: Engine) -> None:
    pieces: list[str] = []
    finish = engine.generate(tiny.NAME, PROMPT, Sampling(300), pieces.append, lambda: len(pieces) >= 3)
    assert finish.reason == "cancelled"
    assert finish.tokens < 20
    assert engine.generate(tiny.NAME, PROMPT, Sampling(5), pieces.append, lambda: True) == Finish(
        "cancelled", 0
    )


@pytest.mark.parametrize("prompt", [[], [-1], [320], [1] * 600])
def test_what_it_cannot_read_is_refused(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(BadRequest):
        engine.generate(tiny.NAME, prompt, Sampling(4), lambda _text: None, lambda: False)
    assert answer(engine, tiny.NAME)


@pytest.mark.parametrize("at", [(0, 1), (0, 2), (2, 4), (3, 4)])
def test_nothing_is_written_past_a_stop_string(engine: Engine, at: tuple[int, int]) -> None:
    """generate asks whether to stop a token late; that token must not show, nor count."""
    hot = {"temperature": 1.5, "seed": 11, "max_tokens": 30}
    whole = answer(engine, tiny.NAME, **hot)
    stop = whole[at[0] : at[1]]
    pieces: list[str] = []
    finish = engine.generate(tiny.NAME, PROMPT, Sampling(stop=[stop], **hot), pieces.append, lambda: False)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert finish.reason == "stop"
    assert finish.tokens < 30
