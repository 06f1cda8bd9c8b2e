"""The tracer: run a forward pass once, and write down what was called.

Parameters and all data lie on the meta device, at full width. Control tensors (ids, masks, positions, and what is
computed from them alone) are real, so Python branches on them run. Where control is computed from data, such as the
expert that a token is routed to, a stand-in takes its place: row numbers 0, 1, 2, ... for integers, True for
conditions, so that as many branches as possible are entered. ``Recorder.whole`` tells whether anything hung on that.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from spikepatch.source.private import TAKE_NUMBER, TO_COPY, TorchDispatchMode, memory, schema

#: Of operations that return a number to Python, or a shape that depends on values.
_DECIDE = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))

_INDEX = torch.ops.aten.index.Tensor
_META = torch.device("meta")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends every ATen call to ``graph``. Tensors that no recorded call made become placeholders: ``constants``.

    ``whole``: no branch and no shape was chosen by what the inputs hold, so that any input goes the same way.
    ``branches``: the lines of code that asked for a truth value which the inputs decide. They are answered as the
    example says, and where it says nothing, with True; all the ``other`` way, if that is wanted.
    """

    def __init__(self, named: Mapping[str, torch.Tensor], inputs: Iterable[torch.Tensor], *, other: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph: Graph = Graph()
        self.whole: bool = True
        self.other: bool = other
        self.branches: dict[str, None] = {}
        self.path: list[str] = [""]
        self.constants: dict[Node, torch.Tensor] = {}
        self._known: dict[int, tuple[torch.Tensor, Node]] = {}  # holds the tensors, so that their ids stay theirs
        self._fed: set[int] = set(map(memory, inputs))  # memory of control that the inputs or data decide
        for name, tensor in named.items():
            self._introduce(tensor, name)

    def node(self, tensor: torch.Tensor) -> Node:
        """The node whose value ``tensor`` is."""
        if id(tensor) not in self._known:
            self.constants[self._introduce(tensor, f"constant_{len(self.constants)}")] = tensor
        return self._known[id(tensor)][1]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        as_data = any(t.is_meta for t in tensors)
        fed = as_data or any(memory(t) in self._fed for t in tensors)
        if fed and not _DECIDE.isdisjoint(func.tags) and (func is not _INDEX or self._masks(args[1])):
            self.whole = False
        if func is TAKE_NUMBER and fed and args[0].dtype == torch.bool:
            self.branches[_asking_line()] = None
            return self.other != (True if as_data else func(*args, **kwargs))
        if func is TAKE_NUMBER and as_data:
            return 1
        run_args, run_kwargs = _placed(func, args, kwargs, tensors, as_data)
        try:
            result = func(*run_args, **run_kwargs)
        except (RuntimeError, NotImplementedError):  # an op that the CPU lacks for this dtype
            if as_data:
                raise
            as_data = fed = True
            result = func(*_to_meta(run_args), **run_kwargs)
        if schema(func).is_mutable and tensors and args and isinstance(args[0], torch.Tensor):
            result = args[0]
        elif as_data:
            choices = args[0].shape[-1] if args and isinstance(args[0], torch.Tensor) and args[0].ndim else 1
            result = _map(lambda t: _stand_in(t, choices), result)
        if fed:
            self._fed.update(map(memory, _tensors(result)))
        self._append(func, args, kwargs, result)
        return result

    def _masks(self, indices: Sequence[torch.Tensor | None]) -> bool:
        """One of ``indices`` picks as many rows as the input or data say; row numbers pick as many as they are."""
        return any(i is not None and i.dtype == torch.bool and (i.is_meta or memory(i) in self._fed) for i in indices)

    def _introduce(self, tensor: torch.Tensor, name: str) -> Node:
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after():
            node = self.graph.placeholder(name.replace(".", "_"))
        node.meta["val"] = tensor
        self._known[id(tensor)] = (tensor, node)
        return node

    def _append(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        node = self.graph.call_function(func, *_map(self.node, (args, kwargs)))
        node.meta["nn_module_stack"] = {self.path[-1]: (self.path[-1], nn.Module)}
        parts = enumerate(result) if isinstance(result, (tuple, list)) else ()
        for i, item in parts:
            if isinstance(item, torch.Tensor):
                part = self.graph.call_function(operator.getitem, (node, i))
                part.meta.update(node.meta, val=item)
                self._known[id(item)] = (item, part)
        if isinstance(result, torch.Tensor):
            node.meta["val"] = result
            self._known[id(result)] = (result, node)


def _asking_line() -> str:
    """Where the innermost code stands that is no part of torch or of this package."""
    frame: FrameType | None = sys._getframe(1)
    ours = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}" if frame is not None else "unknown code"


def _placed(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], as_data: bool
) -> Any:
    """The arguments that ``func`` is run on: all on meta for data; control stays real, wherever it is asked for."""
    if not as_data:
        wanted = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
        if kwargs.get("device") == _META and (wanted is None or not wanted.is_floating_point):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return args, kwargs
    if func is _INDEX:
        args = (args[0], _rows(args[1]))
    elif func is TO_COPY and "device" in kwargs:  # to where the control is
        kwargs = {**kwargs, "device": _META}
    return (args, kwargs) if all(t.is_meta for t in tensors) else _to_meta((args, kwargs))


def _map(change: Callable[[torch.Tensor], Any], values: Any) -> Any:
    """``values``, a tensor or nested containers, with every tensor changed. (fx's own map, which is in C.)"""
    return map_aggregate(values, lambda value: change(value) if isinstance(value, torch.Tensor) else value)


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map(found.append, values)
    return found


def _rows(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """``indices`` with the row numbers that a mask picks in place of it: on meta, nobody knows how many."""
    rows: list[torch.Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not index.is_meta
        rows.extend(index.nonzero(as_tuple=True) if index is not None and mask else [index])
    return rows


def _to_meta(values: Any) -> Any:
    return _map(lambda tensor: tensor.to(_META), values)


def _stand_in(tensor: torch.Tensor, choices: int) -> torch.Tensor:
    """Data stays on meta; integers (indices into ``choices`` things) and conditions computed from data become real."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or not tensor.is_meta:
        return tensor
    if tensor.dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return (torch.arange(tensor.numel()) % max(choices, 1)).reshape(tensor.shape).to(tensor.dtype)


class _RealNumbers(TorchFunctionMode):
    """Numbers in the code that become a tensor on the data's device, meta, would lose their values: keep them real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__:
            tensor, index = args
            parts = index if isinstance(index, tuple) else (index,)
            real = tuple(torch.tensor(part, device="cpu") if isinstance(part, list) else part for part in parts)
            args = (tensor, real if isinstance(index, tuple) else real[0])
        elif func is torch.tensor and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def record(model: nn.Module, example: Mapping[str, torch.Tensor], *, other: bool = False) -> tuple[Recorder, Any]:
    """Run ``model`` (parameters on meta, buffers real) once on a real ``example``: the recorder, and the output.

    ``other``: with all branches that values decide gone the other way.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers()), **example}
    recorder = Recorder(named, example.values(), other=other)
    with torch.no_grad(), _paths(model, recorder.path), _RealNumbers(), recorder:
        result = model(**example)
    return recorder, result


@contextmanager
def _paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the path of the module whose forward is running on top of ``path``."""
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: path.__delitem__(-1)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
