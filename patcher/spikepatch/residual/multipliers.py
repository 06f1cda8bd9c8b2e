"""Constant factors that stand in the code: between a projection and the stream, or on its weight."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.execute import run
from spikepatch.residual.facts import Facts
from spikepatch.residual.ops import argument, behind_views, op, operands
from spikepatch.residual.own_size import constant_factor
from spikepatch.residual.proof import Term
from spikepatch.residual.weights import matrix_weight

#: Of a factor that is measured in float32.
_ROUNDING = 1e-5


def number_in(facts: Facts, node: Node) -> float | None:
    """The number that a product multiplies with or divides by: a literal, a buffer, or computed from such; of several
    numbers their root mean square. None where it is learned, or computed from the input.
    """
    for value in node.args[:2]:
        if isinstance(value, (int, float)):
            return float(value)
    others = [a for a in operands(node) if a not in facts.varies and a not in facts.weight]
    if len(others) != 1 or not _is_constant(facts, others[0]):
        return None
    try:
        found: torch.Tensor = run(facts.trace, others, {}, {})[others[0]]
    except (IndexError, RuntimeError, NotImplementedError):  # an operation that the CPU lacks
        return None
    found = found.double()
    same = found.numel() > 0 and bool((found == found.flatten()[0]).all())
    return float(found.flatten()[0] if same else found.square().mean().sqrt())


def _is_constant(facts: Facts, node: Node) -> bool:
    """Neither a parameter nor an input has a part in it."""
    cone = facts.behind([node])
    return cone.isdisjoint(facts.trace.parameters) and cone.isdisjoint(facts.fed)


def _times(facts: Facts, node: Node) -> float:
    """The constant factor that one operation applies."""
    number = number_in(facts, node) if op(node) in ops.PRODUCTS and node not in facts.norm_at else None
    return 1.0 if number is None else number if op(node) == "mul" else 1 / number if number else 0.0


def multiplier(facts: Facts, term: Term, matmul: Node, steps: list[Node], addition: Node) -> float:
    """The constant factor between the projection and the stream, its weight's own ones included.

    It is the product of the factors of all ``steps`` between, unless the term is measured to be another multiple of the
    product: the sum of a value with itself has no factor in it. ``addition``: where the term joins the stream.
    """
    factor = math.prod(_times(facts, node) for node in steps)
    measured = constant_factor(facts, term)
    if measured is not None and not math.isclose(measured, factor, rel_tol=_ROUNDING):
        factor = float(f"{measured:.6g}")
    return factor * _of_weight(facts, matmul) * _added_times(facts, addition, term.node)


def _added_times(facts: Facts, addition: Node, term: Node) -> float:
    """What an addition multiplies its second operand with; ``term`` may be a part of that."""
    alpha = argument(addition, "alpha")
    second = addition.args[0] if op(addition) == "rsub" else addition.args[1] if len(addition.args) > 1 else None
    if not isinstance(alpha, (int, float)) or alpha == 1 or not isinstance(second, Node):
        return 1.0
    return abs(float(alpha)) if term in facts.behind([second]) else 1.0


def _of_weight(facts: Facts, matmul: Node) -> float:
    before = facts.data(matmul) if op(matmul) in ops.ADDS else [matmul]
    weight = matrix_weight(facts, behind_views(before[0]))
    return 1.0 if weight is None else times_parameter(facts, weight)


def times_parameter(facts: Facts, node: Node) -> float:
    """The constant factors that a parameter is multiplied with before it is ``node``."""
    factor = 1.0
    while node in facts.weight and node not in facts.trace.parameters:
        factor *= _times(facts, node)
        node = next(a for a in operands(node) if a in facts.weight)
    return factor
