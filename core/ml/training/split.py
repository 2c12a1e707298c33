"""Which rows are held back, and which of those prove nothing because they are trained, too."""

from collections.abc import Sequence

from core.hashes import number, sha256
from core.ml.training.run import Run


def divided(prompts: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of training and of validation rows, by the keys of their prompts. Rows with the same prompt stay on the same
    side, and each side has some where there are two prompts."""
    shares = {key: number(f"{seed} {key}".encode()) / 2**64 for key in prompts}
    held = {key for key, share in shares.items() if share < fraction}
    if len(shares) > 1 and not held:
        held = {min(shares, key=lambda key: shares[key])}
    elif len(shares) > 1 and len(held) == len(shares):
        held.remove(max(shares, key=lambda key: shares[key]))
    places = range(len(prompts))
    back = [place for place in places if prompts[place] in held]
    return sorted({*places} - {*back}), back


def shared(valid: Sequence[int], train: Sequence[int]) -> list[int]:
    """Places of the validation rows whose keys training rows have."""
    known = set(train)
    return [place for place, key in enumerate(valid) if key in known]


def trained_before(run: Run) -> bool:
    """Whether the adapter that the run continues from was trained on the rows that are held back."""
    if not run.earlier:
        return False
    if run.valid is not None:
        rows = sha256(run.valid.path)
        return any(one.dataset == rows for one in run.earlier)
    rows, fraction = sha256(run.train.path), run.fraction
    if fraction is None:
        return False
    # With the same seed a smaller share is a part of the larger one.
    return any(
        one.dataset == rows
        and not (one.fraction is not None and one.seed == run.spec.seed and fraction <= one.fraction)
        for one in run.earlier
    )
