"""Memory of a device that others need, too."""

import traceback
from typing import Protocol


class Shared(Protocol):
    """A device that others need too. Holding it keeps nobody out: it tells those who want it that they have to wait."""

    def wanted(self) -> bool: ...
    def hold(self) -> None: ...
    def give_back(self) -> None: ...


def let_go(error: BaseException) -> None:
    """Have an error hold nothing that it was raised among: the frames of its traceback, and of those it comes from, keep
    models and numbers in memory for as long as it is handled."""
    seen: set[BaseException] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and one not in seen:
            seen.add(one)
            traceback.clear_frames(one.__traceback__)
            left += [one.__cause__, one.__context__]
