"""What one export is given. No torch: the worker makes it, the child process reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.ml.catalogue import BaseModel
from core.ml.quantization import Quantization
from core.ml.training.run import Source

Format = Literal["merged", "gguf"]


@dataclass(frozen=True)
class Export:
    """An adapter's files in `adapter`, to be written in another form below the empty folder `work`.

    `quantization` is how the base was held while the adapter was trained; `rows` are what it was trained on, where
    they are still there: the finished model is compared on them.
    """

    name: str
    model: BaseModel
    adapter: Path
    format: Format
    quantization: Quantization
    rows: Source | None
    work: Path
