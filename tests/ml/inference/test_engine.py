"""The engine as its callers know it: many at once, each with its own answer."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, GPT2Config

from core.errors import BadRequest, Conflict, GraftError, NotFound
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Limits
from tests import tiny
from tests.ml.inference import strong
from tests.ml.inference.asking import ask, asked, idle, reason
from tests.ml.inference.conftest import MakeEngine
from tests.ml.inference.strong import NEVER, PROMPT, greedy

LONG = Sampling(300)


def test_eight_adapters_and_the_base_at_once(engine: Engine, base: Path, adapters: list[Path]) -> None:
    wanted = {tiny.NAME: greedy(base)}
    for number, folder in enumerate(adapters):
        engine.register(f"ad_{number}", tiny.NAME, folder)
        wanted[f"ad_{number}"] = greedy(base, folder)
    assert len({tuple(tokens) for tokens in wanted.values()}) == 9
    heard = {name: ask(engine, name, PROMPT, Sampling(12)) for name in wanted}
    assert {name: one.wait().tokens for name, one in heard.items()} == wanted
    for name, one in heard.items():
        assert one.finish is not None
        assert one.finish.reason == ("stop" if wanted[name][-1] == 2 else "length")
        assert one.finish.tokens == len(wanted[name])
        assert one.finish.path == "batch"


def test_more_adapters_than_room(make_engine: MakeEngine, base: Path, adapters: list[Path]) -> None:
    one = 4 * sum(tensor.numel() for tensor in load_file(adapters[0] / "adapter_model.safetensors").values())
    engine = make_engine(Limits(adapter_bytes=int(2.8 * one)))
    for number, folder in enumerate(adapters):
        engine.register(f"ad_{number}", tiny.NAME, folder)
    wanted = [greedy(base, folder) for folder in adapters]
    for _ in range(2):
        heard = [ask(engine, f"ad_{number}", PROMPT, Sampling(12)) for number in range(8)]
        assert [one.wait().tokens for one in heard] == wanted
    assert engine.state()["adapters"] <= 2


def test_a_seed_says_the_same_alone_and_among_others(engine: Engine, adapters: list[Path]) -> None:
    for number, folder in enumerate(adapters):
        engine.register(f"ad_{number}", tiny.NAME, folder)
    warm = Sampling(30, temperature=1.2, top_p=0.9, seed=7, frequency_penalty=0.5)
    alone = ask(engine, "ad_1", PROMPT, warm).wait().tokens
    others = [ask(engine, f"ad_{number}", strong.prompt(30, number), LONG) for number in range(8)]
    among = ask(engine, "ad_1", PROMPT, warm)
    assert among.wait().tokens == alone
    for one in others:
        one.wait()


def test_n_answers_share_the_reading_of_the_prompt(engine: Engine) -> None:
    prompt = strong.prompt(200)
    heard = asked(engine, tiny.NAME, prompt, [Sampling(8, temperature=1.5, seed=seed) for seed in range(4)])
    texts = {tuple(one.wait().tokens) for one in heard}
    assert len(texts) == 4
    assert [one.finish.cached for one in heard if one.finish] == [0, 192, 192, 192]


def test_what_is_known_of_a_prompt_is_not_shared_between_projects_and_adapters(
    engine: Engine, adapters: list[Path]
) -> None:
    engine.register("ad", tiny.NAME, adapters[0])
    prompt = strong.prompt(100)

    def cached(name: str, salt: str) -> int:
        heard = ask(engine, name, prompt, Sampling(2), salt=salt).wait()
        assert heard.finish is not None
        return heard.finish.cached

    asked_of = [(tiny.NAME, "one"), (tiny.NAME, "two"), ("ad", "one")]
    assert [cached(*one) for one in asked_of] == [0, 0, 0]
    assert [cached(*one) for one in asked_of] == [96, 96, 96]


def test_a_name_with_new_weights_answers_by_them_and_the_old_answer_goes_on(
    engine: Engine, base: Path, adapters: list[Path]
) -> None:
    engine.register("mine", tiny.NAME, adapters[0])
    old = ask(engine, "mine", PROMPT, Sampling(40, logit_bias=NEVER))
    assert old.first.wait(30)
    engine.register("mine", tiny.NAME, adapters[1])
    assert ask(engine, "mine", PROMPT, Sampling(12)).wait().tokens == greedy(base, adapters[1])
    engine.register("mine", tiny.NAME, adapters[0])
    again = ask(engine, "mine", PROMPT, Sampling(40, logit_bias=NEVER)).wait()
    assert old.wait().tokens == again.tokens


def damaged(folder: Path, good: Path, how: str) -> Path:
    shutil.copytree(good, folder)
    file = folder / "adapter_model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
        return folder
    tensors = load_file(file)
    name = next(iter(tensors))
    if how == "missing":
        del tensors[name]
    elif how == "foreign":
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = tensors[name].clone()
    elif how == "shape":
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("how", ["cut", "missing", "foreign", "shape"])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(
    engine: Engine, base: Path, adapters: list[Path], tmp_path: Path, how: str
) -> None:
    with pytest.raises(Conflict):
        engine.register("bad", tiny.NAME, damaged(tmp_path / "bad", adapters[0], how))
    assert not engine.knows("bad")
    assert ask(engine, tiny.NAME, PROMPT, Sampling(12)).wait().tokens == greedy(base)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["batch", "compat"])
def test_files_that_vanish_fail_their_own_request(
    engine: Engine, base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    kept, folder = strong.adapter(tmp_path / "kept", base, 0, **settings), tmp_path / "gone"
    shutil.copytree(kept, folder)
    engine.register("gone", tiny.NAME, folder)
    neighbour = ask(engine, tiny.NAME, PROMPT, LONG)
    shutil.rmtree(folder)
    with pytest.raises(GraftError) as caught:
        ask(engine, "gone", PROMPT, Sampling(5)).wait()
    assert caught.value.code == "adapter_missing"
    assert neighbour.wait().finish is not None
    shutil.copytree(kept, folder)
    assert ask(engine, "gone", PROMPT, Sampling(5)).wait().tokens


def test_bases_take_turns(engine: Engine, models: Catalogue, base: Path, adapters: list[Path]) -> None:
    other = Path(models.own["tests/other"])
    engine.register("ad", tiny.NAME, adapters[0])
    names = [tiny.NAME, "tests/other", "ad", "tests/other"]
    wanted = [greedy(base), greedy(other), greedy(base, adapters[0]), greedy(other)]
    heard = [ask(engine, name, PROMPT, Sampling(12)) for name in names]
    assert [one.wait().tokens for one in heard] == wanted


def test_a_cancelled_answer_leaves_and_its_room_is_free(engine: Engine) -> None:
    gone = threading.Event()
    one = ask(engine, tiny.NAME, PROMPT, Sampling(400, logit_bias=NEVER), cancelled=gone.is_set)
    assert one.first.wait(30)
    gone.set()
    assert reason(one) == "cancelled"
    assert one.finish is not None
    assert one.finish.tokens < 400
    assert idle(engine)
    scheduler = engine._scheduler
    assert scheduler is not None
    assert scheduler.free == scheduler.room


def test_an_answer_has_a_deadline_also_in_the_queue(make_engine: MakeEngine) -> None:
    engine = make_engine(Limits(running=1, answer_seconds=0.3))
    heard = [ask(engine, tiny.NAME, PROMPT, Sampling(1000, logit_bias=NEVER)) for _ in range(3)]
    for one in heard:
        with pytest.raises(GraftError) as caught:
            one.wait()
        assert (caught.value.code, caught.value.status) == ("deadline_exceeded", 504)


def test_more_than_may_wait_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(Limits(running=1, waiting=2))
    gone = threading.Event()
    heard = [ask(engine, tiny.NAME, PROMPT, Sampling(900, logit_bias=NEVER), cancelled=gone.is_set)]
    assert heard[0].first.wait(30)
    heard += [ask(engine, tiny.NAME, PROMPT, Sampling(3), cancelled=gone.is_set) for _ in range(2)]
    with pytest.raises(GraftError) as caught:
        ask(engine, tiny.NAME, PROMPT, Sampling(3))
    assert (caught.value.code, caught.value.status) == ("engine_full", 429)
    gone.set()
    assert [reason(one) for one in heard] == ["cancelled"] * 3


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ([], Sampling(4)),
        ([-1], Sampling(4)),
        ([320], Sampling(4)),
        ([5] * 1025, Sampling(4)),
        ([5] * 1020, Sampling(5)),
        ([5], Sampling(4, logit_bias={320: 1.0})),
    ],
)
def test_what_it_cannot_read_is_refused(engine: Engine, prompt: list[int], sampling: Sampling) -> None:
    with pytest.raises(BadRequest):
        ask(engine, tiny.NAME, prompt, sampling)
    assert ask(engine, tiny.NAME, PROMPT, Sampling(3)).wait().text is not None


def test_more_than_there_is_memory_for_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(Limits(cache_bytes=100 * 2 * 2 * 2 * 16 * 4))
    with pytest.raises(GraftError, match="60 prompt tokens and 60 new ones are more than the 100"):
        ask(engine, tiny.NAME, strong.prompt(60), Sampling(60)).wait()
    assert ask(engine, tiny.NAME, strong.prompt(60), Sampling(40)).wait().finish is not None


def test_an_unknown_name(engine: Engine) -> None:
    assert not engine.knows("ad_unknown")
    with pytest.raises(NotFound):
        ask(engine, "ad_unknown", PROMPT, Sampling(3))


@pytest.mark.parametrize("at", [(0, 1), (0, 2), (2, 4), (3, 4)])
def test_nothing_is_written_past_a_stop_string(engine: Engine, at: tuple[int, int]) -> None:
    hot = {"temperature": 1.5, "seed": 11, "max_tokens": 30}
    free = ask(engine, tiny.NAME, PROMPT, Sampling(**hot)).wait()
    whole = free.text
    stop = whole[at[0] : at[1]]
    heard = ask(engine, tiny.NAME, PROMPT, Sampling(stop=(stop,), **hot)).wait()
    assert heard.text == whole[: whole.index(stop)]
    assert heard.tokens == free.tokens[: len(heard.tokens)]
    assert bool(heard.tokens) == bool(heard.text)
    assert heard.finish is not None
    assert heard.finish.reason == "stop"
    assert heard.finish.tokens < 30


def test_the_token_that_ends_an_answer_is_none_of_it(engine: Engine) -> None:
    told = ask(engine, tiny.NAME, PROMPT, Sampling(4)).wait().tokens
    heard = ask(engine, tiny.NAME, PROMPT, Sampling(4, stop_token_ids=(told[3],))).wait()
    assert heard.tokens == told[: told.index(told[3])]
    assert heard.finish is not None
    assert heard.finish.tokens == len(heard.tokens) + 1


def test_while_a_model_is_built_no_other_is(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers changes the default dtype of the whole process meanwhile."""
    building, looked = threading.Lock(), []

    def alone(build: Any) -> Any:
        def built(*args: Any, **options: Any) -> Any:
            assert building.acquire(blocking=False), "two are built at a time"
            looked.append(build.__name__)
            time.sleep(0.1)
            try:
                return build(*args, **options)
            finally:
                building.release()

        return built

    for name in ("from_config", "from_pretrained"):
        monkeypatch.setattr(AutoModelForCausalLM, name, alone(getattr(AutoModelForCausalLM, name)))
    engine = make_engine()
    names = [tiny.NAME, "tests/other"] * 4
    with ThreadPoolExecutor(len(names)) as together:
        heard = together.map(lambda name: ask(engine, name, strong.prompt(20), Sampling(4)).wait(), names)
        assert all(len(one.tokens) >= 1 for one in heard)
    assert looked.count("from_config") == 2
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4),
        Gemma3Config(
            text_config=Gemma3TextConfig(
                vocab_size=320,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=64,
            ),
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            mm_tokens_per_image=4,
        ),
    ],
    ids=["gpt2", "with pictures"],
)
def test_how_much_a_model_reads_is_known_whatever_its_configuration_calls_it(
    make_engine: MakeEngine, tmp_path: Path, config: Any
) -> None:
    base = strong.model(tmp_path / "base", config)
    engine = make_engine(
        catalogue=Catalogue(tmp_path / "models", {"tests/other": str(base)}, allow_hub=False)
    )
    with pytest.raises(BadRequest, match="more than the 64"):
        ask(engine, "tests/other", strong.prompt(60), Sampling(5))
    heard = ask(engine, "tests/other", strong.prompt(60), Sampling(4)).wait()
    assert heard.finish is not None
    assert heard.finish.path == "compat"
