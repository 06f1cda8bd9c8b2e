"""Calls that were written down, and how they are carried out for real: see ``recording.py``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from spikepatch.apply.values.draw import CHUNK, entropy, fraction, gaussian, truncated
from spikepatch.source.private import schema, tree_map

_aten = torch.ops.aten

#: They make a tensor without values.
_EMPTY = frozenset((_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided))
#: Draws that depend on (seed, name, block), with the place of their first setting; the rest is torch's own, as a whole.
_NORMALS = {_aten.normal_: 1, _aten.normal: 0, _aten.randn: None, _aten.randn_like: None}
_UNIFORMS = {_aten.uniform_: 1, _aten.rand: None, _aten.rand_like: None}

#: What storages hold, by number.
Memory = dict[int, torch.UntypedStorage]


@dataclass(frozen=True)
class StorageView:
    """A tensor, as a part of a storage of ``nbytes``, which has a number."""

    storage: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def covers(self) -> bool:
        """It is all of its storage."""
        return math.prod(self.shape) * self.dtype.itemsize >= self.nbytes

    def within(self, memory: Memory, *, overwritten: bool = False) -> torch.Tensor:
        """The tensor; a storage that nothing has been written into is made, of NaN unless all of it is written next."""
        if self.storage not in memory:
            elements = -(-self.nbytes // self.dtype.itemsize)
            unwritten = float("nan") if self.dtype.is_floating_point else 0
            made = torch.empty(elements, dtype=self.dtype)
            memory[self.storage] = (made if overwritten else made.fill_(unwritten)).untyped_storage()
        return torch.empty(0, dtype=self.dtype).set_(memory[self.storage], self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class Call:
    """One call, with a view in the place of each tensor, or the real tensor.

    Attributes:
        operation: of ATen; ``constant`` or ``truncated_normal`` of this module.
        views: what it writes.
        reads: numbers of the storages that it reads.
        whole: nothing is left of what the storages of ``views`` held.
        random: chance decides what it writes.
    """

    operation: Any
    args: Any
    kwargs: Any
    views: tuple[StorageView, ...]
    reads: tuple[int, ...]
    whole: bool
    random: bool

    @property
    def storages(self) -> tuple[int, ...]:
        return tuple(view.storage for view in self.views)


def constant(values: torch.Tensor) -> None:
    """Stands for the making of a tensor with these values."""


def truncated_normal(tensor: torch.Tensor, mean: float, std: float, low: float, high: float) -> None:
    """Stands for ``nn.init.trunc_normal_``."""


def carry_out(call: Call, memory: Memory, seed: int, key: str) -> None:
    """Write for real what the call writes; what is random is drawn by ``seed`` and ``key``."""
    func = getattr(call.operation, "overloadpacket", call.operation)
    if func in _EMPTY:
        return
    if func is constant:
        call.views[0].within(memory).copy_(call.args[0])
        return
    fresh = call.storages if call.whole else ()

    def real(argument: Any) -> Any:
        if not isinstance(argument, StorageView):
            return argument
        return argument.within(memory, overwritten=argument.storage in fresh)

    args, kwargs = tree_map(real, (call.args, call.kwargs))
    if func is truncated_normal:
        _draw_truncated(call.views[0].within(memory), seed, key, *args[1:])
    elif func in _NORMALS and not any(isinstance(a, torch.Tensor) for a in args[1:]):
        mean, std = _settings(_NORMALS[func], args, kwargs, ("mean", "std"))
        _fill(call.views[0].within(memory), lambda i, j: gaussian(seed, key, i, j, std).add_(mean))
    elif func in _UNIFORMS:
        low, high = _settings(_UNIFORMS[func], args, kwargs, ("from", "to"))
        _fill(call.views[0].within(memory), lambda i, j: fraction(seed, key, i, j).mul_(high - low).add_(low))
    else:
        with seeded(seed, key) if call.random else contextlib.nullcontext():
            result = call.operation(*args, **kwargs)
        if not written_by(call.operation, args, kwargs):
            for view, made in zip(call.views, tensors_in(result), strict=True):
                _take(view, made, memory)


def _take(view: StorageView, made: torch.Tensor, memory: Memory) -> None:
    """Let ``made`` be what ``view`` shows; without a copy, if it lies in memory as it did when it was written down."""
    alike = made.dtype == view.dtype and made.stride() == view.stride and made.storage_offset() == view.offset
    if view.storage not in memory and alike and made.untyped_storage().nbytes() >= view.nbytes:
        memory[view.storage] = made.untyped_storage()
    else:
        view.within(memory).copy_(made)


def _fill(place: torch.Tensor, draw: Callable[[int, int], torch.Tensor]) -> None:
    n = place.numel()
    if not place.is_contiguous():
        place.copy_(draw(0, n).view(place.shape))
        return
    flat = place.view(-1)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        flat[start:stop] = draw(start, stop)


def _draw_truncated(place: torch.Tensor, seed: int, key: str, mean: float, std: float, low: float, high: float) -> None:
    cut = (high - mean) / std if std > 0 else 0.0
    if cut > 0.5 and math.isclose(high - mean, mean - low):  # else too few normal draws are kept
        _fill(place, lambda i, j: truncated(seed, key, i, j, cut, std).add_(mean))
    else:
        with seeded(seed, key):
            nn.init.trunc_normal_(place, mean, std, low, high)


def _settings(first: int | None, args: Sequence[Any], kwargs: dict[str, Any], names: tuple[str, str]) -> Any:
    """The two numbers of a distribution: arguments from the ``first`` on, by name, or 0 and 1."""
    if first is None:
        return 0.0, 1.0
    given = dict(zip(names, args[first : first + 2], strict=False))
    return tuple(float({**given, **kwargs}.get(name, default)) for name, default in zip(names, (0.0, 1.0), strict=True))


def written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments that ``func`` writes into."""
    found = schema(func)
    if found is None or not found.is_mutable:
        return []
    values = [*args, *(kwargs.get(argument.name) for argument in found.arguments[len(args) :])]
    marked = [v for a, v in zip(found.arguments, values, strict=False) if a.alias_info and a.alias_info.is_write]
    return tensors_in(marked)


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    found: list[torch.Tensor] = []
    tree_map(lambda item: found.append(item) if isinstance(item, torch.Tensor) else None, values)
    return found


@contextlib.contextmanager
def seeded(seed: int, key: str) -> Iterator[None]:
    """torch's global CPU generator, at a full-width state (``manual_seed`` keeps 32 bits, so tensors would collide)."""
    with torch.random.fork_rng(devices=[]):
        sequence = np.random.SeedSequence(entropy(seed, key, -1))
        torch.manual_seed(0)
        state = torch.get_rng_state()
        words = state.numpy().view(np.uint64)[3 : 3 + 624]  # behind seed, (left, seeded), next; one 32-bit word each
        words[:] = sequence.generate_state(624)
        torch.set_rng_state(state)
        yield
