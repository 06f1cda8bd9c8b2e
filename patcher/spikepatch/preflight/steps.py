"""A few AdamW steps on one batch: movement, not only the starting point."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import Node

from spikepatch.errors import Refused
from spikepatch.preflight.backward import objective
from spikepatch.preflight.forward import size_at
from spikepatch.preflight.program import NodeValues, Program, Weights, run_piece
from spikepatch.preflight.result import TrialStep
from spikepatch.progress import Progress
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.ops import FUSED_ATTENTION, SOFTMAX, op, operands
from spikepatch.source.formats import fits_in_memory, size


def run_steps(
    program: Program,
    residual: ResidualMap,
    weights: Weights,
    *,
    steps: int,
    lr: float,
    vocabulary: int | None,
    progress: Progress,
) -> Iterator[TrialStep]:
    """The values before each of ``steps`` AdamW steps (betas 0.9 and 0.999, weight decay 0.01), and after the last.

    The batch stays the same, so that a loss that rises is the optimiser's doing.

    Raises:
        Refused: weights, gradients and optimiser state do not fit into half of this machine's memory.
    """
    nodes = {program.stream.facts.trace.parameters[p]: p for piece in program.pieces for p in piece.parameters}
    needed = sum(16 * node.meta["val"].numel() for node in nodes.values())
    if not fits_in_memory(needed):
        raise Refused(
            what="--steps needs the whole model in memory",
            where=size(needed),
            why="weights, gradients and AdamW's two moments, in float32, are more than half of this machine's memory",
            remedy="leave --steps out, or check a config of the same depth and a smaller width",
        )
    leaves = {name: program.parameter(node, weights).clone().requires_grad_() for name, node in nodes.items()}
    optimiser = torch.optim.AdamW(leaves.values(), lr=lr)
    for i in range(steps + 1):
        progress("optimiser steps", i, steps)
        optimiser.zero_grad()
        loss, first, last, logit = _forward(program, residual, leaves, vocabulary)
        loss.backward()  # type: ignore[no-untyped-call]
        squares = sum(float(leaf.grad.pow(2).sum()) for leaf in leaves.values() if leaf.grad is not None)
        yield TrialStep(i, float(loss.detach()), math.sqrt(squares), first, last, logit)
        if i < steps:
            optimiser.step()


def _forward(
    program: Program, residual: ResidualMap, leaves: dict[str, torch.Tensor], vocabulary: int | None
) -> tuple[torch.Tensor, float, float, float | None]:
    """The loss; the stream's size at the first and the last point of the stream; the largest attention logit."""
    names = program.stream.facts.trace.parameters
    attention = {n for s in program.sublayers if s.kind == "attention" for n in s.interior}
    softmaxes = {n for n in attention if op(n) in FUSED_ATTENTION | SOFTMAX}
    values: NodeValues = {}
    logits: list[float] = []
    first, last = program.points[0], program.points[-1]
    sizes: dict[Node, float] = {}
    with torch.enable_grad():
        for i, piece in enumerate(program.pieces):
            inside = [n for n in piece.nodes if n in softmaxes]
            read = {a for n in inside for a in operands(n)} & {*piece.nodes, *piece.needs}
            keep = ({*program.alive[i], piece.point} & set(piece.nodes)) | read
            values |= run_piece(program, piece, values, {p: leaves[names[p]] for p in piece.parameters}, keep)
            logits += [_largest_logit(program, node, values) for node in inside]
            if piece.point in (first, last):
                sizes[piece.point] = size_at(program, residual, piece.point, values[piece.point].detach()).mean
            values = {n: v for n, v in values.items() if n in program.alive[i] or n is program.pieces[-1].point}
        loss = objective(program, values[program.pieces[-1].point], vocabulary)
    return loss, sizes[first], sizes[last], max(logits, default=None)


def _largest_logit(program: Program, node: Node, values: NodeValues) -> float:
    """Before the softmax and without the mask, which only takes away."""

    def value(argument: Node) -> torch.Tensor:
        found: torch.Tensor = values[argument] if argument in values else program.static[argument]
        return found.detach()

    if op(node) in SOFTMAX:
        return float(value(operands(node)[0]).max())
    query, key = (value(argument) for argument in operands(node)[:2])
    scale = node.kwargs.get("scale") or query.shape[-1] ** -0.5
    if query.shape[1] != key.shape[1]:  # grouped queries
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    assert isinstance(scale, float)
    return float((query @ key.transpose(-2, -1)).max()) * scale
