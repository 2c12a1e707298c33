"""The service under measurement: a home that goes when it ends, the base models that are here already."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core import settings
from tests.service import Service


@contextmanager
def running(**environment: str) -> Iterator[Service]:
    offline = os.environ.get("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        service = Service(
            Path(folder) / "home",
            {
                "GRAFT_MODELS_DIR": str(settings.load().models_folder),
                "HF_HUB_OFFLINE": offline,
                **environment,
            },
        )
        try:
            yield service.start()
        finally:
            service.stop()
