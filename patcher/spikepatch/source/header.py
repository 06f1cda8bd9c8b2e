"""The header of one safetensors file, parsed by hand with every check; no tensor is read.

A file is a little-endian u64 N, a JSON header of N bytes, and the tensors' bytes; offsets in the header count from its
end (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikepatch.source.formats import DOWNLOAD_AGAIN, parse_json, recognise, some
from spikepatch.source.local import opened

if TYPE_CHECKING:
    import torch

#: Checked before the header is allocated; the format allows twice that.
MAX_HEADER_BYTES = 50_000_000

#: Tensors of a checkpoint; the largest models, with every expert's matrices apart, have some 100,000.
MAX_TENSORS = 300_000

#: safetensors dtype -> (name in torch, bytes per element). Narrower floats are quantised weights, never read.
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "U16": ("uint16", 2), "I16": ("int16", 2),
    "U32": ("uint32", 4), "I32": ("int32", 4), "U64": ("uint64", 8), "I64": ("int64", 8), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8), "C64": ("complex64", 8),
}  # fmt: skip

#: How much of a file is read at first; few headers are longer.
_USUAL_BYTES = 1 << 17

DEQUANTISE = "use the unquantised original, or dequantise the model and save it with save_pretrained"
_QUANTISED_FLOATS = ("F4", "F6_", "F8_")


def _is_there() -> None:
    pass


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes ``begin`` to ``end`` of ``file``. ``dtype`` is a key of ``DTYPES``.

    ``wait`` returns once the file is there; to be called before it is opened.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    wait: Callable[[], None] = field(default=_is_there, repr=False, compare=False)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class MalformedError(Exception):
    """What is wrong with one file."""

    def __init__(self, problem: str, remedy: str = DOWNLOAD_AGAIN) -> None:
        super().__init__(problem)
        self.problem: str = problem
        self.remedy: str = remedy


def unreadable(error: OSError) -> MalformedError:
    """What a file is that the system does not give."""
    return MalformedError(f"cannot be read: {error.strerror}", "check the file's permissions and the disk")


def read_header(
    path: Path, first_bytes: Callable[[int], tuple[bytes, int]] | None = None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and its ``__metadata__``.

    Args:
        path: of the file, or where it will be.
        first_bytes: count -> as many bytes of its beginning, or all there are, and its size; from the disk by default.

    Raises:
        MalformedError: the first thing that is wrong with the file; problems of single tensors are listed together.
    """
    first_bytes = first_bytes or partial(_first_bytes, path)
    head, size = first_bytes(_USUAL_BYTES)
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise MalformedError(*recognise(head) or (_bad_length(size, length),))
    if len(head) < 8 + length:
        head, _ = first_bytes(8 + length)
    data = head[8 : 8 + length]
    try:
        header = parse_json(data)
    except ValueError as error:
        raise MalformedError(*recognise(head) or (f"the header is not JSON: {error}",)) from error
    if not isinstance(header, dict):
        raise MalformedError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise MalformedError(f"has {len(header):,} tensors, and no model has over {MAX_TENSORS:,}")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedError("__metadata__ is not a map from strings to strings")
    return _entries(path, header, start=8 + length, size=size), metadata


def _first_bytes(path: Path, count: int) -> tuple[bytes, int]:
    try:
        with opened(path) as file:
            return file.read(count), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(error) from error


def torch_dtype(code: str) -> torch.dtype:
    """The dtype of torch for a key of ``DTYPES``."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[code][0])
    return dtype


def dtype_code(dtype: torch.dtype) -> str:
    """The key of ``DTYPES`` for a dtype of torch."""
    return next(code for code, (name, _) in DTYPES.items() if f"torch.{name}" == str(dtype))


def _bad_length(size: int, length: int) -> str:
    if size < 8:
        return f"is truncated: {size} bytes are no safetensors file"
    if length > MAX_HEADER_BYTES:
        return f"is no safetensors file: its header would have {length} bytes"
    return f"is truncated: the header has {length} bytes, the file {size}"


def _entries(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, TensorEntry]:
    """The header's tensors in the order of their bytes, which must fill the file from ``start`` without a gap."""
    quantised = [f"{name!r} ({f['dtype']})" for name, f in header.items() if _is_quantised_float(f)]
    if quantised:
        raise MalformedError(f"holds quantised weights: {some(quantised)}", DEQUANTISE)
    if wrong := [f"{name!r} {problem}" for name, fields in header.items() if (problem := _field_problem(fields))]:
        raise MalformedError(f"the header is wrong: {some(wrong)}")
    entries = [
        TensorEntry(name, f["dtype"], tuple(f["shape"]), path, *(start + offset for offset in f["data_offsets"]))
        for name, f in header.items()
    ]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = start
    for entry in entries:
        if entry.begin != position:
            relation = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise MalformedError(f"the header is wrong: {entry.name!r} {relation}")
        position = entry.end
    if position > size:
        raise MalformedError(f"is truncated: its tensors end at byte {position}, the file at {size}")
    if position < size:
        raise MalformedError(f"has {size - position} bytes after its last tensor")
    return {entry.name: entry for entry in entries}


def _is_quantised_float(fields: Any) -> bool:
    return isinstance(fields, dict) and str(fields.get("dtype")).startswith(_QUANTISED_FLOATS)


def _field_problem(fields: Any) -> str | None:
    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return "does not have dtype, shape and data_offsets"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the unknown dtype {dtype!r}"
    if not naturals(shape) or not naturals(offsets) or len(offsets) != 2:
        return "has a shape or offsets that are not lists of natural numbers"
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][1]:
        return f"has {offsets[1] - offsets[0]} bytes, which is not what {dtype} {shape} takes"
    return None
