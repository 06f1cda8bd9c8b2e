"""The backward pass of a measurement, piece by piece from the last: the loss, and gradients along the stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.nn import functional

from spikepatch.preflight.program import NodeValues, Piece, Program, Weights, is_float, run_piece
from spikepatch.progress import Progress
from spikepatch.residual.map import ResidualMap


@dataclass(frozen=True)
class Gradients:
    """What one backward pass shows of the loss L.

    Attributes:
        loss: L, in nats; None where the output holds no logits and something else is differentiated.
        points: point of the stream -> ||dL/dx||.
        groups: group of parameters -> norm of its gradient.
    """

    loss: float | None
    points: Mapping[Node, float]
    groups: dict[str, float]


def backward(
    program: Program,
    residual: ResidualMap,
    weights: Weights,
    saved: list[NodeValues],
    *,
    vocabulary: int | None,
    progress: Progress,
) -> Gradients:
    """Differentiate by every point of the stream and every parameter, with the weights of one piece at a time.

    Args:
        saved: the inputs of every piece, from the forward pass; emptied on the way.
        vocabulary: the output holds logits over that many tokens; None: it is something else, and has no loss.
        progress: told (step, done, total).
    """
    groups = _groups(residual)
    squares: dict[str, float] = {}
    gradients: dict[Node, torch.Tensor] = {}
    points = dict.fromkeys(program.points, 0.0)
    loss: float | None = None
    for i in range(len(program.pieces) - 1, -1, -1):
        piece = program.pieces[i]
        progress("backward", len(program.pieces) - 1 - i, len(program.pieces))
        if piece.point in gradients:
            points[piece.point] = float(gradients[piece.point].norm())
        own, value = _through(program, piece, weights, saved.pop(), gradients, vocabulary)
        loss = value if value is not None else loss
        edge = {0: "embedding", len(program.pieces) - 1: "head"}.get(i, "other matrices")
        for parameter, square in own.items():
            name = program.stream.facts.trace.parameters[parameter]
            group = groups.get(name, edge if parameter.meta["val"].ndim > 1 else "norms and biases")
            squares[group] = squares.get(group, 0.0) + square
    return Gradients(loss, points, {group: math.sqrt(square) for group, square in squares.items()})


def _through(
    program: Program,
    piece: Piece,
    weights: Weights,
    saved: NodeValues,
    gradients: dict[Node, torch.Tensor],
    vocabulary: int | None,
) -> tuple[dict[Node, float], float | None]:
    """Squared norms of the gradients of the piece's parameters, and of the last piece the loss, if it has one;
    ``gradients`` goes from the piece's outputs to its inputs.

    A function of its own, so that weights and gradients of one piece are gone before those of the next are there.
    """
    inputs = {n: v.detach().requires_grad_() if is_float(v) else v for n, v in saved.items()}
    parameters = {p: program.parameter(p, weights).requires_grad_() for p in piece.parameters}
    loss: float | None = None
    with torch.enable_grad():
        results = run_piece(program, piece, inputs, parameters, ({*gradients} & set(piece.nodes)) | {piece.point})
        if piece.point is program.pieces[-1].point:
            value = objective(program, results[piece.point], vocabulary)
            if vocabulary is not None:
                loss = float(value.detach())
            ends, seeds = [value], [torch.ones_like(value)]
        else:
            pairs = [(r, gradients.pop(n)) for n, r in results.items() if n in gradients]
            ends, seeds = [r for r, _ in pairs], [g for _, g in pairs]
        leaves = {n: v for n, v in {**inputs, **parameters}.items() if is_float(v)}
        grads = torch.autograd.grad(ends, list(leaves.values()), seeds, allow_unused=True)
    squares = {}
    for node, grad in zip(leaves, grads, strict=True):
        if grad is None:
            continue
        if node in parameters:
            squares[node] = float(torch.linalg.vector_norm(grad)) ** 2
        else:
            gradients[node] = gradients[node] + grad if node in gradients else grad
    return squares, loss


def _groups(residual: ResidualMap) -> dict[str, str]:
    """What each matrix of a sub-layer belongs to, an encoder's included; the rest goes by its size and place."""
    streams = (residual, *residual.streams)
    outputs = (p.parameter for stream in streams for p in stream.residual_projections)
    kinds: dict[str, str] = {m.parameter: m.kind for stream in streams for m in stream.matrices}
    return kinds | dict.fromkeys(outputs, "residual projections")


def objective(program: Program, output: torch.Tensor, vocabulary: int | None) -> torch.Tensor:
    """The next-token loss, in nats; of an output that is no logits, a random projection of unit size."""
    if vocabulary is None:
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(output.shape, generator=generator).to(output)
        return (output * direction).sum() / math.sqrt(output.numel())
    ids = _targets(program)
    logits = output.reshape(ids.shape[0], ids.shape[1], -1)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _targets(program: Program) -> torch.Tensor:
    """The ids whose stream is measured: of the last integer input, which is the decoder's where there are two."""
    trace = program.stream.facts.trace
    ids = [x for x in trace.inputs.values() if not x.is_floating_point()][-1]
    return ids.to(program.device)
