"""Safetensors files, written a piece at a time by several threads; every byte is read back, hashed and tested.

Workers copy, cast or compute pieces and write them in place, in any order. The calling thread takes the pieces in the
order of the file, as they are read back, and hashes them. So the memory is a few pieces, whatever the model's size, and
the hash is of what the file holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from spikepatch.storage.formats import INDEX_FILE
from spikepatch.storage.header import DTYPES, TensorEntry
from spikepatch.storage.pieces import PIECE, copy, nonfinite, open_to_read, ranges, read_into, write_all

if TYPE_CHECKING:
    import torch

    #: What a tensor is to hold: a tensor on disk, one in memory, or a function that computes its elements start to
    #: stop (row-major, flat) and is called by several threads. Values are cast to the planned dtype, once.
    Content = TensorEntry | torch.Tensor | Callable[[int, int], torch.Tensor]

_OUTPUT = Path("the file that was written")

#: Within a file safetensors sorts by dtype, so that tensors are aligned, and then by name.
_ORDER = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: ``dtype`` is a torch dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


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
class Written:
    """What was written.

    Attributes:
        hashes: file name -> SHA-256 of its bytes, in hexadecimal.
        tallies: tensor name -> its counts.
        copies: file of the source, of which a file is the byte-for-byte copy -> its SHA-256.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    copies: dict[Path, str] = field(default_factory=dict)


def split(tensors: Sequence[Planned], max_shard_size: str | int) -> dict[str, list[str]]:
    """File name -> tensor names, distributed and called as transformers does it; a single file where all fit."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors}
    found = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    return {file: list(names) for file, names in found.filename_to_tensors.items()}


def write_checkpoint(
    folder: Path,
    tensors: Sequence[Planned],
    files: Mapping[str, Sequence[str]],
    content: Callable[[str], Content],
    advance: Callable[[int], None],
) -> Written:
    """Write every file of ``files`` to the disk, then the index where there are several.

    Args:
        content: tensor name -> what it is to hold; called in this thread, when the tensor's turn comes.
        advance: told the bytes of each piece once it has been hashed.

    Raises:
        BadSource: a file of the source became shorter, or cannot be read.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    written = Written()
    with _one_thread_per_operation(), ThreadPoolExecutor(threads() + 1) as workers:  # one more: a sync only waits
        syncs = []
        for file, names in files.items():
            _write_shard(folder / file, [by_name[name] for name in names], content, advance, workers, written)
            syncs.append(workers.submit(sync, folder / file))
        for result in syncs:
            result.result()
    if len(files) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(t.elements for t in tensors),
                "total_size": sum(t.bytes for t in tensors),
            },
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        written.hashes[INDEX_FILE] = write_text(folder / INDEX_FILE, text)
    return written


def write_text(path: Path, text: str) -> str:
    """Write a UTF-8 file and return its SHA-256."""
    data = text.encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def threads() -> int:
    """How many compute at a time; the bits do not depend on it. More than a few only wait for the one that hashes."""
    return min(os.cpu_count() or 1, 8)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Job:
    """Elements ``start`` to ``stop`` of ``content``, for ``position`` in the open file ``out``.

    ``tensor`` is None for the header, whose elements are bytes; ``source`` is the open file of a TensorEntry.
    """

    out: int
    position: int
    content: bytes | Content
    start: int
    stop: int
    tensor: Planned | None = None
    source: int = -1

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * (1 if self.tensor is None else self.tensor.dtype.itemsize)


def _write_shard(
    path: Path,
    tensors: list[Planned],
    content: Callable[[str], Content],
    advance: Callable[[int], None],
    workers: ThreadPoolExecutor,
    written: Written,
) -> None:
    import torch

    head, places = _header(tensors)
    contents: dict[str, Content] = {}
    digest = hashlib.sha256()
    with contextlib.ExitStack() as handles:
        out = handles.enter_context(open(path, "w+b", buffering=0)).fileno()
        sources: dict[Path, int] = {}

        def jobs() -> Iterator[_Job]:
            for start, stop in ranges(len(head)):
                yield _Job(out, start, head, start, stop)
            for tensor in places:
                value = contents[tensor.name] = content(tensor.name)
                source = -1
                if isinstance(value, torch.Tensor):
                    assert value.shape == tensor.shape, tensor
                    value = value.contiguous().reshape(-1)
                if isinstance(value, TensorEntry):
                    if value.file not in sources:
                        sources[value.file] = handles.enter_context(open_to_read(value.file)).fileno()
                    source = sources[value.file]
                for start, stop in ranges(tensor.elements):
                    position = places[tensor] + start * tensor.dtype.itemsize
                    yield _Job(out, position, value, start, stop, tensor, source)

        with contextlib.closing(_in_order(workers, jobs())) as done:
            for job, tally, raw in done:
                digest.update(raw)
                if job.tensor is not None:
                    name = job.tensor.name
                    written.tallies[name] = written.tallies.get(name, Tally()).plus(tally)
                    advance(len(raw))
    written.hashes[path.name] = digest.hexdigest()
    if (original := _original(head, places, contents)) is not None:
        written.copies[original] = digest.hexdigest()


def _header(tensors: Sequence[Planned]) -> tuple[bytes, dict[Planned, int]]:
    """The first bytes of a file, and where in it each tensor begins, in the order of the bytes."""
    tensors = sorted(tensors, key=lambda t: (_ORDER.index(_code(t.dtype)), t.name))
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[Planned, int] = {}
    end = 0
    for tensor in tensors:
        places[tensor] = end
        end += tensor.bytes
        fields[tensor.name] = {
            "dtype": _code(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [places[tensor], end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {tensor: len(head) + begin for tensor, begin in places.items()}


def _code(dtype: torch.dtype) -> str:
    return next(code for code, (name, _) in DTYPES.items() if f"torch.{name}" == str(dtype))


def _original(head: bytes, places: Mapping[Planned, int], contents: Mapping[str, Content]) -> Path | None:
    """The file of the source that the file with this header and these contents is a copy of."""
    files = set()
    for tensor, begin in places.items():
        entry = contents[tensor.name]
        if not isinstance(entry, TensorEntry) or (entry.dtype, entry.begin) != (_code(tensor.dtype), begin):
            return None
        files.add(entry.file)
    if len(files) != 1:
        return None
    (path,) = files
    with open(path, "rb") as file:
        return path if file.read(len(head)) == head else None


def _in_order(
    workers: ThreadPoolExecutor, jobs: Iterator[_Job]
) -> Generator[tuple[_Job, Tally, memoryview], None, None]:
    """Do ``jobs`` in parallel; each with its counts and with its bytes, read back, in the order of the jobs."""
    import numpy as np

    spare = [np.empty(PIECE * 8, np.uint8).data for _ in range(threads() + 3)]
    pending: deque[tuple[_Job, memoryview, Future[Tally]]] = deque()
    try:
        while True:
            job = next(jobs, None) if spare else None
            if job is not None:
                buffer = spare.pop()
                pending.append((job, buffer, workers.submit(_do, job, buffer[: job.bytes])))
            elif pending:
                job, buffer, future = pending.popleft()
                yield job, future.result(), buffer[: job.bytes]
                spare.append(buffer)
            else:
                return
    finally:
        wait([future for _, _, future in pending])


def _do(job: _Job, raw: memoryview) -> Tally:
    """Write a piece, and read it back into ``raw``."""
    import torch

    if job.tensor is None:
        assert isinstance(job.content, bytes)
        raw[:] = job.content[job.start : job.stop]
        write_all(job.out, job.position, raw)
        read_into(job.out, job.position, raw, _OUTPUT)
        return Tally()
    code = _code(job.tensor.dtype)
    if isinstance(job.content, TensorEntry) and job.content.dtype == code:
        begin = job.content.begin + job.start * job.tensor.dtype.itemsize
        copy(job.source, begin, job.out, job.position, raw, job.content.file)
        read_into(job.out, job.position, raw, _OUTPUT)
        return Tally(nonfinite(raw, code))
    value, target = _value(job), torch.frombuffer(raw, dtype=job.tensor.dtype)
    assert value.shape == target.shape, job.tensor
    target.copy_(value)
    learned, computed = isinstance(job.content, TensorEntry), callable(job.content)
    underflow = int(value.count_nonzero() - target.count_nonzero()) if learned else 0
    write_all(job.out, job.position, raw)
    read_into(job.out, job.position, raw, _OUTPUT)
    found = nonfinite(raw, code)
    before = nonfinite(value.view(torch.uint8).numpy().data, _code(value.dtype)) if found else 0
    return Tally(found, found - before, underflow, *(_moments(target) if computed else ()))


def _value(job: _Job) -> torch.Tensor:
    """The piece in the dtype that it is read or computed in, flat and contiguous."""
    import numpy as np
    import torch

    match job.content:
        case TensorEntry(dtype=code, begin=begin, file=path):
            name, size = DTYPES[code]
            raw = np.empty((job.stop - job.start) * size, np.uint8).data
            read_into(job.source, begin + job.start * size, raw, path)
            return torch.frombuffer(raw, dtype=getattr(torch, name))
        case torch.Tensor() as whole:
            return whole[job.start : job.stop]
        case compute:
            assert callable(compute)
            return compute(job.start, job.stop)


def _moments(values: torch.Tensor) -> tuple[float, float]:
    wide = values.float()
    return float(wide.sum()), float(wide.square().sum())


@contextlib.contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """torch's operations run in the thread that calls them: the workers are the threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
