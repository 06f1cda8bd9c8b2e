"""A traced graph rewritten so that its edges follow the data: through writes in place, past joins that are undone."""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, Node

from spikepatch.residual.in_place import redirect_writes
from spikepatch.residual.ops import op, shape, writes


def follow_data(graph: Graph, inputs: Collection[Node] = ()) -> None:
    """Make every node's operands the values that it really reads. The graph is changed in place, its values are not.

    Args:
        inputs: the placeholders of what the model is called with.
    """
    redirect_writes(graph)
    _undo_splits(graph)
    _take_apart(graph)
    _look_up(graph, inputs)


def _undo_splits(graph: Graph) -> None:
    """Whoever reads a part of a concatenation, cut where it was joined, reads the joined tensor itself."""
    for node in graph.nodes:
        source = node.args[0] if op(node) == "getitem" else None
        if not isinstance(source, Node) or op(source) not in {"split", "chunk"}:
            continue
        joined = source.args[0]
        if not isinstance(joined, Node) or op(joined) != "cat":
            continue
        parts: Any = joined.args[0]
        sizes = [shape(part)[_axis(joined)] for part in parts]
        count: Any = source.args[1]
        step = -(-sum(sizes) // count) if op(source) == "chunk" else count
        starts = list(accumulate(sizes, initial=0))[:-1]
        start = node.args[1] * step
        if _axis(joined) == _axis(source) and start in starts and shape(parts[starts.index(start)]) == shape(node):
            node.replace_all_uses_with(parts[starts.index(start)])


def _take_apart(graph: Graph) -> None:
    """A sum with a product in one operation becomes a product and a sum, but for a matrix product with its bias."""
    aten = torch.ops.aten
    parts = {
        "addcmul": aten.mul.Tensor, "addcdiv": aten.div.Tensor, "addmm": aten.mm.default, "baddbmm": aten.bmm.default,
    }  # fmt: skip
    for node in list(graph.nodes):
        if op(node) not in parts or writes(node):
            continue
        added, first, second = node.args[:3]
        biased = not isinstance(added, Node) or added.op == "placeholder" or shape(added) != shape(node)
        if "mm" in op(node) and biased:
            continue
        with graph.inserting_before(node):
            product = _like(graph, node, parts[op(node)], first, second)
            for name in ("value", "alpha"):
                if (factor := node.kwargs.get(name, 1)) != 1:
                    product = _like(graph, node, aten.mul.Tensor, product, factor)
            if (factor := node.kwargs.get("beta", 1)) != 1:
                added = _like(graph, node, aten.mul.Tensor, added, factor)
            whole = _like(graph, node, aten.add.Tensor, added, product)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)


def _like(graph: Graph, node: Node, target: Any, *args: Any) -> Node:
    """A call whose value has the shape of ``node``'s."""
    called = graph.call_function(target, args)
    called.meta = dict(node.meta)
    return called


def _look_up(graph: Graph, inputs: Collection[Node]) -> None:
    """Rows of a table are looked up by the input in three ways: as embedding, by its indices, and by rows that hold a
    single 1, which the table is multiplied with. What is computed from the inputs is no table.
    """
    fed = set(inputs)
    for node in graph.nodes:
        if not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
        if op(node) in {"mm", "matmul", "linear"} and len(node.args) == 2:
            rows, table = node.args
            transposed = op(node) == "linear"
            if not isinstance(rows, Node) or not _one_hot(rows.meta.get("val")):
                continue
        elif op(node) == "index":
            table, (rows, *more) = node.args[0], node.args[1]
            transposed = False
            if more or len(shape(table)) != 2 or not isinstance(rows, Node) or not _is_control(rows, inputs):
                continue
        else:
            continue
        if not isinstance(table, Node) or not _is_data(table) or table in fed:
            continue
        with graph.inserting_before(node):
            ids = rows if op(node) == "index" else _ids_of(graph, rows, node, inputs)
            table = _called(graph, torch.ops.aten.t.default, (table,), node) if transposed else table
            looked_up = graph.call_function(torch.ops.aten.embedding.default, (table, ids))
        looked_up.meta = dict(node.meta)
        fed.add(looked_up)
        node.replace_all_uses_with(looked_up)


def _ids_of(graph: Graph, rows: Node, like: Node, inputs: Collection[Node]) -> Node:
    """Where the single 1 of each row stands; the input itself, if it says that."""
    places = rows.meta["val"].argmax(-1)
    for ids in inputs:
        value = ids.meta["val"]
        if value.numel() == places.numel() and torch.equal(value.reshape(places.shape), places):
            return _called(graph, torch.ops.aten.reshape.default, (ids, list(places.shape)), like)
    return _called(graph, torch.ops.aten.argmax.default, (rows, -1), like)


def _is_data(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_meta


def _is_control(node: Node, inputs: Collection[Node]) -> bool:
    """It is computed from the inputs, and from nothing that weights have a part in."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        each = todo.pop()
        if _is_data(each):
            return False
        if each not in seen:
            seen.add(each)
            todo.extend(each.all_input_nodes)
    return not seen.isdisjoint(inputs)


def _called(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": target(*(a.meta["val"] if isinstance(a, Node) else a for a in args))}
    return node


def _one_hot(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.is_meta or value.ndim < 2 or not value.is_floating_point():
        return False
    return value.shape[-1] > 1 and bool(((value == 1).sum(-1) == 1).all()) and bool(((value != 0).sum(-1) == 1).all())


def _axis(node: Node) -> int:
    """The axis that a cat (tensors, dim) or a split (tensor, size, dim) works along, counted from the front."""
    joins = op(node) == "cat"
    position, tensor = 1 if joins else 2, node.args[0]
    axis: Any = node.args[position] if len(node.args) > position else 0
    return int(axis) % len(shape(tensor[0] if joins and isinstance(tensor, (list, tuple)) else tensor))
