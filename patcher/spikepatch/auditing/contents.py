"""What an audit needs to know of one tensor, from one reading of it in blocks of rows.

The largest value is that of every element, by two passes over the bits of a block; NaN and infinity are larger than any
other. Rows that are unlike the rest show in the largest value of a block, or in their first 64 elements, and are then
looked at whole. Copies are found by the signs of the first 64 elements of each row and column. Moments, and the largest
of each column, come from whole rows spread evenly over the tensor, at least eight and about 130,000 elements, in
float32: by those a std is known to 0.2 %.

No operation of torch is run on a block: its threads would wait for each other longer than such a block takes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spikepatch.auditing.moments import largest_bits, largest_bits_of_rows, moments_of, odd_rows
from spikepatch.auditing.repeats import SIGNS, Repeat, prefix_of, repeat_of, signs_of, signs_of_columns
from spikepatch.source.header import DTYPES, TensorEntry, torch_dtype
from spikepatch.source.pieces import open_tensor, read_into

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Elements that the moments are taken of, at most about twice as many.
_SAMPLE = 1 << 17
#: Bytes of a block that is read at a time, and of a page of memory.
_BLOCK, _PAGE = 1 << 22, 1 << 12
_memory = threading.local()
#: dtype -> (integer of its width, all bits but the sign, bits of an infinite value).
_BITS = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}

#: Rows and columns of independent draws differ by 1, in units of their sampling error; of trained matrices by more.
LEARNED_SPREAD = 1.6

#: The same of a model whose gains have been trained too. A tied qwen3 of width 96, patched, has a median of 1.01 when
#: it is fresh, 1.18 after 40 steps, 1.3 after 100 and 1.6 after 400.
WITH_GAINS = 1.15


@dataclass(frozen=True)
class Contents:
    """One tensor, seen as rows along its last axis. A vector is one row.

    Attributes:
        shape: of the tensor.
        elements: how many it has.
        nonfinite: how many are NaN or infinite; ``where`` says in which rows.
        largest: the largest finite absolute value.
        mean, std, kurtosis: of the sample, in float64; kurtosis is 3 for a normal and 1.8 for a uniform distribution.
        sampled: size of the sample.
        zero_rows, zero_columns: how many are nothing but zeros.
            Columns are those of the sample.
        weak_rows, weak_columns: how many others have no value of a fiftieth of what the median one has.
        strong_rows: how many have one of thirty times that.
        row_spread, column_spread: how much the stds of rows and columns differ, over what independent draws would: 1
            for any matrix that was drawn, above it for one that has learned.
        uneven: the std of one half or third of its rows or columns over that of another.
        edges: the least and the largest value of the sample.
        repeat: the longest run of copies, if there is any.
        prefix: by the signs of its first elements: equal for two tensors drawn from one seed; None for too few.
    """

    shape: tuple[int, ...]
    elements: int
    nonfinite: int
    where: str
    largest: float
    mean: float
    std: float
    kurtosis: float
    sampled: int
    zero_rows: int
    zero_columns: int
    weak_rows: int
    weak_columns: int
    strong_rows: int
    row_spread: float
    column_spread: float
    uneven: float
    edges: tuple[float, float]
    repeat: Repeat | None
    prefix: int | None

    @property
    def error(self) -> float:
        """Standard error of ``std``, relative: sqrt((kurtosis - 1) / 4n)."""
        return math.sqrt(max(self.kurtosis - 1, 0.0) / (4 * max(self.sampled, 1)))

    @property
    def rows(self) -> int:
        """Of the matrix that its last axis makes of it."""
        return self.elements // max(self.columns, 1)

    @property
    def columns(self) -> int:
        """Length of the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def is_constant(self) -> bool:
        """All sampled elements are equal."""
        return self.edges[0] == self.edges[1]

    @property
    def is_drawn(self) -> bool:
        """Rows and columns differ as those of independent draws do: neither trained, nor computed (sinusoids)."""
        return all(0.25 < spread < LEARNED_SPREAD for spread in (self.row_spread, self.column_spread))

    @property
    def is_zero(self) -> bool:
        """All elements are."""
        return self.largest == 0 and not self.nonfinite


def of_tensor(tensor: torch.Tensor) -> Contents:
    """Of a tensor in memory, on any device; of a sharded one (DTensor), gathered."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    tensor = tensor if tensor.dtype in _BITS else tensor.float()
    columns = tensor.shape[-1] if tensor.ndim else 1
    rows = tensor.reshape(-1, columns) if tensor.numel() else tensor.new_zeros(0, max(columns, 1))
    step = _rows_of_a_block(columns, tensor.element_size())
    return measure((rows[i : i + step].cpu() for i in range(0, len(rows), step)), tuple(tensor.shape), tensor.dtype)


def of_entry(entry: TensorEntry) -> Contents:
    """Of a tensor on disk, a block at a time."""
    return measure(_blocks(entry), entry.shape, torch_dtype(entry.dtype))


def _rows_of_a_block(columns: int, size: int) -> int:
    return max(1, _BLOCK // max(columns * size, 1))


def _buffer(size: int) -> memoryview:
    """The thread's own, of every tensor. It begins with a page: passes over it are twice as fast."""
    memory: NDArray[np.uint8] = getattr(_memory, "bytes", np.empty(0, np.uint8))
    if len(memory) < size + _PAGE:
        memory = _memory.bytes = np.empty(size + _PAGE, np.uint8)
    start = -memory.ctypes.data % _PAGE
    return memory[start : start + size].data


def _blocks(entry: TensorEntry) -> Iterator[torch.Tensor]:
    """Whole rows, in memory that every block shares."""
    columns = entry.shape[-1] if entry.shape else 1
    rows, size = entry.elements // max(columns, 1), DTYPES[entry.dtype][1] * columns
    step = _rows_of_a_block(columns, DTYPES[entry.dtype][1])
    buffer = _buffer(min(rows, step) * size)
    with open_tensor(entry) as file:
        for start in range(0, rows, step):
            raw = buffer[: (min(rows, start + step) - start) * size]
            read_into(file.fileno(), entry.begin + start * size, raw, entry.file)
            yield torch.frombuffer(raw, dtype=torch_dtype(entry.dtype)).reshape(-1, columns)


def measure(blocks: Iterable[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Contents:
    """Of a float tensor, given as blocks of its rows in order, each (rows, columns)."""
    elements = math.prod(shape)
    columns = shape[-1] if shape else 1
    rows = elements // max(columns, 1)
    stride = max(1, min(elements // _SAMPLE, rows // 8))
    integer, mask, infinite = _BITS[dtype]
    sample: list[NDArray[Any]] = []
    row_bits: list[NDArray[Any]] = []
    heads: list[NDArray[np.uint8]] = []
    top: list[NDArray[Any]] = []
    bad: list[int] = []
    largest = nonfinite = seen = 0
    for given in blocks:
        bits: NDArray[Any] = given.contiguous().view(integer).numpy()
        highest = largest_bits(bits.reshape(-1), mask)
        if highest >= infinite:
            wrong = bits & mask >= infinite
            nonfinite += int(wrong.sum())
            bad += [seen + int(i) for i in np.flatnonzero(wrong.any(1))[:1000]]
            bits = np.where(wrong, 0, bits).astype(bits.dtype)
            highest = largest_bits(bits.reshape(-1), mask)
        largest = max(largest, highest)
        head = np.ascontiguousarray(bits[:, :SIGNS])
        heads.append(signs_of(head))
        row_bits.append(largest_bits_of_rows(bits, head, highest, mask, infinite & -infinite))
        sample.append(_values(bits[-seen % stride :: stride], dtype))
        if seen < SIGNS:
            top.append(bits[: SIGNS - seen].copy())
        seen += len(bits)
    row_largest = np.concatenate(row_bits) if row_bits else np.zeros(0, np.int16)
    values = np.concatenate(sample) if sample else np.zeros((0, columns), np.float32)
    first = np.concatenate(top) if top else np.zeros((0, columns), np.int16)
    moments = moments_of(values)
    (weak_rows, strong_rows), (weak_columns, _) = (
        odd_rows(_values(row_largest, dtype)),
        odd_rows(moments.column_largest),
    )
    return Contents(
        shape=shape,
        elements=elements,
        nonfinite=nonfinite,
        where=_where(bad, rows),
        largest=float(_values(np.array([largest], row_largest.dtype), dtype)[0]),
        mean=moments.mean,
        std=moments.std,
        kurtosis=moments.kurtosis,
        sampled=values.size,
        zero_rows=int((row_largest == 0).sum()),
        zero_columns=int((moments.column_largest == 0).sum()),
        weak_rows=weak_rows,
        weak_columns=weak_columns,
        strong_rows=strong_rows,
        row_spread=moments.row_spread,
        column_spread=moments.column_spread,
        uneven=moments.uneven,
        edges=moments.edges,
        repeat=repeat_of(np.concatenate(heads), row_largest, 0)
        or repeat_of(signs_of_columns(first), moments.column_largest, 1)
        if heads
        else None,
        prefix=prefix_of(first),
    )


def merged(parts: Sequence[Contents], shape: tuple[int, ...]) -> Contents:
    """Of a tensor that is stored in parts, such as one for each expert."""
    if len(parts) == 1 and parts[0].shape == shape:
        return parts[0]
    count = sum(p.sampled for p in parts)
    mean = sum(p.mean * p.sampled for p in parts) / count
    square = sum((p.std**2 + (p.mean - mean) ** 2) * p.sampled for p in parts) / count
    fourth = sum(p.kurtosis * p.std**4 * p.sampled for p in parts) / count
    prefixes = [p.prefix for p in parts if p.prefix is not None]
    copies = len(prefixes) - len(set(prefixes))
    bad = next((p for p in parts if p.nonfinite), None)
    return Contents(
        shape=shape,
        elements=math.prod(shape),
        nonfinite=sum(p.nonfinite for p in parts),
        where=f"part {parts.index(bad)}, {bad.where}" if bad is not None else "",
        largest=max(p.largest for p in parts),
        mean=mean,
        std=math.sqrt(square),
        kurtosis=fourth / square**2 if square else 0.0,
        sampled=count,
        zero_rows=sum(p.zero_rows for p in parts),
        zero_columns=min(p.zero_columns for p in parts),
        weak_rows=sum(p.weak_rows for p in parts),
        weak_columns=min(p.weak_columns for p in parts),
        strong_rows=sum(p.strong_rows for p in parts),
        row_spread=float(np.median([p.row_spread for p in parts])),
        column_spread=float(np.median([p.column_spread for p in parts])),
        uneven=max(p.uneven for p in parts),
        edges=(min(p.edges[0] for p in parts), max(p.edges[1] for p in parts)),
        repeat=Repeat(0, parts[0].rows, copies / len(parts)) if copies else next((p.repeat for p in parts), None),
        prefix=parts[0].prefix,
    )


def _values(bits: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    """A new array of float32; of float64 where the bits are that."""
    if dtype == torch.bfloat16:
        wide: NDArray[Any] = bits.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    plain: NDArray[Any] = np.ascontiguousarray(bits).view(f"f{bits.itemsize}")
    return plain.astype(np.float64 if dtype == torch.float64 else np.float32)


def _where(rows: list[int], count: int) -> str:
    if not rows or count < 2:
        return "" if not rows else "the vector"
    return f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows from {rows[0]} on"
