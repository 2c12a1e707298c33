"""That one project leaves room for another's next request."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.errors import GraftError
from core.ml.inference.sampling import Sampling
from core.ml.inference.scheduler import Limits
from tests import tiny
from tests.ml.inference.asking import ask
from tests.ml.inference.conftest import MakeEngine
from tests.ml.inference.strong import NEVER, PROMPT

LONG = Sampling(900, logit_bias=NEVER)
# Of the tiny model: keys and values of two layers with two heads of 16, as float32.
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    "limits",
    [Limits(running=4), Limits(cache_bytes=4 * 920 * TOKEN_BYTES)],
    ids=["answers at a time", "memory"],
)
def test_a_project_that_asks_for_all_there_is_leaves_room_for_others(
    make_engine: MakeEngine, limits: Limits
) -> None:
    engine, gone = make_engine(limits), threading.Event()
    greedy = [ask(engine, tiny.NAME, PROMPT, LONG, gone.is_set, salt="one") for _ in range(8)]
    assert all(heard.first.wait(30) for heard in greedy[:3])
    assert ask(engine, tiny.NAME, PROMPT, Sampling(3), salt="other").wait().finish is not None
    assert not any(heard.over.is_set() for heard in greedy)
    assert not any(heard.first.is_set() for heard in greedy[3:])
    gone.set()
    assert all(heard.over.wait(30) for heard in greedy)


def test_those_beyond_their_share_go_on_when_their_own_are_written(make_engine: MakeEngine) -> None:
    engine = make_engine(Limits(running=2))
    heard = [ask(engine, tiny.NAME, PROMPT, Sampling(3), salt="one") for _ in range(6)]
    assert all(one.wait().finish is not None for one in heard)


def test_a_project_leaves_places_to_wait(make_engine: MakeEngine) -> None:
    engine, gone = make_engine(Limits(running=1, waiting=8)), threading.Event()
    first = ask(engine, tiny.NAME, PROMPT, LONG, gone.is_set, salt="one")
    assert first.first.wait(30)
    waiting = [ask(engine, tiny.NAME, PROMPT, Sampling(3), gone.is_set, salt="one") for _ in range(6)]
    with pytest.raises(GraftError, match="of this project") as caught:
        ask(engine, tiny.NAME, PROMPT, Sampling(3), salt="one")
    assert (caught.value.code, caught.value.status) == ("engine_full", 429)
    waiting += [ask(engine, tiny.NAME, PROMPT, Sampling(3), gone.is_set, salt="other") for _ in range(2)]
    with pytest.raises(GraftError, match="8 requests are waiting"):
        ask(engine, tiny.NAME, PROMPT, Sampling(3), salt="third")
    gone.set()
    assert all(one.over.wait(30) for one in [first, *waiting])


def test_small_ones_of_a_project_do_not_keep_its_large_one_waiting(make_engine: MakeEngine) -> None:
    engine, stop = make_engine(Limits(cache_bytes=1000 * TOKEN_BYTES)), threading.Event()

    def small(number: int) -> None:
        while not stop.is_set():
            ask(engine, tiny.NAME, PROMPT, Sampling(20 + 17 * number, logit_bias=NEVER), salt="one").wait()

    with ThreadPoolExecutor(4) as together:
        asking = together.map(small, range(4))
        time.sleep(0.3)
        large = ask(engine, tiny.NAME, PROMPT, Sampling(700, logit_bias=NEVER), salt="one")
        began = large.first.wait(20)
        stop.set()
        list(asking)
    assert began
