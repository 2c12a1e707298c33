"""Runs of the service's base model on the example data, for a machine with a GPU."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.ml import catalogue
from core.ml.catalogue import Catalogue
from core.ml.formats.validate import Reading
from core.ml.training import config
from core.ml.training.run import Run, Source

ROOT = Path(__file__).parent.parent.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAPPING = {
    "messages": [
        {"role": "system", "content": "Answer with SQL.\n{context}"},
        {"role": "user", "content": "{question}"},
        {"role": "assistant", "content": "{answer}"},
    ]
}
GIGABYTE = 1024**3


def catalogue_in(folder: Path) -> Catalogue:
    """Of the machine's own models; without them they are unpacked in `folder`."""
    return Catalogue(Path(os.environ.get("GRAFT_MODELS_DIR") or folder), {})


def run(models: Catalogue, work: Path, steps: int, rows: int | None = None, **more: Any) -> Run:
    """So many steps of 4 rows; `rows`: of the first ones of the file alone."""
    work.mkdir(parents=True)
    data = ROOT / "examples" / "text_to_sql"
    training = {
        "max_steps": steps,
        "effective_batch_size": 4,
        "learning_rate": 1.5e-3,
        "scheduler": "cosine",
        **more.pop("training", {}),
    }
    outside = {name: more.pop(name) for name in ("resume", "recoveries") if name in more}
    spec = {"lora": {"r": 16, "alpha": 32}, "checkpoints": {"every_steps": 20}, **more, "training": training}
    train = data / "train.jsonl"
    if rows is not None:
        first = train.read_text().splitlines(keepends=True)[:rows]
        train = work / "rows.jsonl"
        train.write_text("".join(first))
    return Run(
        catalogue.find(models, MODEL),
        config.settle(config.Spec.model_validate(spec)),
        *(
            Source(file, Reading("jsonl", False, "mapping", MAPPING))
            for file in (train, data / "valid.jsonl")
        ),
        None,
        work,
        **outside,
    )


def let_go() -> None:
    """Give back what earlier tests left, and count the peaks from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """This process gets no more bytes of the GPU: beyond them torch says that it is out of memory."""
    let_go()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        let_go()
