from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.ml.base_model import Precision
from core.ml.catalogue import Catalogue
from core.ml.inference.engine import Engine
from core.ml.inference.scheduler import Limits
from tests import tiny
from tests.ml.inference import strong

EXACT = Precision(bits=16, type="nf4", double_quant=True, dtype="float32")
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strong.model(tmp_path_factory.mktemp("strong"), strong.CONFIGURATIONS["llama"])


@pytest.fixture(scope="session")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    other = strong.model(tmp_path_factory.mktemp("other"), strong.CONFIGURATIONS["llama"], seed=1)
    return Catalogue(
        tmp_path_factory.mktemp("models"), {tiny.NAME: str(base), "tests/other": str(other)}, allow_hub=False
    )


@pytest.fixture
def make_engine(models: Catalogue) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(limits: Limits | None = None, catalogue: Catalogue = models) -> Engine:
        made.append(Engine(catalogue, EXACT, limits))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight of them."""
    folder = tmp_path_factory.mktemp("adapters")
    return [strong.adapter(folder / str(seed), base, seed, r=4 + seed % 3) for seed in range(8)]
