"""Rows set apart to measure on."""

import hashlib

import numpy as np

from bonetune.data.examples import EncodedSet
from bonetune.errors import InputError


def hold_out(examples: EncodedSet, sources: np.ndarray, size: float, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Choose rows by chance. All examples of a row go with it, and what equals a chosen row is not trained on.

    Args:
        examples: of all rows.
        sources: (examples,), the data set that each is from.
        size: the share of the rows to choose, or from 1 on their number.
        seed: of the choice.

    Returns:
        The numbers of the examples to train on and of those held out, each in order, and how many rows are among neither.

    Raises:
        InputError: a number of rows that is not whole, or that leaves nothing on one side.
    """
    _, first, row_of = np.unique(np.stack([sources, examples.rows]), axis=1, return_index=True, return_inverse=True)
    total = len(first)
    count = round(size * total) if size < 1 else int(size)
    if size >= 1 and size != count:
        raise InputError(f"eval_size={size:g} is neither a share below 1 nor a whole number of rows.")
    if not 0 < count < total:
        raise InputError(f"eval_size={size:g} holds out {count} of {total} rows: leave at least one on each side.")
    contents = [hashlib.blake2b(digest_size=16) for _ in range(total)]
    for row, digest in zip(row_of, examples.digests(), strict=True):
        contents[row].update(digest)
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[:count]] = True
    known = {contents[row].digest() for row in np.flatnonzero(chosen)}
    kept = np.asarray([content.digest() not in known for content in contents])
    if not kept.any():
        raise InputError(f"eval_size={size:g}: every row equals one of those held out, so that none is left to train on.")
    return np.flatnonzero(kept[row_of]), np.flatnonzero(chosen[row_of]), total - count - int(kept.sum())
