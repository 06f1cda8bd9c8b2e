"""Where new weights come from: block-seeded random fills. (``initialiser.py`` has those that a recipe leaves alone.)

The bits of a fill depend on (seed, tensor name, element index) only: not on shard order, chunking, thread count,
device, or whether the tensor is part of a live model or of a file. They are drawn by numpy, whose code for them is
scalar, where torch's vectorised ``normal_`` differs between processors; of the platform only the C library's ``expf``
and ``log1pf`` have a part, in the tails. A golden vector pins the bits. The architecture's own initialiser is torch's
code, so its random draws are the same everywhere on one machine, but not from one kind of processor to another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from spikepatch.plans.plan import Constant, ValueEdit

Floats = NDArray[np.float32]
#: (generator, elements to skip, where to put those that follow): draws of unit size.
Units = Callable[[np.random.Generator, int, Floats], None]

#: Elements that share one generator. A slice of a tensor needs only the blocks that it overlaps.
BLOCK = 1 << 20

#: Elements drawn at a time for a part of a tensor: 32 MB. A chunk that starts inside a block draws, and drops, what
#: precedes it in the block.
CHUNK = 8 * BLOCK


def draw(edit: ValueEdit, seed: int, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements ``start`` to ``stop`` (row-major) of the tensor ``name``, as ``edit`` says; float32, on the CPU, flat.

    A unit draw is multiplied by ``edit.size`` in float32. In block b, from an SFC64 generator seeded with SHA-256 of
    (seed, name, b), the unit draw of element i is

    - ``normal``: the i-th normal draw;
    - ``truncated``: the i-th normal draw of absolute value up to ``cut``;
    - ``uniform``: (2 k + 1) / 2^24 - 1 for the i-th draw k of 24 bits: symmetric, and never 0.
    """
    if isinstance(edit, Constant):
        return torch.full((stop - start,), edit.written, dtype=torch.float32)
    units: Units
    match edit.distribution:
        case "normal":
            units = _normal
        case "truncated":
            units = partial(_truncated, edit.cut)
        case "uniform":
            units = _uniform
    return _by_block(units, seed, name, start, stop, edit.size)


def gaussian(seed: int, name: str, start: int, stop: int, std: float) -> torch.Tensor:
    """Elements ``start`` to ``stop`` of the tensor ``name`` ~ N(0, std^2); see ``draw``."""
    return _by_block(_normal, seed, name, start, stop, std)


def truncated(seed: int, name: str, start: int, stop: int, cut: float, std: float) -> torch.Tensor:
    """The same ~ N(0, std^2), cut off at ``cut`` of its stds."""
    return _by_block(partial(_truncated, cut), seed, name, start, stop, std)


def fraction(seed: int, name: str, start: int, stop: int) -> torch.Tensor:
    """The same, uniform between 0 and 1, and neither of them: (2 k + 1) / 2^25 for draws k of 24 bits, rounded."""
    return _by_block(_fraction, seed, name, start, stop, 1.0)


def _by_block(units: Units, seed: int, name: str, start: int, stop: int, size: float) -> torch.Tensor:
    values = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        generator = np.random.Generator(np.random.SFC64(entropy(seed, name, block)))
        units(generator, low - block * BLOCK, values[low - start : high - start])
    values *= np.float32(size)
    return torch.from_numpy(values)


def _normal(generator: np.random.Generator, skip: int, out: Floats) -> None:
    generator.standard_normal(skip, dtype=np.float32)
    generator.standard_normal(dtype=np.float32, out=out)


def _uniform(generator: np.random.Generator, skip: int, out: Floats) -> None:
    generator.random(skip, dtype=np.float32)
    generator.random(dtype=np.float32, out=out)  # k / 2^24
    out *= 2
    out += np.float32(2**-24 - 1)  # exact, as every step: odd multiples of 2^-24 below 1


def _fraction(generator: np.random.Generator, skip: int, out: Floats) -> None:
    generator.random(skip, dtype=np.float32)
    generator.random(dtype=np.float32, out=out)  # k / 2^24
    out += np.float32(2**-25)
    np.minimum(out, np.float32(1 - 2**-24), out=out)


def _truncated(cut: float, generator: np.random.Generator, skip: int, out: Floats) -> None:
    kept: list[Floats] = []
    while missing := skip + len(out) - sum(map(len, kept)):
        drawn = generator.standard_normal(missing, dtype=np.float32)
        kept.append(drawn[np.abs(drawn) <= np.float32(cut)])
    out[:] = np.concatenate(kept)[skip:]


def entropy(seed: int, name: str, block: int) -> int:
    """256 bits for one block of one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}\0{block}".encode()).digest(), "little")


def narrow(seed: int, bits: int) -> int:
    """``seed`` for a generator that takes ``bits`` of it: itself, or the first bits of its SHA-256 if it is longer."""
    return seed if seed < 1 << bits else entropy(seed, "", -1) >> (256 - bits)


def pieces(
    draw: Callable[[int, int], torch.Tensor], shape: Sequence[int], box: Sequence[range]
) -> Iterator[tuple[tuple[int | slice, ...], torch.Tensor]]:
    """The elements ``box`` of a tensor of ``shape``, at most ``CHUNK`` drawn at a time, whatever the tensor's size.

    Only blocks that the box overlaps are drawn, where a row is at least a block; of smaller rows, those of the box.

    Args:
        draw: (start, stop) -> these elements of the whole tensor, row-major and flat.
        box: a range of indices in each dimension.

    Yields:
        Where in the box, and the values there.
    """
    if not shape:
        yield (), draw(0, 1).view(())
    elif all(box):
        yield from _pieces(draw, 0, shape, box)


def _pieces(
    draw: Callable[[int, int], torch.Tensor], start: int, shape: Sequence[int], box: Sequence[range]
) -> Iterator[tuple[tuple[int | slice, ...], torch.Tensor]]:
    row, (rows, *rest) = math.prod(shape[1:]), box
    if row > BLOCK:
        for i, index in enumerate(rows):
            for where, values in _pieces(draw, start + index * row, shape[1:], rest):
                yield (i, *where), values
        return
    step = CHUNK // row
    for low in range(rows.start, rows.stop, step):
        high = min(low + step, rows.stop)
        values = draw(start + low * row, start + high * row).view(high - low, *shape[1:])
        yield (slice(low - rows.start, high - rows.start),), values[(slice(None), *slices(rest))]


def slices(box: Sequence[range]) -> tuple[slice, ...]:
    """The index of a box."""
    return tuple(slice(indices.start, indices.stop) for indices in box)
