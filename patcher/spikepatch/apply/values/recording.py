"""What wrote a tensor: code runs without memory, and each of its writes is kept, to be done again for one tensor.

While a ``Recording`` is active, every new tensor is a fake one: it says that it is on the CPU, and has no memory. What
is called on such tensors is written down. A tensor's value is that of the last write that left nothing of what was
there before, and of those that follow it; they are carried out for real, in float32 on the CPU, with what they read.
Random writes are drawn by (seed, name of the tensor, block), so a value does not depend on what else is asked for.

Where the code looks at a value, as ``item`` and ``numpy`` do, the value is made at once.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from spikepatch.apply.values.calls import (
    Call,
    Memory,
    StorageView,
    carry_out,
    constant,
    seeded,
    tensors_in,
    truncated_normal,
    written_by,
)
from spikepatch.source.private import (
    TAKE_NUMBER,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    memory,
    schema,
    tree_map,
    truncated_normals_here,
    without_fakes,
    without_modes,
)

_aten = torch.ops.aten

#: Nothing of the old values is left behind them.
_OVERWRITES = frozenset(
    getattr(_aten, name)
    for name in "zero_ fill_ copy_ normal_ uniform_ log_normal_ exponential_ cauchy_ geometric_ random_".split()
)
#: They change what a tensor's shape is, and no value.
_SHAPES_ONLY = frozenset((_aten.resize_, _aten.set_))
#: Python sees the values behind them.
_SEEN = frozenset(
    (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__format__, torch.Tensor.__repr__)
)

_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what is called while it is active; see the module."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self._calls: list[Call] = []
        self._storages: list[torch.UntypedStorage] = []  # held, so that their addresses stay theirs
        self._numbers: dict[int, int] = {}  # address -> number
        self._written: list[list[int]] = []  # storage -> its calls, in order
        self._keys: dict[int, str] = {}  # random call -> what it is drawn by
        self._named: dict[str, StorageView | torch.Tensor] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Record what the block calls; torch's generator and numpy's are as before when it ends."""
        state = np.random.get_state()
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with torch.random.fork_rng(devices=[]), fakes, self, _Seen(self), truncated_normals_here(self._truncated):
                yield
        finally:
            np.random.set_state(state)

    def name(self, model: nn.Module) -> None:
        """Give the tensors of ``model``, which was built or adopted meanwhile, the names that they have in it."""
        tensors = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for name, tensor in {**tensors, **buffers}.items():
            found = self._named[name] = self._argument(tensor)
            calls = self._needed([(found.storage, len(self._calls))]) if isinstance(found, StorageView) else ()
            free = [call for call in calls if self._calls[call].random and call not in self._keys]
            self._keys.update({call: f"{name}#{i}" if i else name for i, call in enumerate(free)})

    def mark(self) -> int:
        """Where the recording is, for ``undo``."""
        return len(self._calls)

    def undo(self, mark: int) -> None:
        """Forget what was called since."""
        del self._calls[mark:]
        for calls in self._written:
            del calls[bisect_left(calls, mark) :]

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the same shape and dtype, without values."""
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def value(self, name: str) -> torch.Tensor | None:
        """What the code has written into the tensor of this name; None where it has left an element unwritten."""
        found = self._named.get(name)
        if not isinstance(found, StorageView):
            return found
        value = self._made([found])[0]
        return None if value.is_floating_point() and _has_nan(value) else value

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor of this name; None where there is none."""
        found = self._named.get(name)
        return None if found is None else tuple(found.shape)

    def is_drawn(self, name: str) -> bool:
        """Chance has a part in the value."""
        found = self._named.get(name)
        if not isinstance(found, StorageView):
            return False
        return any(self._calls[call].random for call in self._needed([(found.storage, len(self._calls))]))

    def seen(self, values: Any) -> Any:
        """``values``, a tensor or nested containers, with real tensors in place of fake ones."""

        def real(tensor: Any) -> Any:
            return self._made([self._view(tensor)])[0] if isinstance(tensor, FakeTensor) else tensor

        return tree_map(real, values)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor with the values of a real one."""
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        self._append(constant, (tensor,), {}, [made], whole=True)
        return made

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        written = written_by(func, args, kwargs)
        if any(not isinstance(tensor, FakeTensor) for tensor in written):  # a real tensor stays one
            with without_fakes():
                return func(*self.seen(args), **self.seen(kwargs))
        if func is TAKE_NUMBER or kwargs.get("generator") is not None:
            return self._for_real(func, args, kwargs, written)
        if written:
            if torch.Tag.inplace_view in func.tags or func.overloadpacket in _SHAPES_ONLY:
                return func(*args, **kwargs)
            self._append(func, args, kwargs, written, whole=func.overloadpacket in _OVERWRITES)
            return _returned(func, args, written)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # the values decide the shape, or torch does not know it
            return self._for_real(func, args, kwargs, written)
        made = [tensor for tensor in tensors_in(result) if memory(tensor) not in self._numbers]
        if made and isinstance(result, (torch.Tensor, tuple, list)):
            if not tensors_in((args, kwargs)) and any(a.name == "dtype" for a in schema(func).arguments):
                kwargs["dtype"] = made[0].dtype  # whatever the default is when it is carried out
            self._append(func, args, kwargs, tensors_in(result), whole=True)
        return result

    def _for_real(self, func: Any, args: Any, kwargs: Any, written: Sequence[torch.Tensor]) -> Any:
        """The call carried out now, as its result is needed, or as only its own generator knows what it draws."""
        args, kwargs = (self.seen(args), self.seen(kwargs))
        real = written_by(func, args, kwargs)
        with without_fakes(), seeded(self.seed, f"call {len(self._calls)}"):
            result = func(*args, **kwargs)
        if written:
            for fake, values in zip(written, real, strict=True):
                self._append(_aten.copy_.default, (fake, values), {}, [fake], whole=True)
            return written[0]
        return tree_map(lambda item: self.fake(item) if isinstance(item, torch.Tensor) else item, result)

    def _truncated(
        self,
        original: Callable[..., Any],
        tensor: Any,
        mean: float,
        std: float,
        low: float,
        high: float,
        generator: torch.Generator | None = None,
    ) -> Any:
        if not isinstance(tensor, FakeTensor) or generator is not None:
            return original(tensor, mean, std, low, high, generator)
        self._append(truncated_normal, (tensor, mean, std, low, high), {}, [tensor], whole=True, random=True)
        return tensor

    def _append(
        self, func: Any, args: Any, kwargs: Any, written: Sequence[Any], *, whole: bool, random: bool = False
    ) -> None:
        views = tuple(map(self._view, written))
        reads: list[int] = []

        def kept(item: Any) -> Any:
            found = self._argument(item) if isinstance(item, torch.Tensor) else item
            if isinstance(found, StorageView):
                reads.append(found.storage)
            return found

        args, kwargs = tree_map(kept, (args, kwargs))
        drawn = random or torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        call = Call(func, args, kwargs, views, tuple(reads), whole and all(view.covers for view in views), drawn)
        for view in views:
            self._written[view.storage].append(len(self._calls))
        self._calls.append(call)

    def _view(self, tensor: torch.Tensor) -> StorageView:
        storage = tensor.untyped_storage()
        number = self._numbers.setdefault(memory(tensor), len(self._storages))
        if number == len(self._storages):
            self._storages.append(storage)
            self._written.append([])
        shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        return StorageView(number, storage.nbytes(), tensor.dtype, shape, stride, offset)

    def _argument(self, tensor: torch.Tensor) -> StorageView | torch.Tensor:
        return self._view(tensor) if isinstance(tensor, FakeTensor) else _copied(tensor)

    # Carrying out

    def _needed(self, asked: list[tuple[int, int]]) -> list[int]:
        """The calls, in order, that decide what storages hold before the call of a number."""
        found: set[tuple[int, int]] = set()
        todo = list(asked)
        while todo:
            storage, end = todo.pop()
            calls = self._written[storage]
            for call in reversed(calls[: bisect_left(calls, end)]):
                if (storage, call) in found:
                    break
                found.add((storage, call))
                write = self._calls[call]
                mine = write.storages if write.whole else ()
                todo += [(read, call) for read in write.reads if read not in mine]
                if write.whole:
                    break
        return sorted({call for _, call in found})

    def _made(self, views: Sequence[StorageView]) -> list[torch.Tensor]:
        calls = self._needed([(view.storage, len(self._calls)) for view in views])
        last = {read: call for call in calls for read in (*self._calls[call].reads, *self._calls[call].storages)}
        wanted = {view.storage for view in views}
        held: Memory = {}
        with without_fakes(), torch.no_grad():
            for call in calls:
                key = self._keys.setdefault(call, f"call {call}") if self._calls[call].random else ""
                carry_out(self._calls[call], held, self.seed, key)
                for storage in [number for number in held if last[number] <= call and number not in wanted]:
                    del held[storage]
            return [view.within(held) for view in views]


class _Seen(TorchFunctionMode):
    """What Python is to see of a fake tensor is its value."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SEEN:
            args, kwargs = self.recording.seen((args, kwargs or {}))
            with without_fakes():
                return func(*args, **kwargs)
        if func is torch.Tensor.__deepcopy__:
            if isinstance(args[0], FakeTensor):  # torch's looks for its memory
                return _copy_of(*args)
            with without_modes():  # a real one, such as an argument of the constructor
                return func(*args)  # type: ignore[no-untyped-call]
        if func == _SET_DATA and isinstance(args[0], FakeTensor) and not isinstance(args[1], FakeTensor):
            args = (args[0], self.recording.fake(args[1]))
        return func(*args, **(kwargs or {}))


def _has_nan(value: torch.Tensor) -> bool:
    """By a sum first, which needs no memory: one that is finite has no NaN in it."""
    return bool(value.sum().isnan()) and bool(value.isnan().any())


def _copy_of(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    found: torch.Tensor = memo[id(tensor)]
    return found


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    with without_fakes():
        return tensor.detach().clone()


def _returned(func: Any, args: Sequence[Any], written: Sequence[torch.Tensor]) -> Any:
    returns = len(schema(func).returns)
    return None if not returns else written[0] if returns == 1 else tuple(written)
