"""What one forward and one backward pass show: sizes along the stream, the loss, gradients, and Jacobians on request.

sigma is that of ``residual/points.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from spikepatch.errors import first_line
from spikepatch.preflight.backward import backward
from spikepatch.preflight.bounds import gaussian_norm
from spikepatch.preflight.deep import heads_jacobian, jacobian, same_values, steepest
from spikepatch.preflight.jacobian import STEPS, SpectralNorm, matrix_norm
from spikepatch.preflight.program import NodeValues, Piece, Program, Sublayer, Weights, is_float, run_piece
from spikepatch.preflight.result import EntranceReport
from spikepatch.progress import Progress
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.ops import LOOKUPS, op, operands, table_of
from spikepatch.residual.points import norm_kind, sigma
from spikepatch.source.private import is_out_of_memory

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
    """sigma over all tokens of the batch: mean, which is the point's size, and minimum."""

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
    """Everything measured on one model; ``problems`` says what could not be, and why."""

    weights: dict[str, WeightStats] = field(default_factory=dict)
    sublayers: list[SublayerStats] = field(default_factory=list)
    token_sigma: Sigma | None = None
    entrances: list[EntranceReport] = field(default_factory=list)
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
    gradients = backward(program, residual, weights, saved, vocabulary=vocabulary, progress=progress)
    found.sublayers = [
        dataclasses.replace(stats, gradient_norm=gradients.points[sublayer.point])
        for sublayer, stats in zip(program.sublayers, found.sublayers, strict=True)
    ]
    found.loss, found.gradients = gradients.loss, gradients.groups
    found.finite &= all(map(math.isfinite, (*gradients.points.values(), *gradients.groups.values())))
    found.token_sigma = _token_sigma(program, residual, weights)
    return found


def logits_std(program: Program, weights: Weights, vocabulary: int) -> float:
    """std of the first logits of a token, averaged over tokens: from one forward pass and nothing else."""
    values: NodeValues = {}
    for i, piece in enumerate(program.pieces):
        parameters = {p: program.parameter(p, weights) for p in piece.parameters}
        wanted = {*program.alive[i], piece.point} & set(piece.nodes)
        with torch.no_grad():
            values |= run_piece(program, piece, {n: values[n] for n in piece.needs}, parameters, wanted)
    return float(sigma(values[program.pieces[-1].point].reshape(-1, vocabulary), "layernorm").mean())


def _forward(
    program: Program, residual: ResidualMap, weights: Weights, found: Measurement, *, deep: bool, progress: Progress
) -> list[NodeValues]:
    """Fills ``found``; returns the inputs of every piece."""
    saved: list[NodeValues] = []
    values: NodeValues = {}
    for i, piece in enumerate(program.pieces):
        progress("forward", i, len(program.pieces))
        parameters = {p: program.parameter(p, weights) for p in piece.parameters}
        _record_weights(program, residual, parameters, found, STEPS if deep else QUICK_STEPS)
        inputs = {n: values[n] for n in piece.needs}
        saved.append(inputs)
        mine = [s for s in program.sublayers if i and s.point is program.pieces[i - 1].point]
        wanted = {*program.alive[i], piece.point, *(n for s in mine for n in s.outputs)}
        entrances = {node: e for node, e in _entrances(program, residual).items() if i == 0 and node in piece.nodes}
        wanted.update(n for node in entrances for n in (node, program.stream.facts.carries[node][0]))
        with torch.no_grad():
            values |= run_piece(program, piece, values, parameters, wanted & set(piece.nodes))
        sizes = [_sizes(program, residual, sublayer, values) for sublayer in mine]
        found.sublayers += _with_jacobians(program, piece, mine, sizes, inputs, parameters, found) if deep else sizes
        found.finite &= all(bool(v.isfinite().all()) for n, v in values.items() if n is piece.point and is_float(v))
        found.entrances += [_entered(program, residual, *entrance, values) for entrance in entrances.items()]
        if i == 0:
            found.start = size_at(program, residual, piece.point, values[piece.point])
        if i == len(program.pieces) - 2:
            found.end = size_at(program, residual, piece.point, values[piece.point])
        values = {n: v for n, v in values.items() if n in program.alive[i]}
    return saved


def size_at(program: Program, residual: ResidualMap, point: Node, value: torch.Tensor) -> Sigma:
    """sigma of ``value``, (..., d), as the norm has it that reads ``point``."""
    readers = [norm for norm in program.stream.facts.norm_at.values() if same_values(point, norm.input)]
    each = sigma(value, norm_kind(readers, residual))
    return Sigma(float(each.mean()), float(each.min()))


def _entrances(program: Program, residual: ResidualMap) -> dict[Node, tuple[str, ...]]:
    """Where features enter -> the inputs that they are computed from."""
    named = iter(residual.entrances)
    nodes = [node for node, features in program.stream.entrances.items() for _ in features]
    found: dict[Node, tuple[str, ...]] = {}
    for node, entrance in zip(nodes, named, strict=False):
        found[node] = tuple(dict.fromkeys((*found.get(node, ()), *entrance.inputs)))
    return found


def _entered(
    program: Program, residual: ResidualMap, node: Node, inputs: tuple[str, ...], values: NodeValues
) -> EntranceReport:
    """sigma where ``node`` put features in the place of tokens, or added them; and where it did not."""
    whole, before = values[node], values[program.stream.facts.carries[node][0]]
    entered = (whole != before).any(-1)
    means = [
        size_at(program, residual, node, whole[rows]).mean if bool(rows.any()) else None for rows in (entered, ~entered)
    ]
    return EntranceReport(inputs, means[0], means[1])


def _sizes(program: Program, residual: ResidualMap, sublayer: Sublayer, values: NodeValues) -> SublayerStats:
    first, *others = (values[n] for n in sublayer.outputs)
    branch = sum((o for o in others if o.shape == first.shape), first)
    point = sublayer.point
    return SublayerStats(size_at(program, residual, point, values[point]), size_at(program, residual, point, branch))


def _with_jacobians(
    program: Program,
    piece: Piece,
    sublayers: list[Sublayer],
    sizes: list[SublayerStats],
    inputs: NodeValues,
    parameters: Mapping[Node, torch.Tensor],
    found: Measurement,
) -> list[SublayerStats]:
    """``sizes`` with Jacobians; where an operation cannot be differentiated twice, without, and ``found`` says so."""
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
        if is_out_of_memory(error):
            raise
        found.problems.append(f"Jacobian of sub-layer {sublayers[0].index}: {first_line(error)}")
        return sizes


def _record_weights(
    program: Program, residual: ResidualMap, parameters: Mapping[Node, torch.Tensor], found: Measurement, steps: int
) -> None:
    """Fills ``found`` for the parameters that it has not yet; ``steps`` towards each matrix's norm."""
    matrices = {m.parameter for m in residual.matrices}
    for node, value in parameters.items():
        name = program.stream.facts.trace.parameters[node]
        if name in found.weights:
            continue
        largest = float(torch.linalg.vector_norm(value, math.inf)) if value.numel() else 0.0
        std = _std(value)
        norm = gaussianity = None
        if name in matrices and value.ndim == 2 and math.isfinite(largest) and std:
            norm = matrix_norm(_aligned(value), steps).value
            gaussianity = norm / gaussian_norm(std, *value.shape)
        found.weights[name] = WeightStats(std, largest, math.isfinite(largest), gaussianity, norm)


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """Some BLAS round a product by where the matrix lies: what is mapped from a file begins anywhere."""
    return matrix.clone() if matrix.data_ptr() % 64 else matrix


def _std(value: torch.Tensor) -> float:
    if value.numel() < 1 << 16:
        return float(value.std(correction=0)) if value.numel() > 1 else 0.0
    square = float(torch.linalg.vector_norm(value)) ** 2 / value.numel()  # several times as fast, for a mean near 0
    return math.sqrt(max(square - float(value.mean()) ** 2, 0.0))


def _token_sigma(program: Program, residual: ResidualMap, weights: Weights) -> Sigma | None:
    """sigma of what the token table alone brings to the stream: behind its factor or norm, before positions."""
    facts = program.stream.facts
    piece = program.pieces[0]
    tables = {table_of(t): t for t in program.stream.tables}
    fed = [source for source, t in tables.items() if op(t) in LOOKUPS and operands(t)[1] in facts.fed]
    moving = [s for s in fed if len(set(_rows(program, tables[s]))) > 1]
    if not moving:
        return None
    parameters = {p: program.parameter(p, weights) for p in piece.parameters}
    others = {facts.weight.get(s) for s in tables if s is not moving[0]}
    parameters = {p: torch.zeros_like(v) if facts.weight.get(p) in others else v for p, v in parameters.items()}
    with torch.no_grad():
        start = run_piece(program, piece, {}, parameters, [piece.point])[piece.point]
    return size_at(program, residual, piece.point, start)


def _rows(program: Program, lookup: Node) -> list[int]:
    index = operands(lookup)[1]
    rows: list[int] = program.static[index].flatten().tolist() if index in program.static else []
    return rows
