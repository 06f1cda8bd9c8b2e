"""Pieces of a file, written by several threads in any order, and read back in the order of the file.

Workers copy, cast or compute a piece, write it in its place, and read back what the file holds then. The calling thread
takes the pieces in order, to hash them. So the memory is a few pieces, whatever the model's size, and what is hashed,
counted and tested is what was written.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from spikepatch.source.header import TensorEntry, dtype_code, torch_dtype
from spikepatch.source.pieces import PIECE, copy, nonfinite, read_into, write_all

if TYPE_CHECKING:
    import torch

    #: What a tensor is to hold: a tensor on disk, one in memory, or a function that computes its elements start to
    #: stop (row-major, flat) and is called by several threads. Values are cast to the planned dtype, once.
    Content = TensorEntry | torch.Tensor | Callable[[int, int], torch.Tensor]

#: Elements of a piece that are counted at a time.
_PART = 1 << 16

_OUTPUT = Path("the file that was written")


class Tally(NamedTuple):
    """Counts of one tensor, as it was read back.

    Attributes:
        nonfinite: NaN and infinite elements.
        overflow: of these, those that the cast made.
        underflow: elements of a tensor on disk that the cast made 0.
        total, squares: sums of the elements and of their squares, where they were computed piece by piece.
    """

    nonfinite: int = 0
    overflow: int = 0
    underflow: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, other: Tally) -> Tally:
        return Tally(
            self.nonfinite + other.nonfinite,
            self.overflow + other.overflow,
            self.underflow + other.underflow,
            self.total + other.total,
            self.squares + other.squares,
        )


@dataclass(frozen=True)
class Job:
    """Elements ``start`` to ``stop`` of ``content``, for ``position`` in the open file ``out``.

    Attributes:
        content: flat, where it is in memory; bytes for a header, which has no dtype.
        name, dtype: of the tensor; values are cast to the dtype.
        source: the open file of a tensor on disk.
    """

    out: int
    position: int
    content: bytes | Content
    start: int
    stop: int
    name: str = ""
    dtype: torch.dtype | None = None
    source: int = -1

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * (1 if self.dtype is None else self.dtype.itemsize)


def threads() -> int:
    """How many compute at a time; the bits do not depend on it. More than a few only wait for the one that hashes."""
    return min(os.cpu_count() or 1, 8)


def in_order(pool: ThreadPoolExecutor, jobs: Iterator[Job]) -> Generator[tuple[Job, Tally, memoryview], None, None]:
    """Do ``jobs`` in parallel; each with its counts and with its bytes, read back, in the order of the jobs."""
    import numpy as np

    spare = [np.empty(PIECE * 8, np.uint8).data for _ in range(threads() + 3)]
    pending: deque[tuple[Job, memoryview, Future[Tally]]] = deque()
    try:
        while True:
            job = next(jobs, None) if spare else None
            if job is not None:
                buffer = spare.pop()
                pending.append((job, buffer, pool.submit(_do, job, buffer[: job.bytes])))
            elif pending:
                job, buffer, future = pending[0]  # in the queue until it is done: a signal may end the waiting
                tally = future.result()
                pending.popleft()
                yield job, tally, buffer[: job.bytes]
                spare.append(buffer)
            else:
                return
    finally:
        wait([future for _, _, future in pending])


def _do(job: Job, raw: memoryview) -> Tally:
    """Write a piece, and read it back into ``raw``."""
    import torch

    if job.dtype is None:
        assert isinstance(job.content, bytes)
        raw[:] = job.content[job.start : job.stop]
        write_all(job.out, job.position, raw)
        read_into(job.out, job.position, raw, _OUTPUT)
        return Tally()
    code = dtype_code(job.dtype)
    if isinstance(job.content, TensorEntry) and job.content.dtype == code:
        begin = job.content.begin + job.start * job.dtype.itemsize
        copy(job.source, begin, job.out, job.position, raw, job.content.file)
        read_into(job.out, job.position, raw, _OUTPUT)
        return Tally(nonfinite(raw, code))
    value, target = _value(job), torch.frombuffer(raw, dtype=job.dtype)
    assert value.shape == target.shape, job.name
    target.copy_(value)
    learned, computed = isinstance(job.content, TensorEntry), callable(job.content)
    underflow = int(value.count_nonzero() - target.count_nonzero()) if learned else 0
    write_all(job.out, job.position, raw)
    read_into(job.out, job.position, raw, _OUTPUT)
    found = nonfinite(raw, code)
    before = nonfinite(value.view(torch.uint8).numpy().data, dtype_code(value.dtype)) if found else 0
    return Tally(found, found - before, underflow, *(_moments(target) if computed else ()))


def _value(job: Job) -> torch.Tensor:
    """The piece in the dtype that it is read or computed in, flat and contiguous."""
    import numpy as np
    import torch

    match job.content:
        case TensorEntry(dtype=code, begin=begin, file=path):
            dtype = torch_dtype(code)
            raw = np.empty((job.stop - job.start) * dtype.itemsize, np.uint8).data
            read_into(job.source, begin + job.start * dtype.itemsize, raw, path)
            return torch.frombuffer(raw, dtype=dtype)
        case torch.Tensor() as whole:
            return whole[job.start : job.stop]
        case compute:
            assert callable(compute)
            return compute(job.start, job.stop)


def _moments(values: torch.Tensor) -> tuple[float, float]:
    """Sums of the values and of their squares: in float32 over parts that stay in the cache, then in float64."""
    total = squares = 0.0
    for start in range(0, len(values), _PART):
        wide = values[start : start + _PART].float()
        total += float(wide.sum())
        squares += float(wide.square().sum())  # a dot product does not sum pairwise
    return total, squares


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads for ``in_order``. torch's operations run in the thread that calls them meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads() + 1) as pool:  # one more, since a sync only waits
            yield pool
    finally:
        torch.set_num_threads(before)
