"""What one project may have of the engine, so that the next request of another finds room."""

from collections.abc import Sequence

from core.errors import GraftError
from core.ml.inference.answering import Answering

# Of the places to wait, of the answers at a time, and of the memory for them.
_MOST = 0.75


def check_queue(waiting: Sequence[Answering], count: int, salt: str, places: int) -> None:
    """Whether `count` more may wait. `salt` names the project; those without one have all places.

    Raises:
        GraftError: `engine_full`, 429.
    """
    own = sum(one.request.salt == salt for one in waiting) if salt else 0
    if waiting and len(waiting) + count > places:
        told = f"{len(waiting)} requests are waiting already."
    elif own and own + count > _MOST * places:
        told = f"{own} requests of this project are waiting already."
    else:
        return
    hint = "Ask again in some seconds. GRAFT_ENGINE_WAITING says how many may wait; a project has three quarters of it."
    raise GraftError("engine_full", told, status=429, hint=hint)


def is_beyond(one: Answering, running: Sequence[Answering], places: int, room: int) -> bool:
    """Whether its project would have too much with this one: of `places` for answers at a time, and of `room`, in tokens.
    The first of a project is never too much."""
    salt = one.request.salt
    own = [other.most for other in running if other.request.salt == salt] if salt else []
    return bool(own) and (len(own) + 1 > _MOST * places or sum(own) + one.most > _MOST * room)
