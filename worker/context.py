"""What a worker process has opened, made once when it starts."""

import threading
from dataclasses import dataclass, field
from typing import Any

from core.control.db import Sessions
from core.ml.catalogue import Catalogue
from core.settings import Settings
from core.storage import Storage


@dataclass(frozen=True)
class Context:
    settings: Settings
    sessions: Sessions
    storage: Storage
    catalogue: Catalogue
    owner: str
    stopping: threading.Event
    # What jobs run on here, empty until the worker has looked; each beat of the worker's row tells it.
    device: dict[str, Any] = field(default_factory=dict)
