"""How what a sub-layer adds depends on the size of its own projections' products: in proportion, not at all, or else.

A recipe scales residual projections so that less is added to the stream. That works where what is added is in
proportion to the products. A value that is divided by its own size, be it by an L1 norm or by the largest value of a
batch, stays as large as it was; one that is multiplied by a function of itself follows some other law. Both are told by
running what stands between on random products and on larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.execute import run
from spikepatch.residual.facts import Facts, floating
from spikepatch.residual.ops import op, operands, place, shape
from spikepatch.residual.proof import Term

#: What is added grows with the products, stays as it is, or does neither.
Growth = Literal["in proportion", "not at all", "otherwise"]

#: Sizes of the products that are tried; a norm's eps is far below them.
_SIZES = (1.0, 10.0, 1000.0)

#: Of the largest value. An eps of 1e-5 and of more, under the root, is no other law; nor is it where a token's product
#: happens to be multiplied with a weight near zero, which is so for a share of the values.
_TOLERANCE, _SHARE = 1e-2, 0.01

#: Of the largest value: the rounding of a few products in float32.
_EXACT = 1e-5

#: Values that a factor is taken from; all the others are compared with it.
_ENOUGH = 1 << 20

#: Numbers that are drawn at most; a prime, so that no width divides it.
_DRAWN = 1_000_003


def product_with_itself(facts: Facts, term: Term) -> Node | None:
    """The first place where a projection's product is multiplied with, or divided by, something computed from it."""
    from_products = term.path.union(matmul for matmul, _ in term.projections)
    found = [n for n in term.path if op(n) in ops.PRODUCTS and len(from_products.intersection(facts.data(n))) > 1]
    return min(found, key=facts.order.__getitem__, default=None)


def _runs(facts: Facts, term: Term) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]]:
    """A function of the size of the projections' products, in units of drawn ones: the first of these, and the term.

    Everything else that the term is computed from is held: biases at zero, gains at one.
    """
    generator = torch.Generator().manual_seed(0)
    matmuls = {matmul for matmul, _ in term.projections}
    held: dict[Node, torch.Tensor] = {}
    for node in sorted(term.path - matmuls, key=facts.order.__getitem__):
        for operand in operands(node):
            if operand in term.path or operand in held:
                continue
            if op(node) in ops.ADDS and operand not in facts.varies and shape(operand):
                held[operand] = torch.zeros(shape(operand))  # a bias
            elif operand in facts.varies and floating(operand):
                held[operand] = _drawn(operand, generator)
            elif isinstance(value := operand.meta.get("val"), torch.Tensor) and not value.is_meta:
                held[operand] = value
    in_order = sorted(matmuls, key=facts.order.__getitem__)
    products = {node: _drawn(node, generator) for node in in_order}
    seeds = dict.fromkeys(facts.trace.inputs, 0)

    def added(size: float) -> tuple[torch.Tensor, torch.Tensor]:
        values = held | {node: size * product if size != 1 else product for node, product in products.items()}
        result: torch.Tensor = run(facts.trace, [term.node], values, seeds)[term.node]
        return products[in_order[0]], result

    return added


def _drawn(node: Node, generator: torch.Generator) -> torch.Tensor:
    """Numbers for a node; where they are very many, the first ones come again, and not at the same places of a row."""
    count = math.prod(shape(node))
    few = torch.randn(min(count, _DRAWN), generator=generator)
    return few.repeat(-(-count // _DRAWN))[:count].reshape(shape(node))


def growth(facts: Facts, term: Term) -> Growth:
    """How the term grows with its projections' products."""
    try:
        added = _runs(facts, term)
        first, *others = (added(size)[1] for size in _SIZES)
    except (IndexError, RuntimeError, NotImplementedError):  # an operation that the CPU lacks
        return "otherwise"

    def equal(factors: list[float]) -> bool:
        tolerance = _TOLERANCE * float(first.abs().max())
        far = [
            ((other / factor - first).abs() <= tolerance).logical_not()
            for other, factor in zip(others, factors, strict=True)
        ]
        return all(float(values.float().mean()) <= _SHARE for values in far)

    if equal([1.0, 1.0]):
        return "not at all"
    return "in proportion" if equal([size / _SIZES[0] for size in _SIZES[1:]]) else "otherwise"


def _by_inputs(facts: Facts, term: Term) -> bool:
    """A number computed from ids, masks or positions is on the way; a mask of this example, which lets all through,
    is none.
    """
    operand_of_products = {a for node in term.path if op(node) in ops.PRODUCTS for a in operands(node)}
    values = (a.meta.get("val") for a in operand_of_products & facts.fed - facts.varies)
    return any(isinstance(value, torch.Tensor) and not value.is_meta and bool((value != 1).any()) for value in values)


def constant_factor(facts: Facts, term: Term) -> float | None:
    """The number that the product of a term's only projection is multiplied with; None where it is more than that."""
    if len(term.projections) != 1 or product_with_itself(facts, term) is not None or _by_inputs(facts, term):
        return None
    try:
        product, added = _runs(facts, term)(1.0)
    except (IndexError, RuntimeError, NotImplementedError):  # an operation that the CPU lacks
        return None
    if product.numel() != added.numel() or not product.numel():  # an expert that no token chose has no rows
        return None
    product, added = product.flatten(), added.flatten().float()
    first, then = product[:_ENOUGH].double(), added[:_ENOUGH].double()
    factor = float(first @ then / (first @ first))
    difference = float((added - factor * product).abs_().max())
    return factor if difference <= _EXACT * float(added.abs().max()) else None


def other_law(facts: Facts, node: Node, term: Term) -> str:
    """Why a term that grows otherwise is refused."""
    names = ", ".join(name for _, name in term.projections[:3])
    where = place(node) or node.name
    return (
        f"{where}: the product with {names} is multiplied by a function of itself, so that its size is not the weight's"
    )
