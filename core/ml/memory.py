"""What memory of this machine is free. No torch."""

from contextlib import suppress
from pathlib import Path

import psutil

_GROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """What is free in this machine, as far as this container may use it."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, StopIteration):  # no control group, or one without a limit
        taken = int((_GROUP / "memory.current").read_text())
        # Files that were read lie there, too, until somebody needs the room.
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        taken -= int(next(line.split()[1] for line in lines if line.startswith("inactive_file ")))
        free = min(free, int((_GROUP / "memory.max").read_text()) - taken)
    return max(free, 0)
