"""A permutation of a known key, computed for each index: the order of the windows in an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Four make a Feistel network of random functions indistinguishable from a random permutation (Luby and Rackoff 1988);
#: ours are no more than good mixers, so twice that.
_ROUNDS = 8


def permuted(indices: npt.NDArray[np.int64], n: int, *, key: Sequence[int]) -> npt.NDArray[np.int64]:
    """The images of ``indices`` under the permutation of 0 .. n - 1 with this key.

    A balanced Feistel network permutes the smallest 0 .. 4^b - 1 that holds them, with the output mixer of SplitMix64
    (Steele, Lea and Flood 2014) as its round function; an image that is not below ``n`` is permuted again until it is
    (cycle walking, Black and Rogaway 2002), fewer than four times on average.

    Args:
        indices: each in 0 .. n - 1; any shape.
        n: at least 1, below 2^62.
        key: integers; SHA-256 makes the round keys of them.
    """
    half = max((n - 1).bit_length() + 1, 2) // 2
    keys = _round_keys(key)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _network(values[outside], half, keys)
        outside = values >= n
    return values.astype(np.int64)


def _network(values: npt.NDArray[np.uint64], half: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Values of 2 ``half`` bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(key: Sequence[int]) -> npt.NDArray[np.uint64]:
    text = ",".join(str(int(part)) for part in key).encode()
    digest = b"".join(hashlib.sha256(b"%d:" % i + text).digest() for i in range(_ROUNDS // 4))
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
