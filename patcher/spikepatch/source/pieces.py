"""Tensors on disk, a piece at a time: read into a buffer that is used again, copied as bytes, tested for NaN.

With plain reads and not with a mapping, whose pages count as this process's memory.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spikepatch.errors import BadSource
from spikepatch.source.header import DTYPES, TensorEntry, torch_dtype
from spikepatch.source.local import opened

if TYPE_CHECKING:
    import torch

#: Elements of a piece; as many as a block of a random fill has, so that none is drawn twice.
PIECE = 1 << 20

#: dtype -> (unsigned integer of its width, exponent bits), all of which are set in NaN and infinity alone.
_EXPONENTS = {
    "F16": ("uint16", 0x7C00), "BF16": ("uint16", 0x7F80), "F32": ("uint32", 0x7F80_0000),
    "F64": ("uint64", 0x7FF0_0000_0000_0000), "C64": ("uint32", 0x7F80_0000),
}  # fmt: skip

#: The system or the two filesystems have no copy inside the kernel.
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


def open_tensor(entry: TensorEntry) -> FileIO:
    """``open_to_read`` for the file that a tensor lies in, once it is there."""
    entry.wait()
    return open_to_read(entry.file)


def open_to_read(path: Path) -> FileIO:
    """A file of the source, without a buffer of its own.

    Raises:
        BadSource: it is gone, or may not be read.
    """
    try:
        return cast("FileIO", opened(path).detach())
    except OSError as error:
        raise _unreadable(path, error) from error


def read_into(handle: int, position: int, target: memoryview, path: Path) -> None:
    """Fill ``target`` from an open file.

    Raises:
        BadSource: the file ends before that, or the disk cannot be read.
    """
    while len(target):
        try:
            count = os.preadv(handle, [target], position)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not count:
            raise changed(path, f"it ends at byte {position}")
        target, position = target[count:], position + count


def write_all(handle: int, position: int, data: memoryview) -> None:
    """Write ``data`` into an open file, at ``position``."""
    while len(data):
        count = os.pwrite(handle, data, position)
        data, position = data[count:], position + count


def copy(source: int, begin: int, out: int, position: int, buffer: memoryview, path: Path) -> None:
    """Copy as many bytes as ``buffer`` has room for; inside the kernel where it can, else through ``buffer``."""
    done = 0
    try:
        while sys.platform == "linux" and done < len(buffer):
            count = os.copy_file_range(source, out, len(buffer) - done, begin + done, position + done)
            if not count:
                break  # the end of the file, or a filesystem without real sizes: the read below knows
            done += count
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    if done < len(buffer):
        rest = buffer[done:]
        read_into(source, begin + done, rest, path)
        write_all(out, position + done, rest)


def nonfinite(raw: memoryview, dtype: str) -> int:
    """How many floats of ``raw`` are NaN or infinite, by their bits; complex ones count by part."""
    import numpy as np

    if dtype not in _EXPONENTS or not len(raw):
        return 0
    kind, mask = _EXPONENTS[dtype]
    exponents = np.bitwise_and(np.frombuffer(raw, kind), np.array(mask, kind))
    return int(np.count_nonzero(exponents == mask)) if exponents.max() == mask else 0


def ranges(elements: int) -> Iterator[tuple[int, int]]:
    """The pieces of a tensor: from and to which element."""
    for start in range(0, elements, PIECE):
        yield start, min(start + PIECE, elements)


def raw_pieces(entry: TensorEntry) -> Iterator[memoryview]:
    """A tensor's bytes in order; every piece lies in the same memory."""
    import numpy as np

    size = DTYPES[entry.dtype][1]
    buffer = np.empty(min(entry.elements, PIECE) * size, np.uint8).data
    with open_tensor(entry) as file:
        for start, stop in ranges(entry.elements):
            raw = buffer[: (stop - start) * size]
            read_into(file.fileno(), entry.begin + start * size, raw, entry.file)
            yield raw


def pieces(entry: TensorEntry) -> Iterator[torch.Tensor]:
    """A tensor's elements in order, flat; every piece lies in the same memory."""
    import torch

    dtype = torch_dtype(entry.dtype)
    return (torch.frombuffer(raw, dtype=dtype) for raw in raw_pieces(entry))


def loaded_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same of a tensor in memory, on whatever device; of a sharded one (DTensor), gathered."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    flat = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).flatten()
    return (flat[start:stop].cpu() for start, stop in ranges(flat.numel()))


def changed(path: Path, how: str) -> BadSource:
    """The error for a file that was written to while it was read."""
    return BadSource(
        "has changed while it was read",
        where=str(path),
        why=f"{how}, other than when its header was checked",
        remedy="run again while nothing writes to the source",
    )


def _unreadable(path: Path, error: OSError) -> BadSource:
    return BadSource(
        "cannot be read",
        where=str(path),
        why=error.strerror or str(error),
        remedy="check the disk and the file's permissions; or download it again",
    )
