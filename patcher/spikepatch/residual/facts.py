"""Facts about the nodes of one traced graph: what depends on the input, what is a weight, what is a norm, and which
values carry the residual stream. Each is computed in a single pass in execution order.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.norms import Forms, NormNode, norms
from spikepatch.residual.ops import last, op, operands, shape
from spikepatch.residual.trace import Trace


class Facts:
    """The facts of one graph.

    Attributes:
        nodes, order: all nodes in execution order, and the place of each.
        weight: nodes that are one parameter, seen through views -> its name.
        fed: nodes computed from the inputs, as data or as control.
        varies: nodes computed from embedded tokens or real-valued inputs.
        inputs: of these nodes -> the inputs that they are computed from, as data.
        forms: what parts of the graph compute, as far as it was measured; another pass of the model may know it.
        norm_at: nodes that are a norm's output -> the norm.
        normed: what norms read -> their outputs.
        carries: nodes that carry the stream -> the operands through which they do.
    """

    def __init__(self, trace: Trace, forms: Forms | None = None) -> None:
        self.trace: Trace = trace
        self.forms: Forms = {} if forms is None else forms
        self.nodes: list[Node] = list(trace.graph.nodes)
        self.order: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self.weight: dict[Node, str] = self._weight_views()
        self.fed: set[Node] = self._fed()
        self.varies: set[Node] = self._input_dependent()
        self._data: dict[Node, list[Node]] = {}
        self.inputs: dict[Node, frozenset[Node]] = self._inputs_of_data()
        self.norm_at: dict[Node, NormNode] = norms(trace, self.data, self.varies, self.weight, self.forms)
        self.normed: dict[Node, list[Node]] = defaultdict(list)
        for output, norm in self.norm_at.items():
            self.normed[norm.input].append(output)
        self.carries: dict[Node, list[Node]] = self._carriers(None)

    def rooted(self, root: Node) -> Facts:
        """The same facts for a stream that begins at ``root``: more nodes carry it."""
        other = copy.copy(self)
        other.carries = self._carriers(root)
        return other

    def _weight_views(self) -> dict[Node, str]:
        """Nodes that are one parameter, seen through views, casts, gathers and constant factors -> its name.

        A product of a parameter with a part of itself is none.
        """
        weight: dict[Node, str] = dict(self.trace.parameters)
        for node in self.nodes:
            arguments = operands(node)
            scaled = sorted(arguments, key=weight.__contains__, reverse=True) if op(node) == "mul" else arguments
            constant = all(a in self.trace.buffers for a in scaled[1:]) and not ops.squares(node)
            if op(node) in ops.VIEWS:
                names = {weight[a] for a in arguments if a in weight}
                if len(names) == 1 and arguments[0] in weight:
                    weight[node] = names.pop()
            elif op(node) in ops.PRODUCTS and constant and scaled[:1] and scaled[0] in weight:
                weight[node] = weight[scaled[0]]
        return weight

    def _fed(self) -> set[Node]:
        """Nodes computed from the inputs, as data or as control: not what is looked up by constant positions."""
        fed = set(self.trace.inputs)
        for node in self.nodes:
            if any(a in fed for a in operands(node)):
                fed.add(node)
        return fed

    def _input_dependent(self) -> set[Node]:
        """Nodes computed from embedded tokens or real-valued inputs: all but weights, constants, positions, masks."""
        varies = {node for node in self.trace.inputs if floating(node)}
        for node in self.nodes:
            computed = node not in self.weight and op(node) not in ops.FACTORIES
            arguments = operands(node)[:1] if op(node) in ops.LIKE_SECOND else operands(node)
            if op(node) in ops.LOOKUPS or (computed and any(a in varies for a in arguments)):
                varies.add(node)
        return varies

    def _inputs_of_data(self) -> dict[Node, frozenset[Node]]:
        found: dict[Node, frozenset[Node]] = {}
        for node in self.nodes:
            if node in self.trace.inputs:
                found[node] = frozenset([node])
            elif node in self.fed:
                data = operands(node) if op(node) in ops.LOOKUPS or node not in self.varies else self.data(node)
                found[node] = frozenset[Node]().union(*(found.get(a, ()) for a in data))
        return found

    def entering(self, node: Node, base: Node) -> list[Node]:
        """Of the values that ``node`` puts together with ``base``: features, which are computed from real-valued inputs
        that ``base`` is not computed from.
        """
        others = [a for a in self.data(node) if a is not base]
        own = self.inputs.get(base, frozenset())
        return [a for a in others if not self.inputs.get(a, own) & own and any(map(floating, self.inputs.get(a, ())))]

    def data(self, node: Node) -> list[Node]:
        """The operands whose values depend on the tokens; indices and offsets that do are control, not data."""
        if node not in self._data:
            arguments = operands(node)[:1] if op(node) in ops.VIEWS else operands(node)  # type_as reads a dtype only
            self._data[node] = [a for a in arguments if a in self.varies and floating(a)]
        return self._data[node]

    def product(self, node: Node) -> bool:
        """A matmul, or a convolution that mixes channels (a depthwise one only moves values between positions)."""
        if op(node) in ops.CONVOLUTIONS:
            return shape(operands(node)[1])[1] > 1  # (out, in / groups, *kernel)
        return op(node) in ops.MATMULS

    def _carriers(self, root: Node | None) -> dict[Node, list[Node]]:
        """Nodes that carry the stream -> the operands through which they do (none for a lookup or the ``root``)."""
        carries: dict[Node, list[Node]] = {}
        for node in self.nodes:
            name = op(node)
            arguments = operands(node)
            moving = self.data(node)
            through: list[Node] = []
            if name in ops.LOOKUPS or node is root:
                carries[node] = []
            elif node in self.norm_at:
                through = [a for a in (self.norm_at[node].input,) if a in carries]
            elif name in ops.ADDS:
                through = [a for a in arguments if a in carries]
            elif name in ops.VIEWS and not narrows(node):
                through = [a for a in arguments[:1] if a in carries]
            elif name in ops.PUT_TOGETHER and len(moving) > 1:
                through = self._put_together(node, moving, carries)
            elif name in ops.PRODUCTS or name in {"masked_fill", "where"}:
                alone = len(moving) == 1 and moving[0] in carries and last(node) == last(moving[0])
                alone = alone and not ops.squares(node)
                through = moving if alone else []
            elif (name in ops.POOLS and last(node) == last(arguments[0])) or (
                name in ops.REPLACED_ROWS and len(moving) == 1  # by rows that do not depend on the input
            ):
                through = [a for a in arguments[:1] if a in carries]
            elif name == "cat":
                through = moving if moving and moving[0] in carries else []
            if through:
                carries[node] = list(dict.fromkeys(through))
        return carries

    def _put_together(self, node: Node, moving: list[Node], carries: Mapping[Node, list[Node]]) -> list[Node]:
        """Operands through which a value carries the stream that is made of rows of several.

        Features may enter among the tokens. Else all carry it: the stream with some rows to which something was added,
        parts along the tokens, or two tracks of a reversible stream side by side.
        """
        base = next((a for a in moving if a in carries), None)
        entering = self.entering(node, base) if base is not None else []
        rest = [a for a in moving if a not in entering]
        chosen = op(node) == "where" and len(rest) > 1
        return rest if rest and not chosen and all(a in carries for a in rest) else []

    def picking(self, output: Node) -> set[Node]:
        """What of the cone of ``output`` is computed from real-valued inputs, and only says which rows of a table are
        looked up: a tokenizer of images or sounds, which no gradient reaches.
        """
        read: set[Node] = set()
        todo = [output]
        while todo:
            node = todo.pop()
            if node not in read:
                read.add(node)
                todo.extend(operands(node)[:1] if op(node) in ops.LOOKUPS else operands(node))
        others = self.behind([output]) - read
        return {node for node in others if all(map(floating, self.inputs.get(node, ())))}

    def behind(self, ends: Iterable[Node], stop: Iterable[Node] = ()) -> set[Node]:
        """Backward cone of ``ends``; nodes in ``stop`` are reached but not entered, and not returned."""
        barrier = set(stop)
        seen: set[Node] = set()
        todo = [n for n in ends if n not in barrier]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            todo.extend(a for a in operands(node) if a not in seen and a not in barrier)
        return seen


def floating(node: Node) -> bool:
    """The node's value is a tensor of floats, or no single tensor."""
    value = node.meta.get("val")
    return value.is_floating_point() if isinstance(value, torch.Tensor) else True


def narrows(node: Node) -> bool:
    """A view that leaves out a part of the stream's last axis (a split of heads keeps the number of elements)."""
    source = operands(node)[0]
    if op(node) == "getitem":
        return op(source) not in ops.NORMS
    if op(node) in {"split", "chunk", "unbind", "split_with_sizes"}:
        return True
    return op(node) in {"slice", "select", "narrow", "index_select", "gather"} and last(node) != last(source)
