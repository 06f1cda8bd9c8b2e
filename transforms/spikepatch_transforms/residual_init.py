"""Residual scaling: residual projections ~ N(0, (s r / m)^2): s as in ``small_init``, and r falls with depth.

    1/sqrt(S)   r = 1 / sqrt(S)                      S: sub-layers, counted from the map (2 N in a classic decoder)
    wang        s r = 2 / (N sqrt(d))                N: layers
    mitchell    s r = 1 / sqrt(2 fan_in (l + 1))     l: the layer, from 0; fan_in is d for W_O and d_ffn for W_2
    none        r = 1

m is the size of a factor that the architecture itself applies between the product and the addition: it is divided out,
so that the branch ends at the recipe's scale and the two are not applied on top of each other (not with ``none``).

Skips: behind a branch norm the product is divided by its own size, so the scale of the weight does not reach the
stream; such projections get s. ``branch_gain`` gives that norm's gain 1 / (m sqrt(S)) instead: small sub-layers in the
theory's sense, but not in the paper, and off by default.
Refuses: mitchell, where a projection belongs to no layer.
Preserves: nothing learned in the projections and, with ``branch_gain``, in those gains; acts with ``reinit`` all and
residual.
Sources: Radford et al. 2019 (GPT-2); "small sub-layers" in Takase et al., arXiv 2312.16903; wang: GPT-NeoX (Wang and
Komatsuzaki 2021, mesh-transformer-jax); mitchell: OLMo, which cuts it off at 3 (``cut``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from spikepatch.errors import Refused
from spikepatch.plans.plan import Constant, Context, Edit, Fill, Skip
from spikepatch.residual.map import Matrix, ResidualMap, ResidualProjection
from spikepatch_transforms.distributions import Drawn


@dataclass(frozen=True)
class ResidualInit(Drawn):
    """A ``Fill`` for each residual projection; the fields of ``Drawn`` as in ``small_init``."""

    scale: Literal["1/sqrt(S)", "wang", "mitchell", "none"] = "1/sqrt(S)"
    branch_gain: bool = False

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if context.reinit == "none":
            return
        matrices = {matrix.parameter: matrix for matrix in residual.matrices}
        for projection in residual.residual_projections:
            name = projection.parameter
            shape, matrix = context.shapes[name], matrices[name]
            if projection.branch_norm is None:
                yield self._scaled(projection, shape, matrix, residual)
            else:
                yield self.fill(name, residual.width, shape, matrix)
                if self.scale != "none":
                    yield Skip(
                        f"{name} * {self.scale.replace('S', str(residual.sublayers))}",
                        f"scale-invariant: {projection.branch_norm} divides the product by its own size",
                    )
        if self.branch_gain:
            yield from _branch_gains(residual)

    def _scaled(
        self, projection: ResidualProjection, shape: tuple[int, ...], matrix: Matrix, residual: ResidualMap
    ) -> Fill:
        rules: dict[str, Drawn] = {
            "wang": dataclasses.replace(self, base="small", std=None),
            "mitchell": dataclasses.replace(self, base="fan_in", std=None),
        }
        fill = rules.get(self.scale, self).fill(projection.parameter, residual.width, shape, matrix)
        multiplier = abs(projection.multiplier)
        match self.scale:
            case "none":
                return fill
            case "1/sqrt(S)":
                std, depth = fill.std / math.sqrt(residual.sublayers), -0.5
            case "wang":
                std, depth = 2 / (residual.layers * math.sqrt(residual.width)), -1.0
            case "mitchell":
                if projection.layer is None:
                    raise Refused(
                        what="mitchell needs to know the layer of every residual projection",
                        where=residual.source,
                        why=f"{projection.parameter} belongs to no layer of a list of layers",
                        remedy="use the scale 1/sqrt(S)",
                    )
                std, depth = fill.std / math.sqrt(2 * (projection.layer + 1)), 0.0
        return dataclasses.replace(fill, std=std / multiplier, depth=depth)


def _branch_gains(residual: ResidualMap) -> Iterator[Edit | Skip]:
    norms = {norm.module: norm for norm in residual.norms if norm.role == "branch"}
    last = {p.branch_norm: p for p in residual.residual_projections if p.branch_norm is not None}
    for module, projection in last.items():
        target = f"{module} * 1/sqrt({residual.sublayers})"
        norm = norms.get(module)  # None: a division by its own size that is no known norm
        steps = [step.kind for step in projection.between]
        norm_at = steps.index("norm")
        if norm is None or norm.parameter is None:
            yield Skip(target, "the norm has no gain")
        elif "multiplier" in steps[:norm_at]:
            yield Skip(target, "a constant factor stands before the norm, which takes it out again")
        else:
            value = 1 / (abs(projection.multiplier) * math.sqrt(residual.sublayers))
            yield Constant(norm.parameter, value, offset=-1.0 if norm.gain == "1+w" else 0.0, depth=-0.5)
