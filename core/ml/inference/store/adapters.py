"""Adapters in memory beside the base model, within a budget."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from core.ml.inference.batch.lora import Adapter
from core.ml.inference.store.files import Source


@dataclass
class _Place:
    """One adapter that is in memory, or on its way there."""

    reading: Future[Adapter]
    bytes: int
    users: int = field(default=0)


class Adapters:
    """Those in memory, by their content; the ones that nobody uses and nobody used for longest make room."""

    def __init__(
        self, budget: int, read_one: Callable[[Source], Adapter], arrived: Callable[[], None]
    ) -> None:
        """`budget`: bytes; `arrived` is called, in another thread, when an adapter was read."""
        self._room, self._read, self._arrived = budget, read_one, arrived
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "adapters")

    def __len__(self) -> int:
        return len(self._places)

    def take(self, source: Source) -> Adapter | None:
        """The adapter, kept until it is given back; None while it is being read or all room is in use.

        Raises:
            Exception: what reading it failed with; the next one who takes it tries again.
        """
        place = self._places.get(source.digest)
        if place is None:
            if self._make_room(source.bytes):
                self._begin(source)
            return None
        if not place.reading.done():
            return None
        if place.reading.exception() is not None:
            self._drop(source.digest)
        adapter = place.reading.result()
        self._places.move_to_end(source.digest)
        place.users += 1
        return adapter

    def give_back(self, source: Source) -> None:
        self._places[source.digest].users -= 1

    def clear(self) -> None:
        """Forget all of them; nobody may be using one."""
        for digest, place in list(self._places.items()):
            place.reading.cancel()
            self._drop(digest)

    def _begin(self, source: Source) -> None:
        self._room -= source.bytes
        reading = self._thread.submit(self._read, source)
        self._places[source.digest] = _Place(reading, source.bytes)
        reading.add_done_callback(lambda _: self._arrived())

    def _make_room(self, size: int) -> bool:
        idle = [digest for digest, place in self._places.items() if not place.users and place.reading.done()]
        # Where all of them are not enough none is dropped, but for one that is to be served alone.
        if self._room + sum(self._places[digest].bytes for digest in idle) >= size or len(idle) == len(
            self._places
        ):
            for digest in idle:
                if self._room >= size:
                    break
                self._drop(digest)
        # One that is larger than the whole budget is served alone.
        return self._room >= size or not self._places

    def _drop(self, digest: str) -> None:
        self._room += self._places.pop(digest).bytes
