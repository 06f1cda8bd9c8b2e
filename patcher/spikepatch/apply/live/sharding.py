"""Which elements of a tensor this process holds, and which part of a stored tensor they are.

A rank of a sharded model (DTensor: FSDP2, tensor parallelism, a mesh of both) holds a box: a range of indices in each
dimension. The stored tensors of one in-memory tensor are boxes of it too (an expert of a fused 3-D parameter, one half
of a fused gate and up projection, either one transposed), so what both share is a box again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from spikepatch.source.layout import Target


@dataclass(frozen=True)
class Held:
    """``local``, the memory of this process, holds the elements ``box`` of a tensor of ``shape``."""

    local: torch.Tensor
    shape: tuple[int, ...]
    box: tuple[range, ...]


@dataclass(frozen=True)
class Part:
    """The elements ``box`` of a target, and the ``memory`` that they are written to; of the same shape."""

    box: tuple[range, ...]
    memory: torch.Tensor


def held(tensor: torch.Tensor) -> Held:
    """What this process holds of ``tensor``, plain or DTensor. No communication.

    Raises:
        ValueError: it is no box of the tensor's own values; the reason.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        _check_plain(tensor)
        return Held(tensor, tuple(tensor.shape), tuple(range(n) for n in tensor.shape))
    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    local = tensor.to_local().detach()
    _check_plain(local)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"its placements are {tensor.placements}: the values of the ranks are summed")
    if mesh.get_coordinate() is None:
        return Held(local, shape, tuple(range(0) for _ in shape))
    for i, placement in enumerate(tensor.placements):
        # FSDP over tensor parallelism in one dimension: FSDP cuts the other's shards, though first in the mesh.
        factor = getattr(placement, "split_factor", 1)
        if factor > 1:
            dim = placement.dim  # type: ignore[attr-defined]
            later = [mesh.size(j) for j in range(i + 1, mesh.ndim) if tensor.placements[j].is_shard(dim)]
            if math.prod(later) != factor or shape[dim] % (factor * mesh.size(i)):
                raise ValueError(f"its placements are {tensor.placements}: a shard is no contiguous range of indices")
    # The protocol of torch.distributed.checkpoint: one chunk, with this rank's offsets and sizes.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if tuple(chunk.sizes) != tuple(local.shape):
        raise ValueError(f"this rank holds {tuple(local.shape)}, where its placements give {tuple(chunk.sizes)}")
    return Held(local, shape, tuple(range(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)))


def _check_plain(local: torch.Tensor) -> None:
    if type(local) is not torch.Tensor:
        raise ValueError(f"it is a {type(local).__name__}, no plain tensor: packed or quantised")
    if local.is_meta:
        raise ValueError("it is on the meta device")


def part(target: Target, owner: Held) -> Part | None:
    """What of ``target`` this process holds, as a part of the ``owner``; None where it is nothing."""
    if not target.elements or not owner.local.numel():
        return None
    corner, dims = _place(target, owner.shape)
    box: list[range] = []
    at = [c - owned.start for c, owned in zip(corner, owner.box, strict=True)]
    strides = []
    for size, (dim, step) in zip(target.shape, dims, strict=True):
        if dim is None:
            box.append(range(size))
            strides.append(0)
            continue
        low = max(0, -((corner[dim] - owner.box[dim].start) // step))
        high = min(size, -((corner[dim] - owner.box[dim].stop) // step))
        box.append(range(low, max(low, high)))
        strides.append(step * owner.local.stride(dim))
        at[dim] += low * step
    if not all(box) or not all(0 <= a < len(owned) for a, owned in zip(at, owner.box, strict=True)):
        return None
    offset = owner.local.storage_offset() + sum(a * s for a, s in zip(at, owner.local.stride(), strict=True))
    return Part(tuple(box), owner.local.as_strided([len(r) for r in box], strides, offset))


def _place(target: Target, shape: Sequence[int]) -> tuple[list[int], list[tuple[int | None, int]]]:
    """Where ``target`` begins in its owner of ``shape``; and per dimension the owner's dimension and the step there.

    A dimension of size 1 needs none.

    Raises:
        ValueError: a dimension runs through several of the owner's.
    """
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    corner = [target.offset // stride % size for stride, size in zip(strides, shape, strict=True)]
    dims: list[tuple[int | None, int]] = []
    for size, stride in zip(target.shape, target.stride, strict=True):
        fitting = [
            (dim, stride // strides[dim])
            for dim in range(len(shape))
            if stride % strides[dim] == 0 and corner[dim] + stride // strides[dim] * (size - 1) < shape[dim]
        ]
        if size > 1 and not fitting:
            raise ValueError(f"its dimension of size {size} runs through several dimensions of {target.owner}")
        dims.append(fitting[0] if size > 1 else (None, 0))
    return corner, dims
