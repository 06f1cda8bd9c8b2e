"""What one forward and one backward pass show: sizes along the stream, the loss, gradients, and Jacobians on request.

sigma of a token's vector is its std over the width, or its RMS where an RMSNorm reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.nn import functional

from spikepatch.errors import first_line
from spikepatch.preflight.bounds import gaussian_norm
from spikepatch.preflight.deep import heads_jacobian, jacobian, leads, steepest
from spikepatch.preflight.jacobian import STEPS, SpectralNorm, matrix_norm
from spikepatch.preflight.program import Piece, Program, Sublayer, Values, Weights, is_float, run_piece
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.ops import LOOKUPS, op, operands

Progress = Callable[[str, int, int], None]

#: Lanczos steps for a matrix's norm without ``deep``: within 5 % for a Gaussian, enough to tell it from a learned one.
QUICK_STEPS = 6


@dataclass(frozen=True)
class WeightStats:
    """Of one parameter. ``gaussianity``: ||W|| / (std (sqrt(in) + sqrt(out))), about 1 for a Gaussian matrix."""

    std: float
    largest: float
    finite: bool
    gaussianity: float | None = None
    norm: float | None = None


@dataclass(frozen=True)
class Sigma:
    """sigma over all tokens of the batch: mean and minimum."""

    mean: float
    least: float


@dataclass(frozen=True)
class SublayerStats:
    """Of one sub-layer: what it reads, what it adds, the gradient at the point that it reads, Jacobians.

    ``jacobian`` is that of the whole step from its point of the stream to the next, shortcut included; sub-layers that
    read the same point share it. ``heads`` is ||J_Z||: from the normed input to the concatenated heads. ``slope`` is
    the steepest slope of an MLP's activation.
    """

    sigma_in: Sigma
    sigma_branch: Sigma
    gradient_norm: float = math.nan
    jacobian: SpectralNorm | None = None
    heads: SpectralNorm | None = None
    slope: float | None = None


@dataclass
class Measurement:
    """Everything measured on one model; ``problem`` says why something could not be."""

    weights: dict[str, WeightStats] = field(default_factory=dict)
    sublayers: list[SublayerStats] = field(default_factory=list)
    token_sigma: Sigma | None = None
    start: Sigma | None = None
    end: Sigma | None = None
    loss: float | None = None
    gradients: dict[str, float] = field(default_factory=dict)
    finite: bool = True
    problems: list[str] = field(default_factory=list)


def measure(
    program: Program, residual: ResidualMap, weights: Weights, *, deep: bool, vocabulary: int | None, progress: Progress
) -> Measurement:
    """One forward pass, piece by piece; then the backward pass, recomputing each.

    Args:
        deep: measure the Jacobians as well.
        vocabulary: the output holds logits over that many tokens; None: it is something else, and has no loss.
        progress: told (step, done, total).
    """
    found = Measurement()
    saved = _forward(program, residual, weights, found, deep=deep, progress=progress)
    norms = _backward(program, residual, weights, saved, found, vocabulary=vocabulary, progress=progress)
    found.sublayers = [
        dataclasses.replace(stats, gradient_norm=norms[sublayer.point])
        for sublayer, stats in zip(program.sublayers, found.sublayers, strict=True)
    ]
    found.token_sigma = token_sigma(program, weights)
    return found


def _forward(
    program: Program, residual: ResidualMap, weights: Weights, found: Measurement, *, deep: bool, progress: Progress
) -> list[Values]:
    """Fills ``found``; returns the inputs of every piece."""
    saved: list[Values] = []
    values: Values = {}
    for i, piece in enumerate(program.pieces):
        progress("forward", i, len(program.pieces))
        parameters = {p: program.parameter(p, weights) for p in piece.parameters}
        _weigh(program, residual, parameters, found, STEPS if deep else QUICK_STEPS)
        inputs = {n: values[n] for n in piece.needs}
        saved.append(inputs)
        mine = [s for s in program.sublayers if i and s.point is program.pieces[i - 1].point]
        wanted = {*program.alive[i], piece.point, *(n for s in mine for n in s.outputs)}
        with torch.no_grad():
            values |= run_piece(program, piece, values, parameters, wanted & set(piece.nodes))
        sizes = [_sizes(program, sublayer, values) for sublayer in mine]
        found.sublayers += _deeper(program, piece, mine, sizes, inputs, parameters, found) if deep else sizes
        found.finite &= all(bool(v.isfinite().all()) for n, v in values.items() if n is piece.point and is_float(v))
        if i == 0:
            found.start = sigma(values[piece.point], rms=_reads_rms(program, piece.point))
        if i == len(program.pieces) - 2:
            found.end = sigma(values[piece.point], rms=_reads_rms(program, program.points[-1]))
        values = {n: v for n, v in values.items() if n in program.alive[i]}
    return saved


def sigma(stream: torch.Tensor, *, rms: bool) -> Sigma:
    """(..., d) -> over all but the last axis."""
    each = stream.pow(2).mean(-1).sqrt() if rms else stream.std(-1, correction=0)
    return Sigma(float(each.mean()), float(each.min()))


def _sizes(program: Program, sublayer: Sublayer, values: Values) -> SublayerStats:
    rms = _reads_rms(program, sublayer.point)
    first, *others = (values[n] for n in sublayer.outputs)
    branch = sum((o for o in others if o.shape == first.shape), first)
    return SublayerStats(sigma(values[sublayer.point], rms=rms), sigma(branch, rms=rms))


def _deeper(
    program: Program,
    piece: Piece,
    sublayers: list[Sublayer],
    sizes: list[SublayerStats],
    inputs: Values,
    parameters: Mapping[Node, torch.Tensor],
    found: Measurement,
) -> list[SublayerStats]:
    """The same with Jacobians; where an operation cannot be differentiated twice, without, and ``found`` says so."""
    if not sublayers:
        return sizes
    start = sublayers[0].point
    try:
        step = jacobian(program, piece, start, piece.point, inputs[start], inputs, parameters)
        return [
            dataclasses.replace(
                stats,
                jacobian=step,
                heads=heads_jacobian(program, piece, sublayer, inputs, parameters),
                slope=steepest(program, piece, sublayer, parameters),
            )
            for sublayer, stats in zip(sublayers, sizes, strict=True)
        ]
    except RuntimeError as error:
        found.problems.append(f"Jacobian of sub-layer {sublayers[0].index}: {first_line(error)}")
        return sizes


def _reads_rms(program: Program, point: Node) -> bool:
    """An RMSNorm reads the point; where none does, the kind of the model's other norms decides."""
    facts = program.stream.facts
    norms = [n for n in facts.norm_at.values() if leads(point, n.input)] or list(facts.norm_at.values())
    return sum(n.kind == "rmsnorm" for n in norms) > len(norms) / 2


def _weigh(
    program: Program, residual: ResidualMap, parameters: Mapping[Node, torch.Tensor], found: Measurement, steps: int
) -> None:
    """Statistics of the parameters that have none yet; ``steps`` towards each matrix's norm."""
    fans = {m.parameter for m in residual.matrices}
    for node, value in parameters.items():
        name = program.stream.facts.trace.parameters[node]
        if name in found.weights:
            continue
        largest = float(torch.linalg.vector_norm(value, math.inf))
        std = _std(value)
        norm = gaussianity = None
        if name in fans and value.ndim == 2 and math.isfinite(largest) and std:
            norm = matrix_norm(value, steps).value
            gaussianity = norm / gaussian_norm(std, *value.shape)
        found.weights[name] = WeightStats(std, largest, math.isfinite(largest), gaussianity, norm)


def _std(value: torch.Tensor) -> float:
    if value.numel() < 1 << 16:
        return float(value.std(correction=0)) if value.numel() > 1 else 0.0
    square = float(torch.linalg.vector_norm(value)) ** 2 / value.numel()  # several times as fast, for a mean near 0
    return math.sqrt(max(square - float(value.mean()) ** 2, 0.0))


def token_sigma(program: Program, weights: Weights) -> Sigma | None:
    """sigma of what the token table alone brings to the stream: behind its factor or norm, before positions."""
    facts = program.stream.facts
    piece = program.pieces[0]
    tables = {operands(t)[0] if op(t) in LOOKUPS else t: t for t in program.stream.tables}
    fed = [source for source, t in tables.items() if op(t) in LOOKUPS and operands(t)[1] in facts.fed]
    moving = [s for s in fed if len(set(_rows(program, tables[s]))) > 1]
    if not moving:
        return None
    parameters = {p: program.parameter(p, weights) for p in piece.parameters}
    others = {facts.weight.get(s) for s in tables if s is not moving[0]}
    parameters = {p: torch.zeros_like(v) if facts.weight.get(p) in others else v for p, v in parameters.items()}
    with torch.no_grad():
        start = run_piece(program, piece, {}, parameters, [piece.point])[piece.point]
    return sigma(start, rms=_reads_rms(program, piece.point))


def _rows(program: Program, lookup: Node) -> list[int]:
    index = operands(lookup)[1]
    rows: list[int] = program.static[index].flatten().tolist() if index in program.static else []
    return rows


def _backward(
    program: Program,
    residual: ResidualMap,
    weights: Weights,
    saved: list[Values],
    found: Measurement,
    *,
    vocabulary: int | None,
    progress: Progress,
) -> dict[Node, float]:
    """Norm of dL/dx at every point; fills the loss and the gradient norms of the parameter groups."""
    groups = _groups(residual)
    squares: dict[str, float] = {}
    gradients: dict[Node, torch.Tensor] = {}
    norms: dict[Node, float] = {}
    for i in range(len(program.pieces) - 1, -1, -1):
        piece = program.pieces[i]
        progress("backward", len(program.pieces) - 1 - i, len(program.pieces))
        if piece.point in gradients:
            norms[piece.point] = float(gradients[piece.point].norm())
        own = _backward_piece(program, piece, weights, saved.pop(), gradients, found, vocabulary)
        edge = {0: "embedding", len(program.pieces) - 1: "head"}.get(i, "other matrices")
        for parameter, square in own.items():
            name = program.stream.facts.trace.parameters[parameter]
            group = groups.get(name, edge if parameter.meta["val"].ndim > 1 else "norms and biases")
            squares[group] = squares.get(group, 0.0) + square
    found.gradients = {group: math.sqrt(square) for group, square in squares.items()}
    found.finite &= all(math.isfinite(n) for n in (*norms.values(), *found.gradients.values()))
    return {point: norms.get(point, 0.0) for point in program.points}


def _backward_piece(
    program: Program,
    piece: Piece,
    weights: Weights,
    saved: Values,
    gradients: dict[Node, torch.Tensor],
    found: Measurement,
    vocabulary: int | None,
) -> dict[Node, float]:
    """Squared norms of the gradients of the piece's parameters; ``gradients`` goes from its outputs to its inputs.

    A function of its own, so that weights and gradients of one piece are gone before those of the next are there.
    """
    inputs = {n: v.detach().requires_grad_() if is_float(v) else v for n, v in saved.items()}
    parameters = {p: program.parameter(p, weights).requires_grad_() for p in piece.parameters}
    with torch.enable_grad():
        results = run_piece(program, piece, inputs, parameters, {*gradients, piece.point} & set(piece.nodes))
        if piece.point is program.pieces[-1].point:
            value = objective(program, results[piece.point], vocabulary)
            if vocabulary is not None:
                found.loss = float(value.detach())
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
    return squares


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
    ids = targets(program)
    logits = output.reshape(ids.shape[0], ids.shape[1], -1)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def targets(program: Program) -> torch.Tensor:
    """The ids whose stream is measured: of the last integer input, which is the decoder's where there are two."""
    trace = program.stream.facts.trace
    ids = [x for x in trace.inputs.values() if not x.is_floating_point()][-1]
    return ids.to(program.device)
