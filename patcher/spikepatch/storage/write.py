"""Safetensors files, written as a stream: one tensor in memory at a time, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spikepatch.errors import Refused
from spikepatch.storage.formats import INDEX_FILE
from spikepatch.storage.header import DTYPES

if TYPE_CHECKING:
    import torch

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
            why="weights are stored as float32, bfloat16, float16 or float64",
            remedy="--dtype bfloat16, or leave it out for the source's own",
        )
    return dtype


def write_checkpoint(
    folder: Path,
    tensors: Sequence[Planned],
    files: Mapping[str, Sequence[str]],
    produce: Callable[[str], torch.Tensor],
    advance: Callable[[int], None],
) -> dict[str, str]:
    """Write every file of ``files``, then the index where there are several.

    Args:
        produce: tensor name -> its value in the planned dtype and shape, on the CPU.
        advance: told the bytes of each tensor once it is written.

    Returns:
        File name -> SHA-256 of its bytes, in hexadecimal.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    hashes = {}
    for file, names in files.items():
        hashes[file] = _write_shard(folder / file, [by_name[name] for name in names], produce, advance)
    if len(files) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(t.elements for t in tensors),
                "total_size": sum(t.bytes for t in tensors),
            },
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        hashes[INDEX_FILE] = write_text(folder / INDEX_FILE, text)
    return hashes


def write_text(path: Path, text: str) -> str:
    """Write a UTF-8 file and return its SHA-256."""
    data = text.encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _write_shard(
    path: Path, tensors: list[Planned], produce: Callable[[str], torch.Tensor], advance: Callable[[int], None]
) -> str:
    import torch

    names = {getattr(torch, torch_name): name for name, (torch_name, _) in DTYPES.items()}
    tensors = sorted(tensors, key=lambda t: (_ORDER.index(names[t.dtype]), t.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        begin, position = position, position + tensor.bytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, position],
        }
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for data in (len(head).to_bytes(8, "little"), head):
            file.write(data)
            digest.update(data)
        for tensor in tensors:
            value = produce(tensor.name)
            assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape), tensor
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(raw)
            digest.update(raw)
            advance(tensor.bytes)
    return digest.hexdigest()
