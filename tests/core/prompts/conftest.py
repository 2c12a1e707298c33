"""Contracts of the tiny model, and of folders with another template."""

from pathlib import Path

import pytest

from core.ml import contract as contracts
from core.ml.prompts import Contract
from tests import tiny


@pytest.fixture(scope="module")
def contract(tiny_model: Path) -> Contract:
    return contracts.load(tiny_model)


def with_template(folder: Path, template: str | None) -> Path:
    tiny.tokenizer(template).save_pretrained(folder)
    return folder
