"""Writes in place as data: whoever reads written memory later reads what the write made of it.

The views of one tensor are a tree. A write to one of them gives it a new value, which is put back into what it is a
view of, and read again by the other views of that; operations in place become their functional forms. So no two values
of a graph share memory, and each may be replaced by another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from spikepatch.residual.on_meta import functional
from spikepatch.residual.ops import op, shape, writes
from spikepatch.source.private import schema

_ATEN = torch.ops.aten

#: Views that keep the order of the elements, where they keep all; and those whose result is a list of parts.
_IN_ORDER = frozenset("view _unsafe_view unsqueeze squeeze flatten unflatten slice narrow alias detach".split())
#: With memory of its own, in the order of the elements.
_ALONE: dict[str, Any] = {"memory_format": torch.contiguous_format}
_CUTS = frozenset("split split_with_sizes chunk unbind".split())


def overwritten(value: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """``value`` after a part of it was written in place by way of ``written``, a view that is not undone here."""
    return value


def redirect_writes(graph: Graph) -> None:
    """Take all writes in place out of ``graph``."""
    if any(writes(node) for node in graph.nodes):
        _Memory(graph).redirect()


class _Memory:
    """``view_of``: of a node, the first one that had its memory. ``held``: of that, the last one, which holds its value
    and which all that stands behind reads. ``family``: all views of one tensor, each behind what it is a view of.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = {node: float(i) for i, node in enumerate(graph.nodes)}
        self.view_of: dict[Node, Node] = {}
        self.held: dict[Node, Node] = {}
        self.family: dict[Node, list[Node]] = defaultdict(list)
        self.made: list[Node] = []

    def redirect(self) -> None:
        for node in list(self.graph.nodes):
            first = node.args[0] if node.args else None
            if not isinstance(first, Node):
                continue
            if writes(node):
                self.write(node, self.known(first))
            elif _is_view(node):
                self.known(first)
                self.view_of[node] = node
                self.held[node] = node
                self.family[self.root(node)].append(node)
        for node in reversed(self.made):
            if not node.users:
                self.graph.erase_node(node)
        for node in self.graph.nodes:
            if node.target is _ATEN.view.default:  # what it reads may lie in memory in another order now
                node.target = _ATEN.reshape.default
            elif node.target is _ATEN.as_strided.default:
                _take_from_a_copy(self.graph, node)

    def known(self, node: Node) -> Node:
        if node not in self.view_of:
            self.view_of[node] = self.held[node] = node
            self.family[node].append(node)
        return self.view_of[node]

    def parent(self, view: Node) -> Node | None:
        """What it is a view of; None of a tensor with memory of its own."""
        first = view.args[0] if _is_view(view) else None
        return self.view_of[first] if isinstance(first, Node) else None

    def root(self, view: Node) -> Node:
        while (parent := self.parent(view)) is not None:
            view = parent
        return view

    def write(self, node: Node, written: Node) -> None:
        changed, before = {written: node}, len(self.made)
        inner, latest = written, node
        while (outer := self.parent(inner)) is not None:
            cut = outer if op(inner) == "getitem" and op(outer) in _CUTS else None
            target = outer if cut is None else self.parent(cut)
            if target is None:
                break
            latest = self._put_back(node, inner, target, changed[inner])
            changed[target] = latest
            inner = target
        family = self.family[self.root(written)]
        wanted = self._read_behind(node, family)
        for other in family:
            if other in changed or other not in wanted:
                continue
            around = self.parent(other)
            if around in changed and not self._apart(other, written):
                again = (other.target, (changed[around], *other.args[1:]), other.kwargs)
                changed[other] = self._insert(node, *again, like=other)
        own = {node, *self.made[before:]}
        for other, value in changed.items():
            for user in self._behind(node, other):
                if user not in own:
                    user.replace_input_with(self.held[other], value)
            self.held[other] = value
            self.view_of[value] = other
        _make_functional(self.graph, node)

    def _behind(self, write: Node, view: Node) -> list[Node]:
        """What stands behind the write and reads the view."""
        return [user for user in self.held[view].users if self.order.get(user, -1.0) > self.order[write]]

    def _read_behind(self, write: Node, family: list[Node]) -> set[Node]:
        """The views that are read behind the write, and what they are views of: no other needs its new value."""
        found: set[Node] = set()
        for view in reversed(family):
            if view in found or self._behind(write, view):
                found.add(view)
                if (parent := self.parent(view)) is not None:
                    found.add(parent)
        return found

    def _insert(self, write: Node, target: Any, args: tuple[Any, ...], kwargs: Any = None, *, like: Node) -> Node:
        """A call behind ``write`` and what was inserted there before; its value is of the shape of ``like``'s."""
        after = self.made[-1] if self.made and math.floor(self.order[self.made[-1]]) == self.order[write] else write
        with self.graph.inserting_after(after):
            made = self.graph.call_function(target, args, kwargs or {})
        made.meta = {**write.meta, "val": like.meta.get("val")}
        self.order[made] = self.order[after] + 1e-5
        self.made.append(made)
        return made

    def _put_back(self, write: Node, inner: Node, outer: Node, value: Node) -> Node:
        """The value of ``outer``, where its view ``inner`` is ``value``."""
        before, name, args = self.held[outer], op(inner), inner.args[1:]
        if (name in _IN_ORDER or name == "getitem") and math.prod(shape(inner)) == math.prod(shape(outer)):
            return self._insert(write, _ATEN.reshape.default, (value, list(shape(outer))), like=outer)
        inverse = {"transpose": _ATEN.transpose.int, "t": _ATEN.t.default, "permute": _ATEN.permute.default}
        if name in inverse:
            if name == "permute":
                axes = [axis % len(shape(outer)) for axis in args[0]]  # type: ignore[union-attr, operator]
                args = ([axes.index(i) for i in range(len(axes))],)
            return self._insert(write, inverse[name], (value, *args), like=outer)
        if name == "slice":
            return self._insert(write, _ATEN.slice_scatter.default, (before, value, *args), like=outer)
        if name == "select":
            return self._insert(write, _ATEN.select_scatter.default, (before, value, *args), like=outer)
        if name == "getitem" and isinstance(cut := inner.args[0], Node) and op(cut) in _CUTS:
            return self._insert(write, *_into_cut(cut, args[0], before, value, shape(outer)), like=outer)
        whole, part = (node.meta.get("val") for node in (outer, inner))
        if isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor) and (place := _place(whole, part)):
            rows = torch.arange(whole.numel()).as_strided(*place)
            if int(rows.flatten().bincount().max()) == 1:  # no element is written twice
                alone = self._insert(write, _ATEN.clone.default, (before,), _ALONE, like=outer)
                return self._insert(write, _ATEN.as_strided_scatter.default, (alone, value, *place), like=outer)
        return self._insert(write, overwritten, (before, value), like=outer)

    def _apart(self, view: Node, written: Node) -> bool:
        """They are in different parts of one cut, and share no memory."""
        others = dict(self._parts(written))
        return any(others.get(cut, part) != part for cut, part in self._parts(view))

    def _parts(self, view: Node) -> Iterator[tuple[Node, Any]]:
        """The cuts that it comes from, and which of their parts it is in."""
        while (parent := self.parent(view)) is not None:
            if op(view) == "getitem" and op(parent) in _CUTS:
                yield parent, view.args[1]
            view = parent


def _is_view(node: Node) -> bool:
    """Of memory of its first argument's; results of one operation have memory of their own each."""
    if op(node) == "getitem":
        return op(node.args[0]) in _CUTS
    known = schema(node.target)
    return known is not None and any(part.alias_info is not None for part in known.returns)


def _place(whole: torch.Tensor, part: torch.Tensor) -> tuple[list[int], list[int], int] | None:
    """Shape, strides and offset of ``part``, a view of ``whole``, in a copy of that in the order of its elements; None
    where there are none, ``part`` reaches beyond it, or an element is in ``whole`` twice.
    """
    count = torch.arange(whole.numel())
    places = torch.empty_strided(whole.shape, whole.stride(), dtype=count.dtype).copy_(count.reshape(whole.shape))
    begin = part.storage_offset() - whole.storage_offset()
    end = begin + sum(stride * (size - 1) for stride, size in zip(part.stride(), part.shape, strict=True))
    if not part.numel() or not 0 <= begin <= end < places.untyped_storage().nbytes() // count.element_size():
        return None
    rows = places.as_strided(part.shape, part.stride(), begin)
    if not torch.equal(places.flatten(), count):
        return None
    first, *seconds = (int(rows[at]) for at in _corner_and_next(rows.shape))
    strides = [second - first for second in seconds]
    last = first + sum(stride * (size - 1) for stride, size in zip(strides, rows.shape, strict=True))
    if min(strides, default=0) < 0 or last >= len(count):
        return None
    place = list(rows.shape), strides, first
    return place if torch.equal(rows, count.as_strided(*place)) else None


def _take_from_a_copy(graph: Graph, node: Node) -> None:
    """A view by places in memory, where that is another one now: by the same elements' places in a copy."""
    viewed = node.args[0]
    assert isinstance(viewed, Node)
    whole, part = viewed.meta.get("val"), node.meta.get("val")
    if isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor) and (place := _place(whole, part)):
        with graph.inserting_before(node):
            alone = graph.call_function(_ATEN.clone.default, (viewed,), _ALONE)
        alone.meta = {**node.meta, "val": torch.empty(whole.shape, dtype=whole.dtype, device="meta")}
        node.args = (alone, *place)


def _corner_and_next(size: torch.Size) -> Iterator[tuple[int, ...]]:
    """The first place, and along each axis the second one, if there is one."""
    yield (0,) * len(size)
    for axis, count in enumerate(size):
        yield tuple(int(at == axis and count > 1) for at in range(len(size)))


def _into_cut(cut: Node, part: Any, before: Node, value: Node, outer: tuple[int, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The operation that puts one part of a cut back, and its arguments."""
    if op(cut) == "unbind":
        return _ATEN.select_scatter.default, (before, value, _axis(cut, 1), part)
    axis, sizes = _axis(cut, 2), cut.args[1]
    if isinstance(sizes, (list, tuple)):
        start = sum(sizes[:part])
    else:
        size = -(-outer[axis] // sizes) if op(cut) == "chunk" else sizes
        start = part * size
    return _ATEN.slice_scatter.default, (before, value, axis, start, start + shape(value)[axis])


def _axis(cut: Node, place: int) -> Any:
    return cut.args[place] if len(cut.args) > place else cut.kwargs.get("dim", 0)


def _make_functional(graph: Graph, node: Node) -> None:
    """``mul_`` becomes ``mul``, or writes into a copy where there is no such operation; ``copy_`` and ``zero_`` become
    what has derivatives.
    """
    if op(node) == "zero":
        node.target = _ATEN.zeros_like.default
        return
    if op(node) == "copy":
        written, source = node.args[:2]
        if isinstance(source, Node):
            with graph.inserting_before(node):
                spread = graph.call_function(_ATEN.expand.default, (source, list(shape(written))))
            spread.meta = {**node.meta, "val": node.meta.get("val")}
            node.target, node.args, node.kwargs = _ATEN._to_copy.default, (spread,), {"dtype": node.meta["val"].dtype}
        return
    if (other := functional(node.target)) is not None:
        node.target = other
        return
    written, *others = node.args
    with graph.inserting_before(node):
        alone = graph.call_function(_ATEN.clone.default, (written,))
    alone.meta = {**node.meta, "val": written.meta.get("val")}  # type: ignore[union-attr]
    node.args = (alone, *others)
