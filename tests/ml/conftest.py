from pathlib import Path

import pytest

from core.ml import catalogue
from core.ml.catalogue import BaseModel, Catalogue
from tests import tiny
from tests.ml import runs


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> BaseModel:
    return catalogue.find(Catalogue(tmp_path / "models", {tiny.NAME: str(tiny_model)}), tiny.NAME)


@pytest.fixture
def make_run(model: BaseModel, tmp_path: Path) -> runs.MakeRun:
    return runs.maker(model, tmp_path)
