"""Numbers of a block, and of a sample of whole rows, in as few passes as may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spikepatch.auditing.repeats import SIGNS

if TYPE_CHECKING:
    from numpy.typing import NDArray


def largest_bits(bits: NDArray[Any], mask: int) -> int:
    """Bits of the largest absolute value of a flat array.

    Floats of one sign are ordered as their bits are: the largest positive one has the largest integer, the largest
    negative one the largest unsigned integer. So two passes without a copy do, at the speed of memory.
    """
    if not len(bits):
        return 0
    unsigned = bits.view(f"u{bits.itemsize}")
    return max(int(np.maximum.reduce(bits)) & mask, int(np.maximum.reduce(unsigned)) & mask)


def _largest_bits_of_each(bits: NDArray[Any], mask: int) -> NDArray[Any]:
    signed = np.maximum.reduce(bits, axis=1) & mask
    unsigned = np.maximum.reduce(bits.view(f"u{bits.itemsize}"), axis=1) & mask
    largest: NDArray[Any] = np.maximum(signed, unsigned.view(bits.dtype))
    return largest


def largest_bits_of_rows(bits: NDArray[Any], head: NDArray[Any], highest: int, mask: int, octave: int) -> NDArray[Any]:
    """Bits of the largest absolute value of each row, so far as it matters.

    Rows that are within a factor of 16 to 32 of eight others count as those do. Others show in the block's largest
    value, or by no positive one among their first 64, and are looked at whole.

    Args:
        highest: of the block.
        octave: what the bits of twice a value have more.
    """
    if head.shape[1] < SIGNS or len(bits) < SIGNS:
        return _largest_bits_of_each(bits, mask)
    some = _largest_bits_of_each(bits[:: len(bits) // 8], mask)
    alive = sorted(filter(None, some.tolist()))
    usual = alive[len(alive) // 2] if alive else 0
    if not usual or highest > usual + 4 * octave:
        return _largest_bits_of_each(bits, mask)
    found = np.full(len(bits), usual, bits.dtype)
    above = np.packbits(head > max(usual - 5 * octave, 0), axis=1).view(np.uint64)[:, 0]
    doubtful = np.flatnonzero(above == 0)
    if len(doubtful):
        found[doubtful] = _largest_bits_of_each(bits[doubtful], mask)
    return found


@dataclass(frozen=True)
class Moments:
    """Of a sample of whole rows."""

    mean: float
    std: float
    kurtosis: float
    edges: tuple[float, float]
    column_largest: NDArray[Any]
    row_spread: float
    column_spread: float
    uneven: float


def moments_of(values: NDArray[Any]) -> Moments:
    """In as few passes as may be: the least and largest of columns, the mean, squares about it, their sums."""
    columns = values.shape[1]
    if not values.size:
        return Moments(0.0, 0.0, 0.0, (0.0, 0.0), np.zeros(columns), 1.0, 1.0, 1.0)
    above, below = np.maximum.reduce(values, axis=0), np.minimum.reduce(values, axis=0)
    edges = float(below.min()), float(above.max())
    column_largest = np.maximum(above, -below)
    scale = max(edges[1], -edges[0])  # the fourth power of a small number is none
    if edges[0] == edges[1]:
        return Moments(edges[0], 0.0, 0.0, edges, column_largest, 1.0, 1.0, 1.0)
    values = values / values.dtype.type(scale)  # of denormals, 1 / scale would be infinite
    squares = np.square(values)
    mean, second, fourth = _centred(values, squares)
    kurtosis = fourth / second**2
    by_row, by_column = squares.mean(axis=1), squares.mean(axis=0)
    return Moments(
        mean=mean * scale,
        std=math.sqrt(second) * scale,
        kurtosis=kurtosis,
        edges=edges,
        column_largest=column_largest,
        row_spread=_spread(by_row, columns, kurtosis),
        column_spread=_spread(by_column, len(values), kurtosis),
        uneven=max(_uneven(by_row, columns), _uneven(by_column, len(values))),
    )


def _centred(values: NDArray[Any], squares: NDArray[Any]) -> tuple[float, float, float]:
    """The mean, and the second and fourth moment about it: of sums about 0, where little of them is the mean's."""
    mean = float(values.mean(axis=1).mean(dtype=np.float64))
    second = float(squares.mean(axis=1).mean(dtype=np.float64))
    if mean**2 > 0.01 * second:
        squares = np.square(values - values.dtype.type(mean))
        return mean, float(squares.mean(axis=1).mean(dtype=np.float64)), float(np.square(squares).mean())
    flat = squares.reshape(-1)
    third, fourth = (float(np.dot(flat, by)) / flat.size for by in (values.reshape(-1), flat))
    return mean, second - mean**2, fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4


def odd_rows(largest: NDArray[Any]) -> tuple[int, int]:
    """How many rows are weak, and how many are strong; those that are nothing but zeros do not count."""
    alive = largest[largest > 0]
    if not len(alive) or alive.max() <= 30 * alive.min():
        return 0, 0
    usual = np.median(alive)
    return int((alive < usual / 50).sum()), int((alive > 30 * usual).sum())


def _spread(squares: NDArray[Any], length: int, kurtosis: float) -> float:
    """How much stds differ, each of ``length`` elements, by their median deviation: one odd row does not count."""
    if len(squares) < 8 or length < 8 or kurtosis <= 1:
        return 1.0
    stds = np.sqrt(squares[:: max(1, len(squares) // 1024)])
    middle = _median(stds)
    if not middle:
        return 1.0
    deviation = _median(np.abs(stds - middle)) / middle * 1.4826
    return deviation / math.sqrt((kurtosis - 1) / (4 * length))


def _uneven(squares: NDArray[Any], length: int) -> float:
    """How many times the std of one half, or one third, has of another; 1 where there are too few elements to tell."""
    found = 1.0
    for parts in (2, 3):
        size = len(squares) // parts
        if size < 4 or size * length < 1000:
            continue
        stds = np.sqrt(squares[: size * parts].reshape(parts, size).mean(axis=1))
        if stds.min() > 0:
            found = max(found, float(stds.max() / stds.min()))
    return found


def _median(values: NDArray[Any]) -> float:
    return float(np.partition(values, len(values) // 2)[len(values) // 2])
