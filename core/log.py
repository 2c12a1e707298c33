"""One structured log format: JSON lines with the request id and job id of the moment; and a job's own log, for people."""

import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
job_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("job_id", default=None)

# In a job's work folder.
FILE = "log.txt"
# Of one process about one job: what floods the log tells nothing more.
_MOST_LINES = 20_000
_PLAIN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, var in (("request_id", request_id), ("job_id", job_id)):
            if (value := var.get()) is not None:
                line[name] = value
        line.update({k: v for k, v in record.__dict__.items() if k not in _PLAIN})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Bounded(logging.Filter):
    """Lets through what is said about one job, or everything, and not without end."""

    def __init__(self, job: str | None) -> None:
        super().__init__()
        self.job, self.left = job, _MOST_LINES

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - as logging calls it
        if self.job not in (None, job_id.get()) or not self.left:
            return False
        self.left -= 1
        return True


@contextmanager
def kept(file: Path, job: str | None = None) -> Iterator[None]:
    """Write all that this process says, or only what it says about one job, into a file, too, as plain lines.

    Several processes may do so at once.
    """
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.addFilter(_Bounded(job))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):  # of a full disk: what is lost is a line of the log, not the job
            handler.close()


def setup(level: str = "INFO") -> None:
    """Send every logger of this process to stderr in this format, from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.setLevel(level)
    # A job's own log gets all from INFO on, whatever this process tells.
    logging.basicConfig(level=min(logging.INFO, handler.level), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
