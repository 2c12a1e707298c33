"""Which rows are held back, and which of those prove nothing because they are trained, too."""

import hashlib
from array import array
from collections.abc import Sequence

from core.hashes import key64, sha256
from core.ml.training.run import Run


def divided(prompts: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of training and of validation rows, by the keys of their prompts. Rows with the same prompt stay on the same
    side, and each side has some where there are two prompts."""
    shares = {key: key64(f"{seed} {key}".encode()) / 2**64 for key in prompts}
    held = {key for key, share in shares.items() if share < fraction}
    if len(shares) > 1 and not held:
        held = {min(shares, key=lambda key: shares[key])}
    elif len(shares) > 1 and len(held) == len(shares):
        held.remove(max(shares, key=lambda key: shares[key]))
    places = range(len(prompts))
    back = [place for place in places if prompts[place] in held]
    return sorted({*places} - {*back}), back


def fingerprint(prompts: Sequence[int]) -> str:
    """The same for the same prompts, by their keys, in any order."""
    return hashlib.sha256(array("Q", sorted(set(prompts))).tobytes()).hexdigest()


def shared(valid: Sequence[int], train: Sequence[int]) -> list[int]:
    """Places of the validation rows whose keys training rows have."""
    known = set(train)
    return [place for place, key in enumerate(valid) if key in known]


def trained_before(run: Run, held: Sequence[int] = ()) -> bool:
    """Whether the adapter that the run continues from was trained on its validation rows: on those of its validation data
    set, or on some of those that are held back, with these keys of prompts."""
    if not run.earlier:
        return False
    if run.valid is not None:
        return sha256(run.valid.path) in {one.dataset for one in run.earlier}
    rows, apart = sha256(run.train.path), fingerprint(held)
    return any(one.dataset == rows and one.held_back != apart for one in run.earlier)
