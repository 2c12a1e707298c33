"""What a run takes of a GPU; nothing where there is none."""

import time

import torch


def reset() -> None:
    """Count the peaks from here: what loading took is past."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def taken() -> dict[str, int] | None:
    """Peaks in bytes: `allocated` by tensors, `reserved` for them by torch, and what the whole `device` lacks now: with
    the driver's share, with paged memory that lies there, and with other programs'."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,
    }


def now() -> float:
    """Seconds, when all that was begun on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()
