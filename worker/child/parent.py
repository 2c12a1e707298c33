"""A process that must not outlive the one that started it."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(how: signal.Signals) -> None:
    """Have the system send this process a signal when its parent is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
