"""The tracer: run a forward pass once, and write down what was called.

Parameters and all data lie on the meta device, at full width. Control tensors (ids, masks, positions, and what is
computed from them alone) are real, so Python branches on them run. Where control is computed from data, such as the
expert that a token is routed to, a stand-in takes its place: row numbers 0, 1, 2, ... for integers, True for
conditions, so that as many branches as possible are entered. ``Recorder.asked`` tells what hung on values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from spikepatch.quiet import quiet
from spikepatch.residual.flex import flex_attention
from spikepatch.residual.on_meta import (
    INDEX,
    META,
    functional,
    mapped,
    outcome,
    placed,
    shares,
    stand_in,
    tensors_in,
    to_meta,
    without_out,
)
from spikepatch.residual.ops import op_name
from spikepatch.residual.recordable import on_cpu
from spikepatch.residual.told import LONGEST, SHORTEST, Asked, Mode, TakenFrom, Told, asking_line, told
from spikepatch.source.private import (
    TAKE_NUMBER,
    TorchDispatchMode,
    is_batched,
    memory,
    schema,
    without_modes,
)

#: They answer a question about values with a truth value.
_ASK = (torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.allclose.default)
#: They take numbers out of a tensor that remember where they are from; that Python makes plain; sizes.
_TOLD = frozenset((torch.Tensor.item, torch.Tensor.tolist))
_PLAIN = frozenset(
    (
        torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.__complex__,
        torch.Tensor.numpy, torch.Tensor.__array__,
    )
)  # fmt: skip
_SIZES = frozenset(
    (
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.size,
        torch.Tensor.numel,
    )
)

#: They want all that they are given on one device, before any call of theirs is recorded.
_ON_ONE_DEVICE = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.cdist))
_NUMBERS = frozenset((torch.tensor, torch.as_tensor, torch.asarray))
_SPLIT = torch.ops.aten.split_with_sizes.default
_NONZERO = torch.ops.aten.nonzero.default
#: Where data says that it is, for code that asks, as for autocast.
_CPU = torch.device("cpu")
_DEVICE = torch.Tensor.device.__get__
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
#: All that ``_Numbers`` does not just call.
_WATCHED = frozenset(
    (
        *_PLAIN, *_SIZES, *_TOLD, *_ON_ONE_DEVICE, *_NUMBERS, _DEVICE, _SET_DATA,
        torch.Tensor.__getitem__,
        torch.Tensor.__format__, torch.Tensor.__len__, torch.Tensor.type,
    )
)  # fmt: skip


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends every ATen call to ``graph``. Tensors that no recorded call made become placeholders: ``constants``.

    ``inputs``: their nodes, by name. ``asked``: what Python asked of the values. ``path``: of the module whose forward
    is running. ``most``: calls, after which it gives up.
    """

    supports_higher_order_operators = True

    def __init__(
        self, named: Mapping[str, torch.Tensor], inputs: Collection[torch.Tensor], mode: Mode, most: float
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: float = most
        self.graph: Graph = Graph()
        self.asked: Asked = Asked(mode)
        self.lengths: frozenset[int] = frozenset(n for t in inputs for n in t.shape[-1:] if not t.is_floating_point())
        self.asked.length = max(self.lengths, default=0)
        self.path: list[str] = [""]
        self.inputs: dict[str, Node] = {}
        self.constants: dict[Node, torch.Tensor] = {}
        self._known: dict[int, tuple[torch.Tensor, Node]] = {}  # holds the tensors, so that their ids stay theirs
        self._given: dict[int, tuple[torch.Tensor, Node]] = {}
        # Memory of control that the inputs, data or chance decide -> the inputs' numbers.
        self._fed: dict[int, frozenset[int]] = {memory(t): frozenset([i]) for i, t in enumerate(inputs)}
        self._data: set[int] = set()  # memory of tensors that were control until data was written into them
        self.counted: bool = False  # numbers were taken out of stand-ins, which may not add up
        self._sized: set[int] = set()  # memory of tensors whose shapes they decide
        for name, tensor in named.items():
            self._given[id(tensor)] = (tensor, self._introduce(tensor, name))

    def node(self, tensor: torch.Tensor) -> Node:
        """The node whose value ``tensor`` is."""
        if id(tensor) not in self._known:
            self.constants[self._introduce(tensor, f"constant_{len(self.constants)}")] = tensor
        return self._known[id(tensor)][1]

    def given(self, tensor: torch.Tensor) -> Node:
        """The node of a parameter, buffer or input as it was given, whatever has been written into it since."""
        return self._given[id(tensor)][1] if id(tensor) in self._given else self.node(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "name", None) is not None and func.name() == "flex_attention":
            with self:
                return flex_attention(*args)
        if isinstance(kwargs.get("out"), torch.Tensor):
            with self:  # as a value, and a write
                value = without_out(func)(*args, **{name: each for name, each in kwargs.items() if name != "out"})
                return kwargs["out"].copy_(value)
        if schema(func).is_mutable and args and isinstance(args[0], (list, tuple)):
            if (plain := functional(func)) is None or len(set(map(id, args[0]))) < len(args[0]):
                raise NotImplementedError(f"{func} writes into a list of tensors in a way that cannot be followed")
            with self:  # each as a value, and a write
                for written, value in zip(args[0], plain(*args, **kwargs), strict=True):
                    written.copy_(value)
            return None
        tensors = tensors_in((args, kwargs))
        if torch.Tag.inplace_view in func.tags:
            return self._turned(func, args, kwargs)
        if any(map(is_batched, tensors)):  # inside vmap, which makes masks
            return func(*args, **kwargs)
        as_data = any(map(self.is_data, tensors))
        fed = as_data or any(map(self.is_fed, tensors)) or torch.Tag.nondeterministic_seeded in func.tags
        if fed and (any(func is each for each in _ASK) or (func is TAKE_NUMBER and args[0].dtype == torch.bool)):
            return self.asked.answer(True if as_data else func(*args, **kwargs))
        if func is TAKE_NUMBER and as_data:
            return 1.0 if args[0].is_floating_point() else 1
        sized = fed and torch.Tag.dynamic_output_shape in func.tags and (func is not INDEX or self._masks(args[1]))
        if sized:
            self.asked.values[asking_line()] = None
        if func is _SPLIT and self.counted:
            args = (args[0], shares(args[1], args[0].shape[args[2] if len(args) > 2 else 0]), *args[2:])
        run_args, run_kwargs = placed(func, args, kwargs, tensors, as_data)
        if func is _NONZERO and self.asked.mode == "zeros" and self.inputs_of(args[0]):
            run_args = (run_args[0] == 0,)
        try:
            result = outcome(func, run_args, run_kwargs) if as_data else func(*run_args, **run_kwargs)
        except (RuntimeError, NotImplementedError):  # an op that the CPU lacks for this dtype
            if as_data:
                raise
            as_data = fed = True
            result = func(*to_meta(run_args), **run_kwargs)
        if schema(func).is_mutable and tensors and args and isinstance(args[0], torch.Tensor):
            result = args[0]
            if as_data and not result.is_meta:
                self._data.add(memory(result))
        elif as_data:
            choices = args[0].shape[-1] if args and isinstance(args[0], torch.Tensor) and args[0].ndim else 1
            result = mapped(lambda t: stand_in(t, choices, self.asked.mode), result)
        if fed:
            inputs = frozenset[int]() if as_data else frozenset[int]().union(*map(self.inputs_of, tensors))
            self._fed.update((memory(t), inputs) for t in tensors_in(result))
        if sized or any(memory(t) in self._sized for t in tensors):
            fixed = {t.shape for t in tensors if memory(t) not in self._sized}
            self._sized.update(memory(t) for t in tensors_in(result) if sized or t.shape not in fixed)
        self._append(func, args, kwargs, result)
        return result

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` as it is, for its nodes, before it is given another shape or memory."""
        node, now = self.node(tensor), cast(torch.Tensor, torch.ops.aten.alias.default(tensor))
        for earlier in self.graph.nodes:
            if earlier.meta.get("val") is tensor:
                earlier.meta["val"] = now
        self._known[id(now)] = (now, node)
        return now

    def renew(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """``tensor`` is given the memory of ``other``."""
        with without_modes():
            self.kept(tensor)
        self._known[id(tensor)] = (tensor, self.node(other))

    def is_data(self, tensor: torch.Tensor) -> bool:
        """It is computed from weights, or such values have been written into it."""
        return tensor.is_meta or memory(tensor) in self._data

    def is_fed(self, tensor: torch.Tensor) -> bool:
        """The inputs or data decide its values."""
        return tensor.is_meta or (not is_batched(tensor) and memory(tensor) in self._fed)

    def inputs_of(self, tensor: torch.Tensor) -> frozenset[int]:
        """The numbers of the inputs that it is control from."""
        return self._fed.get(memory(tensor), frozenset())

    def is_sized(self, tensor: torch.Tensor) -> bool:
        """The inputs or data decide its shape."""
        return not is_batched(tensor) and memory(tensor) in self._sized

    def _masks(self, indices: Sequence[torch.Tensor | None]) -> bool:
        """One of ``indices`` picks as many rows as the input or data say; row numbers pick as many as they are."""
        return any(i is not None and i.dtype == torch.bool and self.is_fed(i) for i in indices)

    def _introduce(self, tensor: torch.Tensor, name: str) -> Node:
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after():
            node = self.graph.placeholder(name.replace(".", "_"))
        node.meta["val"] = tensor
        self._known[id(tensor)] = (tensor, node)
        return node

    def _append(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if len(self.graph.nodes) > self.most:
            raise RuntimeError(f"the pass makes more than {self.most:g} calls")
        node = self._call(func, *mapped(self.node, (args, kwargs)))
        node.meta["nn_module_stack"] = {self.path[-1]: (self.path[-1], nn.Module)}
        parts = enumerate(result) if isinstance(result, (tuple, list)) else ()
        for i, item in parts:
            if isinstance(item, torch.Tensor):
                part = self._call(operator.getitem, (node, i), {})
                part.meta.update(node.meta, val=item)
                self._known[id(item)] = (item, part)
        if isinstance(result, torch.Tensor):
            node.meta["val"] = result
            self._known[id(result)] = (result, node)

    def _turned(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor is given another shape in place: a view of what it was is what it is."""
        if (view := functional(func)) is None:
            raise NotImplementedError(f"{func} gives a tensor other memory, which cannot be followed")
        before = self.kept(args[0])
        func(*args, **kwargs)
        self._append(view, (before, *args[1:]), kwargs, args[0])
        return args[0]

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A node; its arguments come later, as fx would look for symbolic numbers in them, and there are none."""
        node = self.graph.create_node("call_function", func, name=op_name(func))
        node.args, node.kwargs = args, kwargs
        return node


class _Numbers(TorchFunctionMode):
    """Numbers in the code that become a tensor on the data's device, meta, would lose their values: keep them real.
    Numbers that the code takes out of tensors are told ones.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Told) and value.origin == "data":  # a product with it, say, is one with a constant
                value.asked.take("data")
        if func not in _WATCHED:
            return func(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            tensor, index = args
            parts = index if isinstance(index, tuple) else (index,)
            real = tuple(torch.tensor(part, device="cpu") if isinstance(part, list) else part for part in parts)
            args = (tensor, real if isinstance(index, tuple) else real[0])
        elif func in _NUMBERS and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.__format__ and self.recorder.is_fed(args[0]):  # mostly for a message
            self.recorder.asked.values[asking_line()] = None
        if func in _PLAIN and self.recorder.is_fed(args[0]):
            self.recorder.asked.take(_origin(args[0]), self.recorder.inputs_of(args[0]))
        if func is torch.Tensor.__len__ and args[0].ndim and args[0].shape[0] in self.recorder.lengths:
            self.recorder.asked.lengths |= {SHORTEST, LONGEST}  # Python makes it plain: the ends of the range are tried
        if func is torch.Tensor.__len__ and self.recorder.is_sized(args[0]):
            self.recorder.asked.take("control", self.recorder.inputs_of(args[0]))
        if func in _ON_ONE_DEVICE:  # states that the module begins with, on the device that it was told; a codebook
            args = to_meta(args)
        if func == _SET_DATA:  # not the same object each time
            self.recorder.renew(*args)
        result = func(*args, **kwargs)
        if func == _DEVICE:
            return _CPU if result == META else result
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.meta.", "torch.")
        if func in _SIZES:
            return self._sized(result, by_values=self.recorder.is_sized(args[0]))
        if func in _TOLD and self.recorder.is_fed(args[0]):
            asked, inputs = self.recorder.asked, self.recorder.inputs_of(args[0])
            asked.values[asking_line()] = None
            self.recorder.counted |= not inputs
            return _each(result, lambda number: told(number, asked, _origin(args[0]), inputs))
        return result

    def _sized(self, size: Any, *, by_values: bool) -> Any:
        """A shape, or one of its numbers, as told ones, where they are a length of the inputs or hang on values."""
        if isinstance(size, int):
            told_of = by_values or size in self.recorder.lengths
            return told(size, self.recorder.asked, "control" if by_values else "length") if told_of else size
        known = not by_values and self.recorder.lengths.isdisjoint(size)
        return size if known else torch.Size(self._sized(n, by_values=by_values) for n in size)


def _origin(tensor: torch.Tensor) -> TakenFrom:
    return "data" if tensor.is_meta else "control"


def _each(values: Any, change: Callable[[Any], Any]) -> Any:
    return [_each(value, change) for value in values] if isinstance(values, list) else change(values)


def record(
    model: nn.Module, example: Mapping[str, Any], mode: Mode = "example", most: float = math.inf
) -> tuple[Recorder, Any]:
    """Run ``model``, as ``prepared`` makes it, once on a copy of a real ``example``, which it may write into: the
    recorder, and the output.
    """
    example = {name: on_cpu(value) if isinstance(value, torch.Tensor) else value for name, value in example.items()}
    inputs = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers()), **inputs}
    recorder = Recorder(named, inputs.values(), mode, most)
    recorder.inputs = {name: recorder.given(value) for name, value in inputs.items()}
    drawing = torch.random.fork_rng(devices=[])  # the run is real where it does not depend on weights
    eagerly = torch.compiler.set_stance("force_eager")
    with quiet(), drawing, eagerly, torch.no_grad(), _paths(model, recorder), _Numbers(recorder), recorder:
        return recorder, model(**example)


@contextmanager
def _paths(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the path of the module whose forward is running on top of ``recorder.path``."""
    path, asked = recorder.path, recorder.asked

    def enter(name: str) -> None:
        path.append(name)
        asked.module = name

    def leave() -> None:
        del path[-1]
        asked.module = path[-1]

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(module.register_forward_hook(lambda *_: leave()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
