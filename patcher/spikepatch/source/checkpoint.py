"""A checkpoint folder, read without loading it: single file or shards and index, checked, and single tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spikepatch.errors import BadSource
from spikepatch.progress import Progress
from spikepatch.quiet import quiet
from spikepatch.source import hub
from spikepatch.source.arrivals import Arrivals
from spikepatch.source.formats import DOWNLOAD_AGAIN, INDEX_FILE, SINGLE_FILE, check_names, parse_json, recognise, some
from spikepatch.source.header import (
    DEQUANTISE,
    MAX_TENSORS,
    MalformedError,
    TensorEntry,
    read_header,
    torch_dtype,
    unreadable,
)
from spikepatch.source.local import leads_out, read_file
from spikepatch.source.pieces import changed, open_tensor, read_into

if TYPE_CHECKING:
    import torch

_PACKED_INTEGERS = ("I8", "U8", "I32")
_SCALE_WORDS = ("scale", "absmax", "zeros")

#: Headers that are asked of the Hub at a time.
_REQUESTS = 8

_Header = tuple[dict[str, TensorEntry], dict[str, str]]
_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers and index have been checked.

    Attributes:
        shards: file names, in the order in which the index first names them; one for a single file.
        tensors: name -> entry; shard by shard, in the order of their bytes.
        stamps: file -> its size, time of last change and inode, before its header was read; of files that were there.
        arrivals: the files that were not, with their stamps once they are. Reading a tensor waits for its file.
    """

    folder: Path
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]
    stamps: Mapping[Path, _Stamp]
    arrivals: Arrivals


@dataclass(frozen=True)
class _Finding:
    file: str
    problem: str
    remedy: str = DOWNLOAD_AGAIN


def read_checkpoint(folder: Path, snapshot: hub.Snapshot | None = None, report: Progress | None = None) -> Checkpoint:
    """Parse and check the headers and the index of ``folder``; no tensor is read.

    Args:
        snapshot: a folder of the Hub cache may lack files that this has: of these the headers are fetched, and the rest
            when it is needed.
        report: told how far a file is that is waited for.

    Raises:
        BadSource: lists everything that is wrong with the folder; or the Hub cannot be reached.
    """
    names = {*os.listdir(folder), *(snapshot.files if snapshot is not None else ())}
    check_names(names, str(folder))
    single = SINGLE_FILE in names
    findings: list[_Finding] = []
    weight_map = {} if single else _read_index(folder, findings)
    shards = (SINGLE_FILE,) if single else tuple(dict.fromkeys(weight_map.values()))
    tensors: dict[str, TensorEntry] = {}
    stamps: dict[Path, _Stamp] = {}
    away = {} if snapshot is None else _headers_away(snapshot, shards)
    for shard in shards:
        try:
            header = away.get(shard)
            if header is None:
                stamps[folder / shard], header = _read_shard(folder / shard)
            elif isinstance(header, MalformedError):
                raise header
        except MalformedError as error:
            findings.append(_Finding(shard, error.problem, error.remedy))
            continue
        entries, _ = header
        if not single:
            findings += _disagreements(shard, entries, weight_map)
        if twice := [f"{name!r} (in {tensors[name].file.name} too)" for name in entries if name in tensors]:
            findings.append(_Finding(shard, f"holds tensors of another shard: {some(twice)}"))
        tensors |= entries
        if len(tensors) > MAX_TENSORS:
            findings.append(_Finding(shard, f"is one of shards with over {MAX_TENSORS:,} tensors, which no model has"))
            break
    findings += _packed_weights(tensors)
    if findings:
        raise BadSource(
            "the checkpoint cannot be used" if len(findings) == 1 else f"{len(findings)} things are wrong with it",
            where=str(folder),
            why="; ".join(f"{finding.file}: {finding.problem}" for finding in findings),
            remedy="; ".join(dict.fromkeys(finding.remedy for finding in findings)),
        )
    expected = {shard: header for shard, header in away.items() if not isinstance(header, MalformedError)}
    arrivals = _arrivals(snapshot, expected, report)
    for name, entry in tensors.items():
        if entry.file.name in expected:
            tensors[name] = dataclasses.replace(entry, wait=partial(arrivals.wait, entry.file.name))
    return Checkpoint(folder, shards, tensors, stamps, arrivals)


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that was written to since its headers were read; to be asked once all of it has been read."""
    arrived = {checkpoint.folder / name: stamp for name, stamp in checkpoint.arrivals.there.items()}
    for path, stamp in {**checkpoint.stamps, **arrived}.items():
        if not path.exists() or _stamp(path) != stamp:
            raise changed(path, "it has another size, time of change or inode")


def read_tensor(entry: TensorEntry, out: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor's bytes into ``out``, or into a new one: contiguous, on the CPU, the entry's dtype and shape.

    All of it at once; see ``pieces`` for tensors that may be large.
    """
    import torch

    dtype = torch_dtype(entry.dtype)
    if out is None:
        out = torch.empty(entry.shape, dtype=dtype)
    assert (out.dtype, tuple(out.shape), out.device.type) == (dtype, entry.shape, "cpu")
    assert out.is_contiguous()
    with open_tensor(entry) as file:
        read_into(file.fileno(), entry.begin, out.reshape(-1).view(torch.uint8).numpy().data, entry.file)
    return out


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_shard(path: Path) -> tuple[_Stamp, _Header]:
    return _stamp(inside(path.parent, path.name)), read_header(path)


def _headers_away(snapshot: hub.Snapshot, shards: Iterable[str]) -> dict[str, _Header | MalformedError]:
    """What the Hub says of the shards that it has and the folder lacks, or what is wrong with them."""

    def ask(shard: str) -> _Header | MalformedError:
        try:
            return read_header(snapshot.folder / shard, partial(hub.first_bytes, snapshot, shard))
        except MalformedError as error:
            return error

    away = [shard for shard in shards if shard in snapshot.files and not os.path.exists(snapshot.folder / shard)]
    with quiet(), ThreadPoolExecutor(_REQUESTS) as pool:
        return dict(zip(away, pool.map(ask, away), strict=True))


def _arrivals(snapshot: hub.Snapshot | None, expected: Mapping[str, _Header], report: Progress | None) -> Arrivals:
    """The shards whose headers came from the Hub; each is checked when it arrives, and has its stamp then."""

    def fetch(shard: str, arrived: Callable[[int], None]) -> _Stamp:
        assert snapshot is not None
        hub.download(snapshot, shard, arrived)
        path = snapshot.folder / shard
        try:
            stamp, header = _read_shard(path)
        except MalformedError as error:
            raise changed(path, f"what has arrived {error.problem}") from error
        if header != expected[shard]:
            raise changed(path, "what has arrived has another header")
        return stamp

    sizes = {shard: max((e.end for e in entries.values()), default=0) for shard, (entries, _) in expected.items()}
    return Arrivals(sizes, fetch, report)


def _read_index(folder: Path, findings: list[_Finding]) -> dict[str, str]:
    """Tensor name -> name of its shard, for the shards that may be opened; what is wrong goes to ``findings``."""
    try:
        path = inside(folder, INDEX_FILE)
        try:
            data = read_file(path)
            index = parse_json(data)
        except OSError as error:
            raise unreadable(error) from error
        except ValueError as error:
            raise MalformedError(*recognise(data) or (f"is not JSON: {error}",)) from error
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise MalformedError("has no weight_map from names of tensors to names of files")
        if not weight_map:
            raise MalformedError("lists no tensors")
    except MalformedError as error:
        findings.append(_Finding(INDEX_FILE, error.problem, error.remedy))
        return {}
    outside = {file for file in weight_map.values() if file in ("", ".", "..") or set(file) & set("/\\\0")}
    if outside:
        problem = f"points outside the folder: {some(map(repr, sorted(outside)))}"
        findings.append(_Finding(INDEX_FILE, problem, "do not trust this checkpoint; get it from its author again"))
    pickles = {file for file in weight_map.values() if not file.endswith(".safetensors")} - outside
    if pickles:
        problem = f"names files that transformers would load as pickles: {some(map(repr, sorted(pickles)))}"
        findings.append(
            _Finding(INDEX_FILE, problem, "give them names that end in .safetensors, here and in the index")
        )
    return {name: file for name, file in weight_map.items() if file not in outside | pickles}


def inside(folder: Path, name: str) -> Path:
    """The path of a file that really lies in ``folder``, or in the Hub cache that ``folder`` is a snapshot of.

    Raises:
        MalformedError: it is missing, or a link leads out.
    """
    path = folder / name
    if not os.path.isfile(path):  # unlike Path's methods, it has an answer for names that no file can have
        raise MalformedError("is not a file" if os.path.exists(path) else "is missing")
    if (target := leads_out(path, folder)) is not None:
        raise MalformedError(f"is a link that leads out of the folder, to {target}", "replace the link by the file")
    return path


def _disagreements(shard: str, entries: Mapping[str, TensorEntry], weight_map: Mapping[str, str]) -> list[_Finding]:
    promised = {name for name, file in weight_map.items() if file == shard}
    findings = []
    if missing := sorted(promised - set(entries)):
        findings.append(_Finding(shard, f"lacks tensors that the index places in it: {some(map(repr, missing))}"))
    if extra := sorted(set(entries) - promised):
        findings.append(_Finding(shard, f"holds tensors that the index does not place in it: {some(map(repr, extra))}"))
    return findings


def _packed_weights(tensors: Mapping[str, TensorEntry]) -> list[_Finding]:
    """Integer matrices beside scales or zero points in the same module are packed weights (GPTQ, AWQ, int8)."""
    scaled = {
        name.rpartition(".")[0]
        for name in tensors
        if any(word in name.rpartition(".")[2].lower() for word in _SCALE_WORDS)
    }
    packed = [
        entry
        for entry in tensors.values()
        if entry.dtype in _PACKED_INTEGERS and len(entry.shape) >= 2 and entry.name.rpartition(".")[0] in scaled
    ]
    listing = some(f"{entry.name!r} ({entry.dtype})" for entry in packed)
    return [_Finding(entry.file.name, f"holds quantised weights: {listing}", DEQUANTISE) for entry in packed[:1]]
