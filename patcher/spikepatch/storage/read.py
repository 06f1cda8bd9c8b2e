"""A checkpoint folder, read without loading it: single file or shards and index, checked, and single tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spikepatch.errors import BadSource
from spikepatch.storage.formats import (
    DOWNLOAD_AGAIN,
    INDEX_FILE,
    SINGLE_FILE,
    check_names,
    parse_json,
    recognise,
    some,
)
from spikepatch.storage.header import DEQUANTISE, DTYPES, MalformedError, TensorEntry, read_header
from spikepatch.storage.pieces import changed, open_to_read, read_into

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorEntry", "check_unchanged", "inside", "read_checkpoint", "read_tensor"]

_PACKED_INTEGERS = ("I8", "U8", "I32")
_SCALE_WORDS = ("scale", "absmax", "zeros")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers and index have been checked.

    Attributes:
        shards: file names, in the order in which the index first names them; one for a single file.
        tensors: name -> entry; shard by shard, in the order of their bytes.
        metadata: the shards' ``__metadata__``, merged.
        total_bytes: of all tensors together.
        stamps: file -> its size, time of last change and inode, before its header was read.
    """

    folder: Path
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    total_bytes: int
    single_file: bool
    stamps: Mapping[Path, tuple[int, int, int]]


@dataclass(frozen=True)
class _Finding:
    file: str
    problem: str
    remedy: str = DOWNLOAD_AGAIN


def read_checkpoint(folder: Path) -> Checkpoint:
    """Parse and check the headers and the index of ``folder``; no tensor is read.

    Raises:
        BadSource: lists everything that is wrong with the folder.
    """
    names = os.listdir(folder)
    check_names(names, str(folder))
    single = SINGLE_FILE in names
    findings: list[_Finding] = []
    weight_map = {} if single else _read_index(folder, findings)
    shards = (SINGLE_FILE,) if single else tuple(dict.fromkeys(weight_map.values()))
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    stamps: dict[Path, tuple[int, int, int]] = {}
    for shard in shards:
        try:
            stamps[folder / shard] = _stamp(inside(folder, shard))
            entries, own_metadata = read_header(folder / shard)
        except MalformedError as error:
            findings.append(_Finding(shard, error.problem, error.remedy))
            continue
        if not single:
            findings += _disagreements(shard, entries, weight_map)
        if twice := [f"{name!r} (in {tensors[name].file.name} too)" for name in entries if name in tensors]:
            findings.append(_Finding(shard, f"holds tensors of another shard: {some(twice)}"))
        tensors |= entries
        metadata |= own_metadata
    findings += _packed_weights(tensors)
    if findings:
        raise BadSource(
            "the checkpoint cannot be used" if len(findings) == 1 else f"{len(findings)} things are wrong with it",
            where=str(folder),
            why="; ".join(f"{finding.file}: {finding.problem}" for finding in findings),
            remedy="; ".join(dict.fromkeys(finding.remedy for finding in findings)),
        )
    total_bytes = sum(entry.end - entry.begin for entry in tensors.values())
    return Checkpoint(folder, shards, tensors, metadata, total_bytes, single, stamps)


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that was written to since its headers were read; to be asked once all of it has been read."""
    for path, stamp in checkpoint.stamps.items():
        if not path.exists() or _stamp(path) != stamp:
            raise changed(path, "it has another size, time of change or inode")


def read_tensor(entry: TensorEntry, out: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor's bytes into ``out``, or into a new one: contiguous, on the CPU, the entry's dtype and shape.

    All of it at once; see ``pieces`` for tensors that may be large.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[entry.dtype][0])
    if out is None:
        out = torch.empty(entry.shape, dtype=dtype)
    assert (out.dtype, tuple(out.shape), out.device.type) == (dtype, entry.shape, "cpu")
    assert out.is_contiguous()
    with open_to_read(entry.file) as file:
        read_into(file.fileno(), entry.begin, out.reshape(-1).view(torch.uint8).numpy().data, entry.file)
    return out


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_index(folder: Path, findings: list[_Finding]) -> dict[str, str]:
    """Tensor name -> name of its shard, for the shards that may be opened; what is wrong goes to ``findings``."""
    try:
        data = inside(folder, INDEX_FILE).read_bytes()
        try:
            index = parse_json(data)
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
    return {name: file for name, file in weight_map.items() if file not in outside}


def inside(folder: Path, name: str) -> Path:
    """The path of a file that really lies in ``folder``, or in the Hub cache that ``folder`` is a snapshot of.

    Raises:
        MalformedError: it is missing, or a link leads out.
    """
    path, root = folder / name, folder.resolve()
    if not os.path.isfile(path):  # unlike Path's methods, it has an answer for names that no file can have
        raise MalformedError("is not a file" if os.path.exists(path) else "is missing")
    if not path.resolve().is_relative_to(root):
        place = path.parent.resolve()
        target = Path(os.path.normpath(place / os.readlink(path))) if path.is_symlink() else place / path.name
        if root.parent.name != "snapshots" or target.parent != root.parent.parent / "blobs":
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
