"""Keys and values of prompts' beginnings, kept for the next prompt that begins alike."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.ml.inference.batch.attention import Cache

# Tokens of a block.
BLOCK = 32


class Prefixes:
    """Blocks of tokens by everything before and in them; those that were not used for longest make room.

    A `root` names what else the numbers depend on (base model, adapter, project; the precision is the engine's): nothing
    is ever shared between two of them.
    """

    def __init__(self, budget: int) -> None:
        """`budget`: bytes."""
        self._room = budget
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def fill(self, cache: Cache, root: str, tokens: Sequence[int]) -> None:
        """Copy what is known of `tokens` into an empty cache, all but the last of them at most: somebody has to be asked
        what comes next."""
        found = []
        for key, _, end in _keys(root, tokens[: len(tokens) - 1]):
            if key not in self._blocks:
                break
            found.append(key)
            cache.tensor[:, :, :, end - BLOCK : end] = self._blocks[key]
            cache.length = end
        self._touch(found)

    def keep(self, cache: Cache, root: str, tokens: Sequence[int]) -> None:
        """Keep the whole blocks of `tokens`, all of which the cache holds."""
        known: list[bytes] = []
        for key, start, end in _keys(root, tokens):
            if key not in self._blocks:
                block = cache.tensor[:, :, :, start:end]
                if not self._make_room(block.nbytes, known):
                    break
                self._blocks[key] = block.clone()
            known.append(key)
        self._touch(known)

    def clear(self) -> None:
        for key in list(self._blocks):
            self._drop(key)

    def _make_room(self, size: int, needed: list[bytes]) -> bool:
        """Room for a block, without dropping what stands before it."""
        for key in list(self._blocks):
            if self._room >= size:
                break
            if key not in needed:
                self._drop(key)
        fits = self._room >= size
        self._room -= size if fits else 0
        return fits

    def _drop(self, key: bytes) -> None:
        self._room += self._blocks.pop(key).nbytes

    def _touch(self, keys: list[bytes]) -> None:
        # A block is found through those before it, so they go last.
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _keys(root: str, tokens: Sequence[int]) -> Iterator[tuple[bytes, int, int]]:
    """(key, start, end) of each whole block."""
    key = root.encode()
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        block = torch.tensor(tokens[end - BLOCK : end], dtype=torch.int32).numpy().tobytes()
        key = hashlib.blake2b(key + block, digest_size=16).digest()
        yield key, end - BLOCK, end
