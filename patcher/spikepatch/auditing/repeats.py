"""Copies in a tensor, by the signs of the first elements of its rows and columns: up to a factor, they are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Elements whose signs tell a row, a column or a tensor from all others.
SIGNS = 64
#: Fewer than that many signs could agree by chance; shorter rows are compared as they are.
_ENOUGH = 48


@dataclass(frozen=True)
class Repeat:
    """Rows (axis 0) or columns (axis 1) that are copies of those ``shift`` before; ``share`` of all of them."""

    axis: int
    shift: int
    share: float


def signs_of(head: NDArray[Any]) -> NDArray[np.uint8]:
    """(n, up to 64) -> n rows of bytes that tell one from another: signs, or of short rows the values."""
    if head.shape[1] >= _ENOUGH:
        return np.packbits(head > 0, axis=1)
    plain: NDArray[np.uint8] = head.reshape(-1).view(np.uint8)
    return plain.reshape(len(head), -1) if plain.size else np.zeros((len(head), 1), np.uint8)


def signs_of_columns(first: NDArray[Any]) -> NDArray[np.uint8]:
    """``signs_of`` of the columns of (up to 64, n), in any order of the bits."""
    if len(first) < SIGNS:
        return signs_of(np.ascontiguousarray(first.T))
    signs = (first > 0).view(np.uint8).reshape(8, 8, -1)
    packed = signs[:, 0].copy()
    for i in range(1, 8):
        packed <<= 1
        packed |= signs[:, i]
    return np.ascontiguousarray(packed.T)


def repeat_of(keys: NDArray[np.uint8], largest: NDArray[Any], axis: int) -> Repeat | None:
    """Rows whose keys are equal, at the distance that most of them have; those without values are no copies."""
    count = len(keys)
    if count < 2 or (keys.shape[1] == 8 and _all_differ(keys.view(np.uint32)[:, 0])):
        return None
    plain = (keys == keys[:, :1]).all(1)  # all of one sign: it may be a constant
    kept = np.flatnonzero((largest > 0) & ~(plain & np.isin(keys[:, 0], (0, 255))))
    if len(kept) < 2:
        return None
    rows = np.ascontiguousarray(keys[kept])
    packed: NDArray[np.generic]
    if keys.shape[1] == 8:
        packed = rows.view(np.uint64)[:, 0]
    else:
        packed = np.unique(rows.view(np.dtype((np.void, keys.shape[1])))[:, 0], return_inverse=True)[1]
    order = np.argsort(packed, kind="stable")
    same = packed[order][1:] == packed[order][:-1]
    shifts = (kept[order][1:] - kept[order][:-1])[same]
    if not len(shifts):
        return None
    found, counts = np.unique(shifts, return_counts=True)
    most = int(counts.argmax())
    return Repeat(axis, int(found[most]), float(counts[most] / count))


def _all_differ(keys: NDArray[np.uint32]) -> bool:
    ordered = np.sort(keys)
    return not bool((ordered[1:] == ordered[:-1]).any())


def prefix_of(first: NDArray[Any]) -> int | None:
    """The signs of the first 64 elements; None for fewer, or where all are the same."""
    flat = first.reshape(-1)[:SIGNS]
    if len(flat) < SIGNS:
        return None
    signs = int.from_bytes(np.packbits(flat > 0).tobytes(), "big")
    return signs if 0 < signs < (1 << SIGNS) - 1 else None
