"""How the graph uses a weight: the axis that its matmul sums over, and the gain and bias that stand behind a norm."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.facts import Facts
from spikepatch.residual.norms import NormNode
from spikepatch.residual.ops import last, op, shape

_PERMUTATIONS = frozenset("t transpose swapaxes permute movedim numpy_T mT".split())
_RESHAPES = frozenset("view reshape _unsafe_view view_as flatten unflatten squeeze unsqueeze".split())


class Fan(NamedTuple):
    """Lengths and axes of a matmul's weight, as in ``residual.map.Matrix``."""

    fan_in: int
    fan_out: int
    in_axis: int
    out_axis: int


def factors(node: Node) -> list[Node]:
    """The operands that a matmul multiplies: without the bias of a fused one, and without offsets of groups."""
    if op(node) == "einsum":
        tensors = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    else:
        tensors = node.args[1:3] if op(node) in {"addmm", "baddbmm"} else node.args[:2]
    return [tensor for tensor in tensors if isinstance(tensor, Node)]


def matrix_weight(facts: Facts, node: Node) -> Node | None:
    """The operand of a product that is a parameter, seen as a matrix; None for a product of activations."""
    weights = [a for a in factors(node) if a in facts.weight and len(shape(a)) > 1]
    return weights[0] if weights and facts.product(node) else None


def fan(facts: Facts, matmul: Node, weight: Node) -> Fan | None:
    """Of the parameter that ``matmul`` sees as its operand ``weight``; None where it sums over none of its axes."""
    if op(matmul) in ops.CONVOLUTIONS:  # (out, in / groups, *kernel)
        axes, sizes = _axes(facts, weight), shape(weight)
        return Fan(math.prod(sizes[1:]), sizes[0], axes[1], axes[0])
    if op(matmul) == "einsum":
        summed, spread = _einsum(matmul, weight)
        if not summed or not spread:
            return None
    else:
        last_is_summed = op(matmul) == "linear" or weight is factors(matmul)[0]
        summed, spread = ([-1], [-2]) if last_is_summed else ([-2], [-1])
    axes, sizes = _axes(facts, weight), shape(weight)
    longest = [max(group, key=sizes.__getitem__) for group in (summed, spread)]
    fans = [math.prod(sizes[i] for i in group) for group in (summed, spread)]
    return Fan(*fans, *(axes[i] for i in longest))


def _einsum(node: Node, weight: Node) -> tuple[list[int], list[int]]:
    """Axes of ``weight`` that the equation sums over, and that it keeps; not those shared with the other operand."""
    equation = node.args[0]
    assert isinstance(equation, str)
    inputs, _, result = equation.replace(" ", "").partition("->")
    tensors = factors(node)
    mine = inputs.split(",")[tensors.index(weight)]
    others = "".join(term for term, tensor in zip(inputs.split(","), tensors, strict=True) if tensor is not weight)
    summed = [i for i, letter in enumerate(mine) if letter not in result]
    kept = [i for i, letter in enumerate(mine) if letter in result]
    return summed, [i for i in kept if mine[i] not in others] or kept


def _axes(facts: Facts, node: Node) -> tuple[int, ...]:
    """For each axis of ``node``, a view of a parameter, the axis of the parameter that it runs along; -1: none."""
    if node in facts.trace.parameters:
        return tuple(range(len(shape(node))))
    source = next(a for a in ops.operands(node) if a in facts.weight)
    before, name = _axes(facts, source), op(node)
    if name in _PERMUTATIONS:
        assert callable(node.target)
        # No axis is as long as another here, so the lengths of the result tell where each went.
        moved = node.target(torch.empty(*range(2, 2 + len(before)), device="meta"), *node.args[1:], **node.kwargs)
        return tuple(before[size - 2] for size in moved.shape)
    if name in _RESHAPES:
        return _regrouped(before, shape(source), shape(node))
    if name in {"select", "unbind"}:
        dropped = _number(node, 1)
        return tuple(axis for i, axis in enumerate(before) if i != dropped % len(before))
    if name == "index":
        return _indexed(before, node)
    return (-1,) * (len(shape(node)) - len(before)) + before  # casts, slices, parts, broadcasts


def _number(node: Node, position: int) -> int:
    value = node.args[position] if len(node.args) > position else 0
    assert isinstance(value, int)
    return value


def _indexed(before: tuple[int, ...], node: Node) -> tuple[int, ...]:
    indices: Any = node.args[1]
    axes: list[int] = []
    for axis, index in zip(before, [*indices, *[None] * (len(before) - len(indices))], strict=True):
        axes += [axis] * (1 if index is None else len(shape(index)))
    return tuple(axes)


def _regrouped(before: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """Axes after a reshape: those that an axis is split into run along it; merged ones along the longest of them."""
    axes = [-1] * len(new)
    i = j = 0
    while i < len(old) and j < len(new):
        next_i, next_j, have, want = i + 1, j + 1, old[i], new[j]
        while have != want:
            if have < want:
                have, next_i = have * old[next_i], next_i + 1
            else:
                want, next_j = want * new[next_j], next_j + 1
        longest = max(range(i, next_i), key=old.__getitem__)
        axes[j:next_j] = [before[longest]] * (next_j - j)
        i, j = next_i, next_j
    return tuple(axes)


class Gain(NamedTuple):
    """What a norm's result is multiplied by, and what is added to it; parameters by name."""

    convention: Literal["w", "1+w", "none"]
    parameter: str | None
    bias: str | None


def gain(facts: Facts, norm: NormNode) -> Gain:
    """The gain and bias of ``norm``: arguments of a fused op, or a product and a sum behind one that is written out."""
    if op(norm.output) in ops.NORMS:
        convention, parameter = _convention(facts, ops.argument(norm.output, "weight"))
        bias = ops.argument(norm.output, "bias")
        if parameter is not None:
            return Gain(convention, parameter, facts.weight.get(bias) if isinstance(bias, Node) else None)
    if norm.factor is not None:
        convention, parameter = _convention(facts, norm.factor)
        if parameter is not None:
            return Gain(convention, parameter, _added(facts, norm.output))
    todo = [norm.output]
    while todo:
        node = todo.pop(0)
        for user in node.users:
            others = [a for a in ops.operands(user) if a is not node]
            if op(user) == "mul" and len(others) == 1:
                convention, parameter = _convention(facts, others[0])
                if parameter is not None:
                    return Gain(convention, parameter, _added(facts, user))
            follows = op(user) in ops.VIEWS or (op(user) in ops.PRODUCTS and not others)
            if follows and user in facts.varies and last(user) % max(last(node), 1) == 0:
                todo.append(user)
    return Gain("none", None, None)


def _convention(facts: Facts, factor: object) -> tuple[Literal["w", "1+w", "none"], str | None]:
    while isinstance(factor, Node):
        if factor in facts.weight:
            return "w", facts.weight[factor]
        weights = [a for a in ops.operands(factor) if a in facts.weight]
        if op(factor) == "add" and len(weights) == 1:
            offset = next((a for a in factor.args if isinstance(a, (int, float))), None)
            return ("1+w", facts.weight[weights[0]]) if offset == 1 else ("none", None)
        if op(factor) not in ops.VIEWS:
            break
        factor = ops.operands(factor)[0]
    return "none", None


def _added(facts: Facts, node: Node) -> str | None:
    for user in node.users:
        if op(user) == "add":
            return next((facts.weight[a] for a in ops.operands(user) if a in facts.weight), None)
    return None
