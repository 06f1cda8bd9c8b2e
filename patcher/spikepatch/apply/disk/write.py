"""Safetensors files and their index, written as a stream and hashed; see ``stream`` for how."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from spikepatch.apply.disk.atomic import sync
from spikepatch.apply.disk.pipeline import Job, Tally, in_order, workers
from spikepatch.errors import Refused, did_you_mean
from spikepatch.source.formats import INDEX_FILE, STORED
from spikepatch.source.header import TensorEntry, dtype_code
from spikepatch.source.pieces import open_tensor, open_to_read, ranges

if TYPE_CHECKING:
    import torch

    from spikepatch.apply.disk.pipeline import Content

#: Bytes after which the disk is told to go on, while the next ones are computed.
_FLUSH = 128 << 20

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


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        hashes: file name -> SHA-256 of its bytes, in hexadecimal.
        tallies: tensor name -> its counts.
        copies: file of the source, of which a file is the byte-for-byte copy -> its SHA-256.
        notes: what the user should know, one sentence each.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    copies: Mapping[Path, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def plus(self, other: Written) -> Written:
        """What both say; they are about different files and tensors."""
        return Written(
            {**self.hashes, **other.hashes},
            {**self.tallies, **other.tallies},
            {**self.copies, **other.copies},
            (*self.notes, *other.notes),
        )


def split(tensors: Sequence[Planned], max_shard_size: str | int) -> dict[str, list[str]]:
    """File name -> tensor names, distributed and called as transformers does it; a single file where all fit."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors}
    found = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    return {file: list(names) for file, names in found.filename_to_tensors.items()}


def check_shard_size(max_shard_size: str | int | None) -> None:
    """Refuse what is no size, or one that nothing fits into."""
    import torch

    try:
        bytes_ = [Planned(name, torch.uint8, (1,)) for name in "ab"]
        if max_shard_size is not None and len(split(bytes_, max_shard_size)) > 1:
            raise ValueError("nothing fits into that")
    except (ValueError, OverflowError) as error:
        raise Refused(
            what=f"{max_shard_size!r} is no shard size",
            where="--max-shard-size",
            why=str(error),
            remedy="a number with a unit, such as 5GB or 500MB",
        ) from error


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``; Refused where weights are not stored in it."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise Refused(
            what=f"{name!r} is no dtype to store weights in",
            where="--dtype",
            why=f"weights are stored as {', '.join(STORED[:-1])} or {STORED[-1]}",
            remedy=did_you_mean(name, STORED, "--dtype bfloat16, or leave it out for the source's own"),
        )
    return dtype


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
    with workers() as pool:
        syncs = []
        for file, names in files.items():
            written = written.plus(
                _write_shard(folder / file, [by_name[name] for name in names], content, advance, pool)
            )
            syncs.append(pool.submit(sync, folder / file))
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
        written = written.plus(Written({INDEX_FILE: write_text(folder / INDEX_FILE, text)}))
    return written


def write_text(path: Path, text: str) -> str:
    """Write a UTF-8 file and return its SHA-256."""
    data = text.encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _write_shard(
    path: Path,
    tensors: list[Planned],
    content: Callable[[str], Content],
    advance: Callable[[int], None],
    pool: ThreadPoolExecutor,
) -> Written:
    import torch

    head, places = _header(tensors)
    originals: dict[str, TensorEntry] = {}
    tallies: dict[str, Tally] = {}
    digest = hashlib.sha256()
    with contextlib.ExitStack() as handles:
        out = handles.enter_context(open(path, "w+b", buffering=0)).fileno()
        sources: dict[Path, int] = {}

        def jobs() -> Iterator[Job]:
            for start, stop in ranges(len(head)):
                yield Job(out, start, head, start, stop)
            for tensor in places:
                value, source = content(tensor.name), -1
                if isinstance(value, torch.Tensor):
                    assert value.shape == tensor.shape, tensor
                    value = value.contiguous().reshape(-1)
                if isinstance(value, TensorEntry):
                    originals[tensor.name] = value
                    if value.file not in sources:
                        sources[value.file] = handles.enter_context(open_tensor(value)).fileno()
                    source = sources[value.file]
                for start, stop in ranges(tensor.elements):
                    position = places[tensor] + start * tensor.dtype.itemsize
                    yield Job(out, position, value, start, stop, tensor.name, tensor.dtype, source)

        behind = 0
        flushes: list[Future[None]] = []
        handles.callback(wait, flushes)  # before the file is closed
        with contextlib.closing(in_order(pool, jobs())) as done:
            for job, tally, raw in done:
                digest.update(raw)
                behind += len(raw)
                if behind >= _FLUSH:  # so that the disk has little left to do when the last byte has been computed
                    flushes.append(pool.submit(os.fsync, out))
                    behind = 0
                if job.dtype is not None:
                    tallies[job.name] = tallies.get(job.name, Tally()).plus(tally)
                    advance(len(raw))
        for flush in flushes:
            flush.result()
    sha256, original = digest.hexdigest(), _original(head, places, originals)
    return Written({path.name: sha256}, tallies, {} if original is None else {original: sha256})


def _header(tensors: Sequence[Planned]) -> tuple[bytes, dict[Planned, int]]:
    """The first bytes of a file, and where in it each tensor begins, in the order of the bytes."""
    tensors = sorted(tensors, key=lambda t: (_ORDER.index(dtype_code(t.dtype)), t.name))
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[Planned, int] = {}
    end = 0
    for tensor in tensors:
        places[tensor] = end
        end += tensor.bytes
        fields[tensor.name] = {
            "dtype": dtype_code(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [places[tensor], end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {tensor: len(head) + begin for tensor, begin in places.items()}


def _original(head: bytes, places: Mapping[Planned, int], entries: Mapping[str, TensorEntry]) -> Path | None:
    """The file of the source that the file with this header, and with copies of these tensors, is a copy of."""
    for tensor, begin in places.items():
        entry = entries.get(tensor.name)
        if entry is None or (entry.dtype, entry.begin) != (dtype_code(tensor.dtype), begin):
            return None
    files = {entry.file for entry in entries.values()}
    if len(files) != 1:
        return None
    (path,) = files
    with open_to_read(path) as file:
        return path if file.read(len(head)) == head else None
