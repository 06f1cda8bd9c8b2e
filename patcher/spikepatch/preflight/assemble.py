"""From a measurement and the map to the report's layers, embeddings and bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from spikepatch.plans.plan import small_std
from spikepatch.preflight import bounds
from spikepatch.preflight.bounds import Bound
from spikepatch.preflight.deep import normed_input
from spikepatch.preflight.forward import Measurement, SublayerStats
from spikepatch.preflight.judge import Thresholds
from spikepatch.preflight.program import Program, Sublayer
from spikepatch.preflight.result import EmbeddingReport, LayerReport, SublayerReport, WeightReport
from spikepatch.residual.map import Matrix, Norm, ResidualMap, ResidualProjection
from spikepatch.residual.ops import NORMS, op, place


class View:
    """One measured model: the map's data, by sub-layer as the program runs them."""

    def __init__(self, program: Program, residual: ResidualMap, measured: Measurement, thresholds: Thresholds) -> None:
        self.program: Program = program
        self.residual: ResidualMap = residual
        self.measured: Measurement = measured
        self.thresholds: Thresholds = thresholds
        self._projections = {p.parameter: p for p in residual.residual_projections}
        self._matrices = {m.parameter: m for m in residual.matrices}
        self._norms = {n.module: n for n in residual.norms}

    def projections(self, sublayer: Sublayer) -> list[ResidualProjection]:
        """Of the sub-layer, as the map has them."""
        return [self._projections[name] for _, name in sublayer.projections if name in self._projections]

    def matrices(self, sublayer: Sublayer) -> list[Matrix]:
        """All that the sub-layer computes with, its projections too."""
        names = self.program.stream.facts.trace.parameters
        held = dict.fromkeys(names[n] for n in names if n in sublayer.interior)
        return [self._matrices[name] for name in held if name in self._matrices]

    def layers(self) -> tuple[LayerReport, ...]:
        """Consecutive sub-layers of one block; a block that runs again is a layer again."""
        pairs = list(zip(self.program.sublayers, self.measured.sublayers, strict=True))
        groups: list[list[tuple[Sublayer, SublayerStats]]] = []
        seen: set[str] = set()
        block: int | None = -1
        for sublayer, stats in pairs:
            layer = next((p.layer for p in self.projections(sublayer)), None)
            names = {name for _, name in sublayer.projections}
            if layer != block or names & seen:
                groups.append([])
                seen = set()
            block, seen = layer, seen | names
            groups[-1].append((sublayer, stats))
        return tuple(self._layer(i, group) for i, group in enumerate(groups))

    def _layer(self, index: int, group: list[tuple[Sublayer, SublayerStats]]) -> LayerReport:
        reports = tuple(self._sublayer(sublayer, stats) for sublayer, stats in group)
        steps = {s.point: r.jacobian for (s, _), r in zip(group, reports, strict=True)}
        known = [j for j in steps.values() if j is not None]

        def bound(kind: str) -> float | None:
            return next((r.bound for r in reports if r.kind == kind), None)

        return LayerReport(
            layer=index,
            sigma_in=reports[0].sigma_in,
            sigma_branch=max(r.sigma_branch for r in reports),
            bound_attention=bound("attention"),
            bound_mlp=bound("mlp"),
            jacobian=math.prod(known) if len(known) == len(steps) else None,
            gradient_norm=reports[0].gradient_norm,
            sublayers=reports,
        )

    def _sublayer(self, sublayer: Sublayer, stats: SublayerStats) -> SublayerReport:
        projections = self.projections(sublayer)
        outputs = {p.parameter for p in projections}
        small = small_std(self.residual.width)
        weights = []
        for matrix in self.matrices(sublayer):
            found = self.measured.weights[matrix.parameter]
            weights.append(
                WeightReport(
                    matrix.parameter, matrix.parameter in outputs, found.std, found.std / small, found.gaussianity
                )
            )
        bound = self.bound(sublayer, stats)
        return SublayerReport(
            kind=sublayer.kind,
            sigma_in=stats.sigma_in.mean,
            sigma_in_least=stats.sigma_in.least,
            sigma_branch=stats.sigma_branch.mean,
            ratio=stats.sigma_branch.mean / stats.sigma_in.mean if stats.sigma_in.mean else math.inf,
            bound=bound.value,
            bound_norms=self._bound_norms(sublayer, stats),
            not_covered=bound.reason,
            jacobian=stats.jacobian.value if stats.jacobian is not None else None,
            gradient_norm=stats.gradient_norm,
            weights=tuple(weights),
        )

    def bound(self, sublayer: Sublayer, stats: SublayerStats) -> Bound:
        """Eq. 15 or Eq. 20 of one sub-layer, with the least sigma of the stream that it reads."""
        projections = self.projections(sublayer)
        reason = bounds.not_covered(self.residual, projections)
        pair = self._mlp(sublayer) if sublayer.kind == "mlp" else None
        if not reason and isinstance(pair, str):
            reason = pair
        if not reason and not self._gaussian(sublayer):
            reason = "||W|| is not that of a Gaussian of its std, as after training"
        if reason:
            return Bound(None, reason)
        size = 1 / self._norm_jacobian(sublayer, stats) * _inverse(projections[0].multiplier)
        width = self.residual.width
        if pair is not None:
            assert not isinstance(pair, str)
            first, second = (self.measured.weights[m.parameter].std for m in pair)
            return Bound(1 + bounds.mlp_excess(first, second, width, pair[0].fan_out, size))
        if stats.heads is None:
            return Bound(None, "||J_Z|| has no closed form: --deep measures it")
        matrix = next(m for m in self.matrices(sublayer) if m.parameter == projections[0].parameter)
        std = self.measured.weights[matrix.parameter].std
        return Bound(1 + bounds.attention_excess(std, matrix.fan_in, width, size, stats.heads.value))

    def _bound_norms(self, sublayer: Sublayer, stats: SublayerStats) -> float | None:
        """1 + Lip(act) max|g| ||W_1|| ||W_2|| / min sigma, for any pre-norm MLP of two matrices, learned or not."""
        projections = self.projections(sublayer)
        pair = self._mlp(sublayer) if sublayer.kind == "mlp" else "not an MLP"
        if bounds.not_covered(self.residual, projections) or isinstance(pair, str) or stats.slope is None:
            return None
        first, second = (self.measured.weights[m.parameter].norm for m in pair)
        if first is None or second is None:
            return None
        excess = stats.slope * first * second * self._norm_jacobian(sublayer, stats) * abs(projections[0].multiplier)
        return 1 + excess

    def _mlp(self, sublayer: Sublayer) -> tuple[Matrix, Matrix] | str:
        return bounds.mlp_matrices(self.matrices(sublayer), self.projections(sublayer))

    def _norm_jacobian(self, sublayer: Sublayer, stats: SublayerStats) -> float:
        node = normed_input(self.program, sublayer)
        norm = self._norms.get(place(node)) if node is not None else None
        inside = sublayer.kind == "attention" and op(node) not in NORMS | {"getitem"}  # ||J_Z|| starts before the gain
        gain = 1.0 if norm is None or inside else self._gain(norm)
        return bounds.norm_jacobian(stats.sigma_in.least, eps=norm.eps if norm is not None else 0.0, gain=gain)

    def _gain(self, norm: Norm) -> float:
        stats = self.measured.weights.get(norm.parameter or "")
        return 1.0 if stats is None else stats.largest + (1 if norm.gain == "1+w" else 0)

    def _gaussian(self, sublayer: Sublayer) -> bool:
        found = (self.measured.weights[matrix.parameter].gaussianity for matrix in self.matrices(sublayer))
        return all(abs(g - 1) <= self.thresholds.gaussian for g in found if g is not None)

    def excesses(self) -> tuple[float | None, float | None]:
        """Excess of Eq. 15 at the first MLP: with sigma of the token embedding's output, and of the stream's start."""
        for sublayer, stats in zip(self.program.sublayers, self.measured.sublayers, strict=True):
            if sublayer.kind != "mlp":
                continue
            bound = self.bound(sublayer, stats)
            if bound.value is None:
                break
            excess = (bound.value - 1) / self._norm_jacobian(sublayer, stats)  # times sigma
            sizes = (self.measured.token_sigma, self.measured.start)
            first, second = (excess / s.mean if s is not None and s.mean else None for s in sizes)
            return first, second
        return None, None

    def embeddings(self) -> Iterator[EmbeddingReport]:
        """One report per table that enters the stream."""
        for e in self.residual.embeddings:
            stats = self.measured.weights.get(e.parameter)
            std = stats.std if stats is not None else math.nan
            yield EmbeddingReport(e.parameter, e.kind, std, small_std(self.residual.width), e.scale, e.normed)


def growth(first: float, last: float, layers: int) -> float | None:
    """OLMo 2's growth exponent: (1/N) log(last / first)."""
    return math.log(last / first) / layers if layers and first > 0 and last > 0 and math.isfinite(last) else None


def bound_product(layers: tuple[LayerReport, ...]) -> Bound:
    """Eq. 7 over all sub-layers."""
    return bounds.product(
        Bound(s.bound, s.not_covered) for s in itertools.chain.from_iterable(layer.sublayers for layer in layers)
    )


def _inverse(multiplier: float) -> float:
    return 1 / abs(multiplier) if multiplier else math.inf
