"""One ATen call of a recorded pass: what it is run on, and what stands for its result.

Data lies on the meta device and has no values, so all that such a call tells is the shape, strides and dtype of its
result. They follow from those of its arguments, and are computed once: a model repeats its blocks, and every further
way repeats the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import map_aggregate

from spikepatch.residual.told import Mode
from spikepatch.source.private import schema

#: Elements of a new tensor that is not made for real.
_LARGE = 1 << 22
META = torch.device("meta")
INDEX = torch.ops.aten.index.Tensor


def placed(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], as_data: bool
) -> Any:
    """The arguments that ``func`` is run on: all on meta for data; control stays real, wherever it is asked for."""
    if not as_data:
        sizes = args[0] if args and not tensors and isinstance(args[0], (list, tuple)) else ()
        wanted = kwargs.get("dtype") or torch.get_default_dtype()
        if wanted.is_floating_point and math.prod(sizes) >= _LARGE:  # a mask for all positions that there may be, say
            kwargs = {**kwargs, "device": META}
        return args, kwargs
    if func is INDEX:
        args = (args[0], _rows(args[1]))
    elif kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": META}
    return (args, kwargs) if all(t.is_meta for t in tensors) else to_meta((args, kwargs))


def mapped(change: Callable[[torch.Tensor], Any], values: Any) -> Any:
    """``values``, a tensor or nested containers, with every tensor changed. (fx's own map, which is in C.)"""
    return map_aggregate(values, lambda value: change(value) if isinstance(value, torch.Tensor) else value)


def tensors_in(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(found.append, values)
    return found


def _rows(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """``indices`` with the row numbers that a mask picks in place of it: on meta, nobody knows how many."""
    rows: list[torch.Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not index.is_meta
        rows.extend(index.nonzero(as_tuple=True) if index is not None and mask else [index])
    return rows


def shares(sizes: Sequence[int], whole: int) -> Sequence[int]:
    """Sizes of parts that add up to the ``whole``: as they are, or else equal ones."""
    parts = len(sizes)
    return sizes if sum(sizes) == whole else [whole // parts + (i < whole % parts) for i in range(parts)]


def to_meta(values: Any) -> Any:
    return mapped(lambda tensor: tensor.to(META), values)


def stand_in(tensor: torch.Tensor, choices: int, mode: Mode) -> torch.Tensor:
    """Data stays on meta; integers (indices into ``choices`` things) and conditions computed from data become real."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or not tensor.is_meta:
        return tensor
    if tensor.dtype == torch.bool:
        return torch.full(tensor.shape, mode != "zeros", dtype=torch.bool)
    rows = (torch.arange(tensor.numel()) % max(choices, 1)).reshape(tensor.shape).to(tensor.dtype)
    return max(choices, 1) - 1 - rows if mode == "values" else rows


@dataclass(frozen=True, slots=True)
class _Outline:
    """What a tensor on the meta device is."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=META)


def outcome(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)``, where all tensors lie on the meta device."""
    if not _makes_new(func):
        return func(*args, **kwargs)
    outlines: Any = mapped(lambda t: _Outline(t.shape, t.stride(), t.dtype), (args, kwargs))
    return _drawn(_outcome(func, torch.get_default_dtype(), *outlines[0], **outlines[1]))


@functools.lru_cache(maxsize=1 << 16, typed=True)  # a number's type decides the result's
def _outcome(func: Any, default_dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    result = func(*_drawn(args), **_drawn(kwargs))
    return mapped(lambda t: _Outline(t.shape, t.stride(), t.dtype), result)


def _drawn(values: Any) -> Any:
    return map_aggregate(values, lambda value: value.tensor() if isinstance(value, _Outline) else value)


@functools.cache
def without_out(func: Any) -> Any:
    """The operation that returns what ``func`` writes into its argument ``out``.

    Raises:
        NotImplementedError: there is none.
    """
    taken = [(part.name, str(part.type)) for part in schema(func).arguments if part.alias_info is None]
    if (found := _taking(func.overloadpacket, taken)) is None:
        raise NotImplementedError(f"{func} has no form without out")
    return found


@functools.cache
def functional(func: Any) -> Any:
    """The operation that returns what ``func`` writes into its first argument, as ``pow.Tensor_Scalar`` does for
    ``pow_.Scalar``; None if there is none.
    """
    namespace, name, _ = str(func).split(".")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    taken = [(part.name, str(part.type)) for part in schema(func).arguments]
    return _taking(packet, taken) if packet is not None else None


def _taking(packet: Any, taken: list[tuple[str, str]]) -> Any:
    """Of its operations, the one that takes these arguments and writes none; None if there is none."""
    for operation in (getattr(packet, name) for name in packet.overloads()):
        arguments = [(part.name, str(part.type)) for part in schema(operation).arguments]
        if not schema(operation).is_mutable and arguments == taken:
            return operation
    return None


@functools.cache
def _makes_new(func: Any) -> bool:
    """Its result shares no memory with an argument, and nothing is written."""
    known = schema(func)
    return known is not None and all(part.alias_info is None for part in (*known.arguments, *known.returns))
