"""Facts about the nodes of one traced graph: what depends on the input, what is a weight, what is a norm, and which
values carry the residual stream. Each is computed in a single pass in execution order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.map import NormKind
from spikepatch.residual.ops import last, op, operands, shape
from spikepatch.residual.trace import Trace
from spikepatch.source.private import schema


@dataclass(frozen=True)
class NormNode:
    """A norm in the graph: ``output`` is the node behind the division by the statistic.

    ``factor`` is what was multiplied before that, in norms that put their gain first; other gains come behind.
    """

    output: Node
    input: Node
    kind: NormKind
    eps: float
    factor: Node | None = None


class Facts:
    """The facts of one graph.

    Attributes:
        nodes, order: all nodes in execution order, and the place of each.
        weight: nodes that are one parameter, seen through views -> its name.
        fed: nodes computed from the inputs, as data or as control.
        varies: nodes computed from embedded tokens or real-valued inputs.
        inputs: of these nodes -> the inputs that they are computed from, as data.
        norm_at: nodes that are a norm's output -> the norm.
        carries: nodes that carry the stream -> the operands through which they do; computed anew for another root.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace: Trace = trace
        self.nodes: list[Node] = list(trace.graph.nodes)
        self.order: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self.weight: dict[Node, str] = self._weight_views()
        self.fed: set[Node] = self._fed()
        self.varies: set[Node] = self._input_dependent()
        self.inputs: dict[Node, frozenset[Node]] = self._inputs_of_data()
        self.norm_at: dict[Node, NormNode] = {
            node: norm for node in self.nodes if (norm := self._norm(node)) is not None
        }
        self.carries: dict[Node, list[Node]] = self.carriers(None)

    def _weight_views(self) -> dict[Node, str]:
        """Nodes that are one parameter, seen through views, casts, gathers and constant factors -> its name."""
        weight: dict[Node, str] = dict(self.trace.parameters)
        for node in self.nodes:
            arguments = operands(node)
            constant = all(a in weight or a in self.trace.buffers for a in arguments)
            seen_through = op(node) in ops.VIEWS or (op(node) in ops.PRODUCTS and constant)
            names = {weight[a] for a in arguments if a in weight}
            if seen_through and len(names) == 1 and arguments[0] in weight:
                weight[node] = names.pop()
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
        arguments = operands(node)[:1] if op(node) in ops.VIEWS else operands(node)  # type_as reads a dtype only
        return [a for a in arguments if a in self.varies and floating(a)]

    def product(self, node: Node) -> bool:
        """A matmul, or a convolution that mixes channels (a depthwise one only moves values between positions)."""
        if op(node) in ops.CONVOLUTIONS:
            return shape(operands(node)[1])[1] > 1  # (out, in / groups, *kernel)
        return op(node) in ops.MATMULS

    def carriers(self, root: Node | None) -> dict[Node, list[Node]]:
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

    def _norm(self, node: Node) -> NormNode | None:
        """Recognise a norm, fused or written out: ``x * f(mean(x^2))`` with f made of pointwise ops and numbers."""
        name = op(node)
        if name in ops.NORMS:
            fused: NormKind = "rmsnorm" if "rms" in name else "layernorm"
            return NormNode(node, operands(node)[0], fused, _eps(node))
        if name not in ops.PRODUCTS or len(operands(node)) != 2 or last(node) < 2 or node not in self.varies:
            return None
        first, second = operands(node)
        for value, statistic in ((first, second), (second, first)):
            if name != "mul" and value is second:
                break
            if last(value) != last(node) or statistic not in self.varies:
                continue
            found = self._statistic_of(statistic, value)
            if found is not None:
                return dataclasses.replace(found, output=node)
        return None

    def _statistic_of(self, statistic: Node, value: Node) -> NormNode | None:
        """Is ``statistic`` a per-token reduction of ``value``, or of what ``value`` is a cast, a multiple by weights or
        the centred form of? The norm, whose output is not known here.
        """
        roots = [value]
        hops: list[str] = []  # from each root to the next
        factors: list[Node] = []
        while True:  # through casts, gains that come first, and one subtraction of the mean
            node = roots[-1]
            moving = [a for a in operands(node) if a in self.varies]
            if op(node) in {"to", "_to_copy", "alias", "clone", "detach", "contiguous", "type_as"}:
                hops.append("cast")
            elif op(node) == "sub" and len(operands(node)) == 2 and _is_mean(operands(node)[1]):
                hops.append("centring")
            elif op(node) == "mul" and len(moving) == 1 and last(moving[0]) == last(node) and not ops.squares(node):
                hops.append("factor")
                factors += [a for a in operands(node) if a not in self.varies]
            else:
                break
            roots.append(moving[0] if hops[-1] == "factor" else operands(node)[0])
        seen: set[Node] = set()
        todo = [statistic]
        reduced = squared = False
        eps = 0.0
        reached = -1
        on_statistic: Node | None = None
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in roots:
                reached = max(reached, roots.index(node))
                continue
            if node not in self.varies:  # a gain that was multiplied with the statistic first
                on_statistic = node if node in self.weight else on_statistic
                continue
            if op(node) not in ops.STATISTIC or len(seen) > 40:
                return None
            moment = op(node) in {"var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"}
            reduced |= moment or op(node) in {"mean", "sum"}
            squared |= moment or op(node) in {"pow", "square"} or (op(node) == "mul" and len(operands(node)) == 1)
            numbers = [a for a in node.args[1:] if isinstance(a, float)]
            if op(node) in {"add", "clamp", "clamp_min", "maximum"} and numbers:
                eps = _as_written(numbers[0])
            if not operands(node):
                return None
            todo.extend(operands(node))
        if not (reduced and squared) or reached < 0:
            return None
        while reached < len(hops) and hops[reached] != "factor":  # a factor before the statistic is none of the norm's
            reached += 1
        kind: NormKind = "layernorm" if "centring" in hops[:reached] else "rmsnorm"
        own = factors[: hops[:reached].count("factor")]
        return NormNode(value, roots[reached], kind, eps, own[-1] if own else on_statistic)

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


def _eps(node: Node) -> float:
    """Of a fused norm. Arguments that have their default may be left out."""
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    of_op = schema(node.target)
    defaults = [a.default_value for a in of_op.arguments if a.name == "eps"] if of_op is not None else []
    return float([0.0, *(d for d in defaults if d is not None), *numbers][-1])


def _as_written(number: float) -> float:
    """1e-05 for 9.999999747378752e-06: torch writes out some norms with their eps rounded to float32."""
    short = float(f"{number:.6g}")
    return short if float(torch.tensor(short, dtype=torch.float32)) == number else number


def _is_mean(node: Node) -> bool:
    node = _uncast(node)
    if op(node) == "getitem":  # the second result of an operation that gives both moments
        return node.args[1:] == (1,) and op(operands(node)[0]) in {"var_mean", "std_mean"}
    return op(node) == "mean"


def _uncast(node: Node) -> Node:
    while op(node) in {"to", "_to_copy", "expand", "unsqueeze"}:
        node = operands(node)[0]
    return node
