"""Jacobians inside a piece: of the step from one point of the stream to the next, and of the heads; the activation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from spikepatch.preflight.jacobian import SpectralNorm, jacobian_products, spectral_norm
from spikepatch.preflight.program import NodeValues, Piece, Program, Sublayer, part_of, run_piece
from spikepatch.residual.ops import op, operands


def jacobian(
    program: Program,
    piece: Piece,
    start: Node,
    stop: Node,
    at: torch.Tensor,
    inputs: NodeValues,
    parameters: Mapping[Node, torch.Tensor],
) -> SpectralNorm:
    """The spectral norm of d ``stop`` / d ``start`` within a piece, with all its other inputs held.

    Over all tokens at once: sequences do not touch each other, so it is that of the worst sequence of the batch.

    Raises:
        RuntimeError: an operation cannot be differentiated twice.
    """
    part = part_of(program, piece, start, stop)

    def function(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = run_piece(program, part, {**inputs, start: x}, parameters, [stop])[stop]
        return result

    return spectral_norm(*jacobian_products(function, at), at)


def heads_jacobian(
    program: Program, piece: Piece, sublayer: Sublayer, inputs: NodeValues, parameters: Mapping[Node, torch.Tensor]
) -> SpectralNorm | None:
    """||J_Z|| of Eq. 20: from the normed input of an attention to its concatenated heads; None where there is no such.

    Raises:
        RuntimeError: an operation cannot be differentiated twice.
    """
    norm, heads = normed_input(program, sublayer), _input_of(program, sublayer.projections[0][0])
    if sublayer.kind != "attention" or norm is None or heads is None or len(sublayer.projections) != 1:
        return None
    before = part_of(program, piece, sublayer.point, norm)
    with torch.no_grad():
        at = run_piece(program, before, inputs, parameters, [norm])[norm]
    return jacobian(program, piece, norm, heads, at, inputs, parameters)


def normed_input(program: Program, sublayer: Sublayer) -> Node | None:
    """The node at which the normed copy of the stream enters the sub-layer."""
    facts = program.stream.facts
    found = [n for n in sublayer.interior if n in facts.norm_at and same_values(sublayer.point, facts.norm_at[n].input)]
    first = min(found, key=facts.order.__getitem__, default=None)
    parts = [user for user in first.users if op(user) == "getitem"] if first is not None else []
    return parts[0] if parts else first  # the statistics are results too


def _input_of(program: Program, matmul: Node) -> Node | None:
    """What a matmul multiplies its weight with."""
    facts = program.stream.facts
    while not facts.product(matmul):  # the sum with a bias of its own
        matmul = facts.data(matmul)[0]
    return next(iter(facts.data(matmul)), None)


def steepest(
    program: Program, piece: Piece, sublayer: Sublayer, parameters: Mapping[Node, torch.Tensor]
) -> float | None:
    """The steepest slope of the activation between an MLP's two matrices, on +- 20; None where it is not one function
    of each value alone.
    """
    facts = program.stream.facts
    if sublayer.kind != "mlp" or len(sublayer.projections) != 1:
        return None
    last = _input_of(program, sublayer.projections[0][0])
    products = [n for n in facts.behind([last] if last else []) & sublayer.interior if facts.product(n)]
    if last is None or len(products) != 1:
        return None
    part = part_of(program, piece, products[0], last)
    if part.needs != (products[0],):
        return None
    size = products[0].meta["val"].shape
    grid = torch.linspace(-20, 20, size.numel(), dtype=torch.float64).to(program.device)

    def apply(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = values.reshape(size).clone().requires_grad_()
        wide = {p: v.double() for p, v in parameters.items()}
        y = run_piece(program, part, {products[0]: x}, wide, [last])[last]
        return y.detach().flatten(), torch.autograd.grad(y.sum(), x)[0].flatten()

    with torch.enable_grad():
        value, slopes = apply(grid)
        mirrored, _ = apply(grid.flip(0))
    pointwise = value.shape == mirrored.shape and torch.equal(value, mirrored.flip(0))
    return float(slopes.abs().max()) if pointwise else None


def same_values(first: Node, second: Node) -> bool:
    """The two are the same, but for casts and views."""
    return _uncast(first) is _uncast(second)


def _uncast(node: Node) -> Node:
    while op(node) in {"to", "_to_copy", "dropout", "contiguous", "clone", "view", "alias"}:
        node = operands(node)[0]
    return node
