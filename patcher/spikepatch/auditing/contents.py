"""What an audit needs to know of one tensor, from one reading of it in blocks of rows.

Every element is looked at by its bits: NaN, infinity, the largest of each row. Copies are found by the signs of the
first 64 elements of each row and column. Moments, and the largest of each column, come from whole rows spread evenly
over the tensor, at least eight and about 130,000 elements: by those a std is known to 0.2 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spikepatch.source.header import DTYPES, TensorEntry, torch_dtype
from spikepatch.source.pieces import open_tensor, read_into

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Elements that the moments are taken of, at most about twice as many.
_SAMPLE = 1 << 17
#: Elements of a block that is read at a time.
_BLOCK = 1 << 20
#: Elements whose signs tell a row, a column or a tensor from all others.
_SIGNS = 64
#: Fewer than that many signs could agree by chance; shorter rows are compared as they are.
_ENOUGH = 48
#: dtype -> (integer of its width, all bits but the sign, bits of an infinite value).
_BITS = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}

#: Rows and columns of independent draws differ by 1, in units of their sampling error; of trained matrices by more.
LEARNED_SPREAD = 1.6


@dataclass(frozen=True)
class Repeat:
    """Rows (axis 0) or columns (axis 1) that are copies of those ``shift`` before; ``share`` of all of them."""

    axis: int
    shift: int
    share: float


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
    columns = tensor.shape[-1] if tensor.ndim else 1
    rows = tensor.reshape(-1, columns) if tensor.numel() else tensor.new_zeros(0, max(columns, 1))
    step = max(1, _BLOCK // max(columns, 1))
    return measure((rows[i : i + step].cpu() for i in range(0, len(rows), step)), tuple(tensor.shape), tensor.dtype)


def of_entry(entry: TensorEntry) -> Contents:
    """Of a tensor on disk, a block at a time."""
    return measure(_blocks(entry), entry.shape, torch_dtype(entry.dtype))


def _blocks(entry: TensorEntry) -> Iterator[torch.Tensor]:
    """Whole rows, in memory that every block shares."""
    columns = entry.shape[-1] if entry.shape else 1
    rows, size = entry.elements // max(columns, 1), DTYPES[entry.dtype][1] * columns
    step = max(1, _BLOCK // max(columns, 1))
    buffer = np.empty(min(rows, step) * size, np.uint8).data
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
    sample: list[torch.Tensor] = []
    row_bits: list[torch.Tensor] = []
    scratch = torch.empty(0, columns, dtype=integer)  # memory that every block shares
    heads: list[NDArray[np.uint8]] = []
    top: list[torch.Tensor] = []
    bad: list[int] = []
    nonfinite = seen = 0
    for given in blocks:
        block = given
        if len(scratch) < len(block):
            scratch = torch.empty(block.shape, dtype=integer)
        bits = torch.bitwise_and(block.view(integer), mask, out=scratch[: len(block)])
        largest = bits.amax(1)
        if len(bits) and int(largest.max()) >= infinite:
            wrong = bits >= infinite
            nonfinite += int(wrong.sum())
            bad += [seen + int(i) for i in wrong.any(1).nonzero()[:1000]]
            bits = bits.masked_fill(wrong, 0)
            largest = bits.amax(1)
            block = block.masked_fill(wrong, 0)
        row_bits.append(largest)
        sample.append(block[-seen % stride :: stride].double())
        heads.append(_signs(block[:, :_SIGNS]))
        if seen < _SIGNS:
            top.append(block[: _SIGNS - seen].clone())
        seen += len(block)
    row_largest = _values(row_bits, dtype)
    values = torch.cat(sample) if sample else torch.zeros(0, columns, dtype=torch.float64)
    column_largest = values.abs().amax(0).numpy() if len(values) else np.zeros(columns)
    first = torch.cat(top) if top else torch.zeros(0, columns, dtype=dtype)
    mean, std, kurtosis = _moments(values)
    return Contents(
        shape=shape,
        elements=elements,
        nonfinite=nonfinite,
        where=_where(bad, rows),
        largest=float(row_largest.max(initial=0.0)),
        mean=mean,
        std=std,
        kurtosis=kurtosis,
        sampled=values.numel(),
        zero_rows=int((row_largest == 0).sum()),
        zero_columns=int((column_largest == 0).sum()),
        weak_rows=_weak(row_largest),
        weak_columns=_weak(column_largest),
        strong_rows=_strong(row_largest),
        row_spread=_spread(values, kurtosis, 1),
        column_spread=_spread(values, kurtosis, 0),
        edges=(float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0),
        repeat=_repeat(np.concatenate(heads), row_largest, 0) or _repeat(_signs(first.T), column_largest, 1)
        if heads
        else None,
        prefix=_prefix(first),
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
        edges=(min(p.edges[0] for p in parts), max(p.edges[1] for p in parts)),
        repeat=Repeat(0, parts[0].rows, copies / len(parts)) if copies else next((p.repeat for p in parts), None),
        prefix=parts[0].prefix,
    )


def _values(bits: list[torch.Tensor], dtype: torch.dtype) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (torch.cat(bits) if bits else torch.zeros(0)).view(dtype).double().numpy()
    return found


def _moments(values: torch.Tensor) -> tuple[float, float, float]:
    if not values.numel():
        return 0.0, 0.0, 0.0
    mean = float(values.mean())
    centred = values - mean
    largest = float(centred.abs().max())
    if largest == 0:
        return mean, 0.0, 0.0
    squares = (centred / largest).square_()  # the fourth power of a small number is none
    second, fourth = float(squares.mean()), float(squares.square().mean())
    return mean, math.sqrt(second) * largest, fourth / second**2


def _where(rows: list[int], count: int) -> str:
    if not rows or count < 2:
        return "" if not rows else "the vector"
    return f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows from {rows[0]} on"


def _weak(largest: NDArray[np.float64]) -> int:
    alive = largest[largest > 0]
    return int((alive < np.median(alive) / 50).sum()) if len(alive) else 0


def _strong(largest: NDArray[np.float64]) -> int:
    alive = largest[largest > 0]
    return int((alive > 30 * np.median(alive)).sum()) if len(alive) else 0


def _spread(values: torch.Tensor, kurtosis: float, axis: int) -> float:
    """Of the stds along ``axis``, by their median deviation: one odd row does not count."""
    length = values.shape[axis]
    if values.ndim < 2 or length < 8 or values.shape[1 - axis] < 8 or kurtosis <= 1:
        return 1.0
    stds = values.square().mean(axis).sqrt()
    middle = stds.median()
    if not middle:
        return 1.0
    deviation = float((stds - middle).abs().median() / middle) * 1.4826
    return deviation / math.sqrt((kurtosis - 1) / (4 * length))


def _signs(block: torch.Tensor) -> NDArray[np.uint8]:
    """(n, up to 64) -> n rows of bytes that tell one from another: signs, or of short rows the values."""
    if block.shape[1] >= _ENOUGH:
        return np.packbits((block.contiguous() > 0).numpy(), axis=1)
    plain: NDArray[np.uint8] = block.contiguous().flatten().view(torch.uint8).numpy()
    return plain.reshape(len(block), -1) if plain.size else np.zeros((len(block), 1), np.uint8)


def _repeat(keys: NDArray[np.uint8], largest: NDArray[np.float64], axis: int) -> Repeat | None:
    """Rows whose keys are equal, at the distance that most of them have; those without values are no copies."""
    count = len(keys)
    if count < 2:
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


def _prefix(first: torch.Tensor) -> int | None:
    flat = first.flatten()[:_SIGNS]
    if len(flat) < _SIGNS:
        return None
    signs = int.from_bytes(np.packbits((flat > 0).numpy()).tobytes(), "big")
    return signs if 0 < signs < (1 << _SIGNS) - 1 else None
